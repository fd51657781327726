"""Guidance within an interval of noise levels."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, as_time
from jdiff.core.checks import check_time
from jdiff.core.pytrees import concrete, noun
from jdiff.guidance.base import Guidance, either
from jdiff.process.clock import Schedule
from jdiff.process.memory import predict_with
from jdiff.process.prediction import Denoise, Prediction, as_denoises


@noun
class Interval(Guidance):
    """One denoiser inside an interval of sigma/alpha, another outside it."""

    guided: Denoise
    conditional: Denoise
    low: Number
    high: Number

    @property
    def parts(self):
        return self.guided, self.conditional

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """The prediction of whichever denoiser holds at t; for one scalar t only that one is evaluated.

        `extra`, as a learned variance, is that of the same denoiser; None unless both have one of the same shape.
        """
        check_time(t, x)
        t = as_time(t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        # not <=: at alpha = 0 an infinite `high` makes a nan, and is above everything
        inside = (sigma > self.low * alpha) & ~(sigma > self.high * alpha)
        first, second = (jax.eval_shape(lambda part=part: part.predict(x, t)).extra for part in self.parts)
        alike = type(first) is type(second) and jax.tree.leaves(first) == jax.tree.leaves(second)

        def one(which):
            prediction, own = predict_with(self.parts[which], x, t, memory[which])
            others = tuple(own if i == which else other for i, other in enumerate(memory))
            return prediction if alike else prediction._replace(extra=None), others

        return either(inside, x, lambda: one(0), lambda: one(1))


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


def interval_of_steps(schedule: Schedule, times: Array, start=0.0, stop=1.0) -> tuple[Array, Array]:
    """(low, high) of `interval` for guidance in the steps from the share `start` of all to the share `stop`.

    This is how diffusers states an interval. The levels lie between those of the steps on either side of the ends.

    >>> import jdiff
    >>> low, high = interval_of_steps(jdiff.EDM(), jdiff.grid.karras(jdiff.EDM(), 10), 0.2, 0.5)
    >>> f"{low:.2f} {high:.2f}"
    '2.52 30.18'

    Args:
        schedule: the schedule of the process.
        times: the grid of the sampler, (N,), descending; the last one, where `sample` denoises, counts as a step.
        start: the share before the first guided step, from 0 to 1.
        stop: the share before the first step that is no longer guided, from `start` to 1.

    Returns:
        (low, high), in units of sigma/alpha; 0 and infinite at the ends of the grid.

    Raises:
        ValueError: unless 0 <= start < stop <= 1, or if no step of the grid lies between them.
    """
    n = len(times)
    if not 0 <= start < stop <= 1:
        raise ValueError(f"interval_of_steps: expected shares 0 <= start < stop <= 1; got {start} and {stop}")
    first, end = int(start * n), int(stop * n)
    if first == end:
        raise ValueError(f"interval_of_steps: no step of {n} lies between the shares {start} and {stop}")
    between = 0.5 * (times[:-1] + times[1:])
    ratio = schedule.sigma(between) / schedule.alpha(between)
    return (ratio[end - 1] if end < n else jnp.zeros(())), (ratio[first - 1] if first else jnp.array(jnp.inf))
