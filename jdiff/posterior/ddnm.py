"""Estimates of x_0 whose observed part is y: replacement, and projection for any linear A."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, safe_divide, wide
from jdiff.core.checks import check_is
from jdiff.core.pytrees import known, noun, static
from jdiff.posterior.linear import solve
from jdiff.posterior.observation import ARRAYS, Observation, PerSample, observe
from jdiff.posterior.operators import Mask
from jdiff.posterior.tweedie import Given
from jdiff.process.forward import rates
from jdiff.process.memory import predict_with
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.solvers.base import check_order


@noun
class DDNM(Given):
    """A denoiser given y, by projection onto A(x_0) = y: see `ddnm`."""

    base: Denoise
    observation: Observation
    iterations: int = static()

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """The projected x_0, the noise that it implies, and the `extra` of the denoiser."""
        prediction, after = predict_with(self.base, wide(x), t, memory[0])
        seen = self.observation.beside(prediction.x0)
        alpha, sigma = rates(self.schedule, t, seen.residual)
        noise = alpha * jnp.sqrt(seen.variance)
        share = jnp.where(sigma < noise, safe_divide(sigma, noise), 1)
        solved = solve(lambda v: seen.push(seen.pull(v)), share * seen.residual, self.iterations)
        return self.shifted(prediction, seen.pull(solved.x), x, t), (after,)


def ddnm(denoise: Denoise | Callable, A, y, noise_std=0.0, *, iterations: int = 20) -> DDNM:
    """DDNM:  x_0 <- x_0 + share A^+ (y - A x_0),    share = min(1, sigma / (alpha noise_std)),

    with the pseudo-inverse A^+ = A^T (A A^T)^-1. What A sees of x_0 becomes y, and the rest stays as the denoiser has
    it, so the two need not fit together: it is biased wherever they depend on each other.

    A call costs one evaluation of the denoiser and no vector-Jacobian product.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        A: a matrix (M, D), or a linear function from x (B, ...) to (B, ...).
        y: one observation, of the shape of A(x)[0], or one for each sample, of the shape of A(x): see `PerSample`.
        noise_std: the standard deviation of its noise, a number or an array of the shape of one observation.
        iterations: steps of conjugate gradients for the pseudo-inverse, which do not call the denoiser.

    Returns:
        The denoiser given y.

    Raises:
        ValueError: for iterations below 1, a noise_std out of range, and, in a call, shapes that disagree.

    Reference:
        Wang et al. 2023, arXiv:2212.00490, eq. 13 and 19.
    """
    check_order("ddnm", iterations, what="iterations")
    return DDNM(as_denoise(denoise, None), observe(A, y, noise_std), int(iterations))


def replace(denoise: Denoise | Callable, mask, y) -> DDNM:
    """Replacement:  x_0 <- y where the mask is 1, and x_0 elsewhere.

    The observed part of x_t then follows y on its own, and the rest is denoised beside it. It is biased: the rest hears
    of y only through what the denoiser makes of x_t.

    A call costs one evaluation of the denoiser.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        mask: 1 where x_0 is observed and 0 elsewhere, of the shape of one sample, or with a last axis of 1.
        y: the observed data, of the shape of one sample, or (B, ...). Outside the mask it may be anything.

    Returns:
        The denoiser given y.

    Raises:
        ValueError: for a mask of other numbers or of another size.

    Reference:
        Song et al. 2021, arXiv:2011.13456, section 5 and appendix I.2.
    """
    operator = Mask(mask)
    marked = isinstance(y, PerSample)
    values: Any = y.y if marked else y
    check_is("y", values, ARRAYS, "observed data, an array of the shape of one sample or (B, ...)")
    if known(mask, values):
        outside = np.broadcast_to(np.asarray(mask) == 0, np.broadcast_shapes(np.shape(mask), np.shape(values)))
        values = np.where(outside, 0, values).astype(np.asarray(values).dtype)
    values = jnp.where(jnp.asarray(mask) != 0, values, 0) if not known(mask, values) else values
    return ddnm(denoise, operator, PerSample(values) if marked else values, iterations=1)
