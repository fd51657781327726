"""Diffusion posterior sampling: a step down the distance between y and A(x_0)."""

from collections.abc import Callable
from typing import Any

from jdiff.core.arrays import Array, safe_divide, safe_sqrt
from jdiff.core.checks import LARGEST
from jdiff.core.pytrees import noun, per_sample, static
from jdiff.guidance.base import as_weight, weight_at
from jdiff.posterior.linear import dots, rows
from jdiff.posterior.observation import Observation, observe
from jdiff.posterior.tweedie import Given, moments
from jdiff.process.prediction import Denoise, Prediction, as_denoise


@noun
class DPS(Given):
    """A denoiser given y, by the gradient of a distance: see `dps`."""

    base: Denoise
    observation: Observation
    scale: Any = per_sample()
    squared: bool = static(default=False)

    def check(self):
        object.__setattr__(self, "scale", as_weight(self.scale, "scale", most=LARGEST))

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """The guided x_0, the noise that it implies, and the `extra` of the denoiser."""
        prediction, cov, wide_x, *_, after = moments(self.base, x, t, memory[0])
        seen = self.observation.beside(prediction.x0)
        if self.squared:
            down = 2 * seen.residual
        else:
            length = safe_sqrt(dots(seen.residual, seen.residual))
            down = safe_divide(seen.residual, rows(length, seen.residual))
        shift = weight_at(self.scale, wide_x, t, "scale") * cov(seen.pull(down))
        return self.shifted(prediction, shift, x, t), (after,)


def dps(denoise: Denoise | Callable, A, y, scale=1.0, *, squared: bool = False) -> DPS:
    """Diffusion posterior sampling:  x_0 <- x_0 - scale (sigma^2 / alpha) grad |y - A(x_0)|,

    the gradient being that with respect to x_t, through the denoiser. It is guidance by the likelihood
    exp(-scale |y - A(x_0)|), with the estimate of x_0 in place of x_0, and biased for that reason: it takes x_0 given
    x_t for certain. `squared` has the square of the norm, and there scale = 1 / (2 noise_std^2) is the likelihood of
    Gaussian noise.

    The published update subtracts zeta grad |y - A(x_0)| from x_s after each step. In a step of DDPM from t to s that
    is a scale of zeta alpha_t / (sigma_t^2 alpha_s c) here, with c = 1 - SNR_t / SNR_s.

    A call costs one evaluation of the denoiser and one vector-Jacobian product.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        A: a matrix (M, D), or a function from x (B, ...) to (B, ...), linear or not.
        y: one observation, of the shape of A(x)[0], or one for each sample, of the shape of A(x): see `PerSample`.
        scale: 0 or more: a number, (B,), or a pytree that is called with t.
        squared: whether the norm is squared.

    Returns:
        The denoiser given y.

    Raises:
        ValueError: for a scale out of range, and, in a call, shapes that disagree.

    Reference:
        Chung et al. 2023, arXiv:2209.14687, algorithm 1.
    """
    return DPS(as_denoise(denoise, None), observe(A, y, 0.0), scale, bool(squared))
