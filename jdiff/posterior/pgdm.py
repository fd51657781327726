"""Pseudo-inverse guidance: x_0 given x_t taken for a Gaussian of one variance."""

from collections.abc import Callable
from typing import Any

from jdiff.core.arrays import Array, Number
from jdiff.core.checks import check_positive
from jdiff.core.pytrees import noun, static
from jdiff.posterior.linear import solve
from jdiff.posterior.observation import Observation, observe
from jdiff.posterior.tweedie import Given, moments
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.solvers.base import check_order


@noun
class PGDM(Given):
    """A denoiser given y, by pseudo-inverse guidance: see `pgdm`."""

    base: Denoise
    observation: Observation
    data_std: Number
    iterations: int = static()

    def check(self):
        check_positive(self, data_std=self.data_std)

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """The guided x_0, the noise that it implies, and the `extra` of the denoiser."""
        prediction, cov, _, _, alpha, sigma, after = moments(self.base, x, t, memory[0])
        seen = self.observation.beside(prediction.x0)
        r2 = (sigma * self.data_std) ** 2 / (sigma**2 + (alpha * self.data_std) ** 2)
        solved = solve(lambda v: seen.variance * v + seen.push(r2 * seen.pull(v)), seen.residual, self.iterations)
        return self.shifted(prediction, cov(seen.pull(solved.x)), x, t), (after,)


def pgdm(denoise: Denoise | Callable, A, y, noise_std, *, data_std=1.0, iterations: int = 20) -> PGDM:
    """Pseudo-inverse guidance (PiGDM):

        x_0 <- x_0 + (sigma^2 / alpha) J^T A^T (r^2 A A^T + noise_std^2)^-1 (y - A x_0),
        r^2 = sigma^2 data_std^2 / (sigma^2 + alpha^2 data_std^2),

    where J is the Jacobian of the denoiser. r^2 is the variance of x_0 given x_t for data N(m, data_std^2 I). It is
    exact for that data, and biased for data whose directions have other variances. An A that is not linear is
    linearised.

    A call costs one evaluation of the denoiser and one vector-Jacobian product.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        A: a matrix (M, D), or a function from x (B, ...) to (B, ...).
        y: one observation, of the shape of A(x)[0], or one for each sample, of the shape of A(x): see `PerSample`.
        noise_std: the standard deviation of its noise, a number or an array of the shape of one observation.
        data_std: the standard deviation of the data, positive. The paper's r^2 has 1.
        iterations: steps of conjugate gradients for the inverse, which do not call the denoiser. One is enough where
            A A^T is a multiple of the identity, as for masks.

    Returns:
        The denoiser given y.

    Raises:
        ValueError: for iterations below 1, a number out of range, and, in a call, shapes that disagree.

    Reference:
        Song et al. 2023, "Pseudoinverse-guided diffusion models for inverse problems", eq. 7 and section 3.3.
    """
    check_order("pgdm", iterations, what="iterations")
    return PGDM(as_denoise(denoise, None), observe(A, y, noise_std), data_std, int(iterations))
