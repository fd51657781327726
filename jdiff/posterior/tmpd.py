"""Tweedie moment projected diffusion: one variance for each number of y."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdiff.core.arrays import Array, safe_divide
from jdiff.core.pytrees import noun
from jdiff.posterior.observation import Observation, observe
from jdiff.posterior.tweedie import Given, moments
from jdiff.process.prediction import Denoise, Prediction, as_denoise


@noun
class TMPD(Given):
    """A denoiser given y, by Tweedie moment projection: see `tmpd`."""

    base: Denoise
    observation: Observation

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """The guided x_0, the noise that it implies, and the `extra` of the denoiser."""
        prediction, cov, *_, after = moments(self.base, x, t, memory[0])
        seen = self.observation.beside(prediction.x0)
        sums = seen.push(cov(seen.pull(jnp.ones_like(seen.residual))))
        variance = seen.variance + sums
        # the sum of a row may be negative, which a variance is not: such a number of y has that of its noise alone
        variance = jnp.where(variance > 0, variance, seen.variance)
        return self.shifted(prediction, cov(seen.pull(safe_divide(seen.residual, variance))), x, t), (after,)


def tmpd(denoise: Denoise | Callable, A, y, noise_std) -> TMPD:
    """Tweedie moment projected diffusion:

        x_0 <- x_0 + C A^T (y - A x_0) / (A C A^T 1 + noise_std^2),    C = (sigma^2 / alpha) J^T,

    where J is the Jacobian of the denoiser. The sums of the rows of A C A^T stand for the matrix. It is exact for
    Gaussian data if A C A^T is diagonal, and biased otherwise. An A that is not linear is linearised.

    A call costs one evaluation of the denoiser and two vector-Jacobian products.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        A: a matrix (M, D), or a function from x (B, ...) to (B, ...).
        y: one observation, of the shape of A(x)[0], or one for each sample, of the shape of A(x): see `PerSample`.
        noise_std: the standard deviation of its noise, a number or an array of the shape of one observation.

    Returns:
        The denoiser given y.

    Raises:
        ValueError: for a noise_std out of range, and, in a call, shapes that disagree.

    Reference:
        Boys et al. 2023, arXiv:2310.06721, section 3.
    """
    return TMPD(as_denoise(denoise, None), observe(A, y, noise_std))
