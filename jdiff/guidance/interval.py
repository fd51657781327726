"""Guidance within an interval of noise levels."""

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Denoise, Number, as_time, expand
from jdiff.core.checks import check_time
from jdiff.core.pytrees import noun
from jdiff.process.forward import Prediction, predict
from jdiff.process.schedules import Schedule


@noun
class Interval:
    """One denoiser inside an interval of sigma/alpha, another outside it."""

    guided: Denoise
    conditional: Denoise
    low: Number
    high: Number

    @property
    def schedule(self) -> Schedule:
        return self.conditional.schedule

    def __call__(self, x: Array, t) -> Array:
        """E[x_0 | x_t] of whichever denoiser holds at t, (B, ...)."""
        return self.predict(x, t).x0

    def predict(self, x: Array, t) -> Prediction:
        """The prediction of whichever denoiser holds at t; for one scalar t only that one is evaluated.

        `extra`, as a learned variance, is that of the same denoiser; None unless both have one of the same shape.
        """
        check_time(t, x)
        t = as_time(t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        inside = (sigma > self.low * alpha) & (sigma <= self.high * alpha)

        def whole(denoise):
            return lambda: predict(denoise, self.schedule, x, t)

        shapes = [jax.eval_shape(whole(denoise)).extra for denoise in (self.guided, self.conditional)]
        alike = jax.tree.structure(shapes[0]) == jax.tree.structure(shapes[1]) and shapes[0] == shapes[1]

        def either(denoise):
            return whole(denoise) if alike else lambda: whole(denoise)()._replace(extra=None)

        if t.ndim == 0:
            return lax.cond(inside, either(self.guided), either(self.conditional))
        guided, conditional = either(self.guided)(), either(self.conditional)()
        return jax.tree.map(lambda a, b: jnp.where(expand(inside, x) > 0, a, b), guided, conditional)


def interval(guided: Denoise, conditional: Denoise, low, high) -> Interval:
    """Guide only where low < sigma/alpha <= high; elsewhere `conditional` alone, which costs one evaluation less.

    Kynkäänniemi et al. 2024, arXiv:2404.07724, eq. 5. `conditional` carries the schedule. Raises ValueError unless
    0 <= low < high.
    """
    if isinstance(low, (int, float)) and isinstance(high, (int, float)) and not 0 <= low < high:
        raise ValueError(f"interval: expected 0 <= low < high in units of sigma/alpha, got {low} and {high}")
    return Interval(guided, conditional, low, high)
