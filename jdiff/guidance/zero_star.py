"""CFG-Zero*: guidance from the best multiple of the unconditional prediction, and no step at the highest noise."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, as_time, safe_divide
from jdiff.core.checks import check_time
from jdiff.core.pytrees import noun
from jdiff.denoisers.targets import Velocity, solve
from jdiff.guidance.base import Guidance, check_number, check_target, either, inner, value_of
from jdiff.guidance.branches import Branches, TwoBranches, branches
from jdiff.process.memory import predict_with
from jdiff.process.prediction import Denoise, Prediction

VELOCITY = Velocity()


@noun
class Projected(TwoBranches):
    """The extrapolation from that multiple of the unconditional prediction which is nearest to the conditional one."""

    branches: Branches
    target: Any = VELOCITY

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        c, u = predictions
        toward, away = (value_of(self.schedule, self.target, one, t) for one in (c, u))
        best = safe_divide(inner(toward, away), inner(away, away))
        return self.moved(c, (self.weight(x, t) - 1) * (toward - best * away), x, t, self.target)


@noun
class Zeroed(Guidance):
    """A denoiser whose prediction is 0 above a noise level: a step of the flow then moves nothing."""

    base: Guidance
    above: Number
    target: Any = VELOCITY

    @property
    def parts(self):
        return (self.base,)

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        check_time(t, x)
        t = as_time(t)

        def guided():
            prediction, own = predict_with(self.base, x, t, memory[0])
            return prediction, (own,)

        def zero():
            extra = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), jax.eval_shape(guided)[0].extra)
            return Prediction(*solve(self.schedule, self.target, x, jnp.zeros_like(x), t), extra), memory

        above = self.schedule.sigma(t) > self.above * self.schedule.alpha(t)
        return either(above, x, zero, guided)


def zero_star(
    conditional: Denoise | Callable,
    unconditional: Denoise | Callable,
    w,
    *,
    zero_above=None,
    target=VELOCITY,
    batched: bool = False,
) -> Projected | Zeroed:
    """CFG-Zero*:  v = s u + w (c - s u),  s = <c, u> / |u|^2 of each sample,  and v = 0 at the highest noise levels.

    c, u and v are velocities. s u is the multiple of u that is nearest to c.

    Args:
        conditional: c, a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        unconditional: u, a denoiser or a function (x, t) -> E[x_0 | x_t].
        w: the weight, as for `cfg`; 1 is the conditional model.
        zero_above: the noise level, in units of sigma/alpha, above which v is 0 and no network is called. For `Flow`,
            24 is the paper's first 4% of the time. None for nowhere.
        target: what c, u and v are; the paper's velocity, or another of `jdiff.targets`. None for x_0.
        batched: whether both are evaluated in one call, as for `cfg`.

    Returns:
        The guided denoiser; its `extra` is the conditional one's.

    Raises:
        ValueError: for a zero_above that is negative or no number, and as `cfg` does.

    Reference:
        Fan et al. 2025, arXiv:2503.18886, algorithm 1.
    """
    check_number("zero_star", "zero_above", zero_above, lambda a: a >= 0, "0 or more")
    check_target("zero_star", target)
    guided = Projected(branches("zero_star", conditional, unconditional, w, batched), target)
    return guided if zero_above is None else Zeroed(guided, zero_above, VELOCITY if target is None else target)
