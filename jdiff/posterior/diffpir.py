"""DiffPIR: estimates of x_0 brought towards y without a gradient of the network."""

from collections.abc import Callable
from typing import Any

from jdiff.core.arrays import Array, Number, wide
from jdiff.core.checks import check_positive
from jdiff.core.pytrees import noun, static
from jdiff.posterior.linear import solve
from jdiff.posterior.observation import Observation, observe
from jdiff.posterior.tweedie import Given
from jdiff.process.forward import rates
from jdiff.process.memory import predict_with
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.solvers.base import check_order


@noun
class DiffPIR(Given):
    """A denoiser given y, by a proximal step: see `diffpir`."""

    base: Denoise
    observation: Observation
    lam: Number
    iterations: int = static()

    def check(self):
        check_positive(self, lam=self.lam)

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """The x_0 nearer to y, the noise that it implies, and the `extra` of the denoiser."""
        prediction, after = predict_with(self.base, wide(x), t, memory[0])
        alpha, sigma = rates(self.schedule, t, prediction.x0)
        seen = self.observation.beside(prediction.x0)

        # both sides times alpha^2, so that nothing is divided by alpha or sigma, which may be 0
        prior, noise = sigma**2 / self.lam, rates(self.schedule, t, seen.residual)[0] ** 2 * seen.variance
        solved = solve(lambda v: seen.push(prior * seen.pull(v)) + noise * v, seen.residual, self.iterations)
        return self.shifted(prediction, prior * seen.pull(solved.x), x, t), (after,)


def diffpir(denoise: Denoise | Callable, A, y, noise_std, *, lam=10.0, iterations: int = 20) -> DiffPIR:
    """DiffPIR:  x_0 <- argmin_z |y - A z|^2 / noise_std^2 + lam |z - x_0|^2 alpha^2 / sigma^2.

    The proximal step of plug-and-play restoration, which is x_0 + A^T (A A^T + noise_std^2 lam alpha^2 / sigma^2)^-1
    (y - A x_0). It takes x_0 given x_t for a Gaussian of variance sigma^2 / (lam alpha^2) around the estimate, so it is
    biased: no data has that variance at each t. An A that is not linear is linearised.

    A call costs one evaluation of the denoiser and no vector-Jacobian product.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        A: a matrix (M, D), or a function from x (B, ...) to (B, ...).
        y: one observation, of the shape of A(x)[0], or one for each sample, of the shape of A(x): see `PerSample`.
        noise_std: the standard deviation of its noise, a number or an array of the shape of one observation.
        lam: lambda, positive: how much the denoiser counts. The paper has 1 to 25.
        iterations: steps of conjugate gradients for the inverse, which do not call the denoiser.

    Returns:
        The denoiser given y.

    Raises:
        ValueError: for iterations below 1, a number out of range, and, in a call, shapes that disagree.

    Reference:
        Zhu et al. 2023, arXiv:2305.08995, eq. 12 and algorithm 1.
    """
    check_order("diffpir", iterations, what="iterations")
    return DiffPIR(as_denoise(denoise, None), observe(A, y, noise_std), lam, int(iterations))
