"""Guidance within an interval of noise levels."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, as_time, expand
from jdiff.core.checks import check_time
from jdiff.core.pytrees import concrete, noun
from jdiff.process.clock import Schedule
from jdiff.process.prediction import Denoise, Prediction, as_denoises


@noun
class Interval(Denoise):
    """One denoiser inside an interval of sigma/alpha, another outside it."""

    guided: Denoise
    conditional: Denoise
    low: Number
    high: Number

    @property
    def schedule(self) -> Schedule:
        return self.conditional.schedule

    def predict(self, x: Array, t) -> Prediction:
        """The prediction of whichever denoiser holds at t; for one scalar t only that one is evaluated.

        `extra`, as a learned variance, is that of the same denoiser; None unless both have one of the same shape.
        """
        check_time(t, x)
        t = as_time(t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        inside = (sigma > self.low * alpha) & (sigma <= self.high * alpha)
        both = self.guided, self.conditional
        first, second = (jax.eval_shape(lambda denoise=denoise: denoise.predict(x, t)).extra for denoise in both)
        alike = type(first) is type(second) and jax.tree.leaves(first) == jax.tree.leaves(second)
        guided, conditional = (
            lambda denoise=denoise: denoise.predict(x, t) if alike else denoise.predict(x, t)._replace(extra=None)
            for denoise in both
        )
        if t.ndim == 0:
            return lax.cond(inside, guided, conditional)
        return jax.tree.map(lambda a, b: jnp.where(expand(inside, x) > 0, a, b), guided(), conditional())


def interval(guided: Denoise | Callable, conditional: Denoise | Callable, low, high) -> Interval:
    """Guide only where low < sigma/alpha <= high; elsewhere `conditional` alone, which costs one evaluation less.

    Args:
        guided: the denoiser inside the interval, as `cfg` makes one.
        conditional: the denoiser outside of it.
        low: the lower end, in units of sigma/alpha, a number.
        high: the upper end, in the same units, a number; infinite for none.

    Returns:
        The denoiser. For a scalar t only one of the two is evaluated, for t (B,) both are.

    Raises:
        ValueError: unless 0 <= low < high.

    Reference:
        Kynkäänniemi et al. 2024, arXiv:2404.07724, eq. 5.
    """
    for name, value in dict(low=low, high=high).items():
        if jnp.ndim(value):
            raise ValueError(f"interval: {name} is one number, got shape {jnp.shape(value)}")
    if concrete(low, high) and not 0 <= low < high:
        raise ValueError(f"interval: expected 0 <= low < high in units of sigma/alpha, got {low} and {high}")
    guided, conditional = as_denoises(guided, conditional)
    return Interval(guided, conditional, low, high)
