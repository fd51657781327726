"""Moment matching posterior sampling: exact on Gaussian data."""

from collections.abc import Callable
from typing import Any

from jdiff.core.arrays import Array
from jdiff.core.pytrees import noun, static
from jdiff.posterior.linear import Solved, solve
from jdiff.posterior.observation import Observation, observe
from jdiff.posterior.tweedie import Given, moments
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.solvers.base import check_order


@noun
class MMPS(Given):
    """A denoiser given y, by the covariance of x_0 given x_t: see `mmps`."""

    base: Denoise
    observation: Observation
    iterations: int = static()

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """E[x_0 | x_t, y], the noise that it implies, and the `extra` of the denoiser."""
        prediction, shift, _, after = self._solved(x, t, memory)
        return self.shifted(prediction, shift, x, t), (after,)

    def residual(self, x: Array, t) -> Array:
        """How far from solved the equations are at x_t, |b - K v| / |b| of each sample, (B,)."""
        return self._solved(x, t, self.memory(x))[2].residual

    def _solved(self, x: Array, t, memory) -> tuple[Prediction, Array, Solved, Any]:
        prediction, cov, *_, after = moments(self.base, x, t, memory[0])
        seen = self.observation.beside(prediction.x0)
        solved = solve(lambda v: seen.variance * v + seen.push(cov(seen.pull(v))), seen.residual, self.iterations)
        return prediction, cov(seen.pull(solved.x)), solved, after


def mmps(denoise: Denoise | Callable, A, y, noise_std, *, iterations: int = 1) -> MMPS:
    """Moment matching posterior sampling:

        x_0 <- x_0 + C A^T (A C A^T + noise_std^2)^-1 (y - A x_0),    C = (sigma^2 / alpha) J^T,

    where J is the Jacobian of the denoiser. It takes x_0 given x_t for a Gaussian of the right covariance. So it is
    exact for Gaussian data and linear A, with as many iterations as y has numbers; a few are enough for images. The
    inverse is taken by conjugate gradients, and an A that is not linear is linearised.

    A call costs one evaluation of the denoiser and `iterations` + 1 vector-Jacobian products.

    >>> import numpy as np, jdiff
    >>> data = jdiff.oracle.Gaussian(np.zeros(2), np.eye(2))
    >>> given = mmps(data.denoise(jdiff.VE()), np.array([[1.0, 0.0]]), np.array([3.0]), 0.5)
    >>> np.asarray(given(np.zeros((1, 2), np.float32), 1.0)).round(2)  # of N(2.4, 0.2) and N(0, 1)
    array([[2.4, 0. ]], dtype=float32)

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        A: a matrix (M, D), or a function from x (B, ...) to (B, ...).
        y: one observation, of the shape of A(x)[0], or one for each sample, of the shape of A(x): see `PerSample`.
        noise_std: the standard deviation of its noise, a number or an array of the shape of one observation.
        iterations: steps of conjugate gradients, 1 or more. `residual` of the result says how far they came.

    Returns:
        The denoiser given y.

    Raises:
        ValueError: for iterations below 1, a noise_std out of range, and, in a call, shapes that disagree.

    Reference:
        Rozet et al. 2024, arXiv:2405.13712, algorithm 1.
    """
    check_order("mmps", iterations, what="iterations")
    return MMPS(as_denoise(denoise, None), observe(A, y, noise_std), int(iterations))
