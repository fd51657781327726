"""Adaptive projected guidance: classifier-free guidance without what only makes the prediction larger."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, Number, safe_divide
from jdiff.core.pytrees import concrete, noun
from jdiff.guidance.base import check_number, check_target, inner, norm, value_of
from jdiff.guidance.branches import Branches, TwoBranches, branches
from jdiff.process.prediction import Denoise, Prediction


@noun
class ProjectedUpdate(TwoBranches):
    """The conditional prediction, and a projected, limited, averaged difference from the unconditional one.

    `momentum` is None for no average: there is then no memory.
    """

    branches: Branches
    parallel: Number = 0.0
    momentum: Number | None = None
    limit: Number | None = None
    target: Any = None  # a Target, or None

    def memory(self, x: Array) -> Any:
        """The memories of the parts, and the average of the differences, 0 before the first step."""
        average = () if self.momentum is None else jnp.zeros_like(x)
        return super().memory(x), average

    def predict_all(self, x: Array, t, memory: Any) -> tuple[Prediction, tuple[Prediction, ...], Any]:
        inside, average = memory
        (c, u), inside = self.ask(x, t, inside)
        toward, away = (value_of(self.schedule, self.target, one, t) for one in (c, u))
        difference = toward - away
        if self.momentum is not None:
            average = difference = (difference + self.momentum * average).astype(x.dtype)
        if self.limit is not None:
            size = norm(difference)
            difference = difference * jnp.where(size > self.limit, safe_divide(self.limit, size), 1)
        along = safe_divide(inner(difference, toward), inner(toward, toward)) * toward
        change = difference + (self.parallel - 1) * along
        guided = self.moved(c, (self.weight(x, t) - 1) * change, x, t, self.target)
        return guided, (c, u), (inside, average)


def apg(
    conditional: Denoise | Callable,
    unconditional: Denoise | Callable,
    w,
    *,
    parallel=0.0,
    momentum=0.0,
    limit=None,
    target=None,
    batched: bool = False,
) -> ProjectedUpdate:
    """Adaptive projected guidance: the part of the difference along the conditional prediction is taken out.

        d_i = c - u + momentum d_(i-1),    d = d_i min(1, limit / |d_i|),    p = (<d, c> / <c, c>) c
        x_0 = c + (w - 1) (d - p + parallel p)

    with <a, b> over all numbers of a sample, and i the step. The part along c makes colours too strong at large
    weights. With the defaults for the other two, parallel = 1 is `cfg`.

    Args:
        conditional: c, a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        unconditional: u, a denoiser or a function (x, t) -> E[x_0 | x_t].
        w: the weight, as for `cfg`; 1 is the conditional model.
        parallel: how much of the part along c is kept, the paper's eta; 0 is the paper's value.
        momentum: the weight of the steps before, above -1 and below 1; the paper's are from -0.75 to -0.5. 0 is none,
            and nothing is then carried from step to step.
        limit: the largest norm of d, positive, the paper's r: 2.5 to 15 for its latents. None for no limit.
        target: what c and u are: None for x_0, as in the paper, or one of `jdiff.targets`.
        batched: whether both are evaluated in one call, as for `cfg`.

    Returns:
        The guided denoiser; its `extra` is the conditional one's. With momentum `sample` carries d from step to step.
        All evaluations of a step then see the d of the step before, and the first of them makes the next one.

    Raises:
        ValueError: for a number outside these ranges, and as `cfg` does.

    Reference:
        Sadat et al. 2024, arXiv:2410.02416, section 5 and algorithm 1.
    """
    check_number("apg", "parallel", parallel, np.isfinite, "finite")
    check_number("apg", "momentum", momentum, lambda a: -1 < a < 1, "above -1 and below 1")
    check_number("apg", "limit", limit, lambda a: a > 0, "positive")
    check_target("apg", target)
    momentum = None if concrete(momentum) and momentum == 0 else momentum
    return ProjectedUpdate(branches("apg", conditional, unconditional, w, batched), parallel, momentum, limit, target)
