"""From a network to E[x_0 | x_t]: the only place that calls one."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdiff.arrays import Array, noun, static
from jdiff.conditioning import LogSNR
from jdiff.forward import Prediction
from jdiff.schedules import Schedule
from jdiff.targets import Target, solve


@noun
class Denoiser:
    """A network, its parameters and what its output means. `params`, `cond` and every number are leaves."""

    params: Any
    schedule: Schedule
    target: Target
    conditioning: Any
    cond: Any
    apply: Callable = static()
    learned_variance: bool = static(False)

    def __call__(self, x: Array, t) -> Array:
        """E[x_0 | x_t], (B, ...)."""
        return self.predict(x, t).x0

    def predict(self, x: Array, t) -> Prediction:
        """(E[x_0 | x_t], E[eps | x_t], extra); `extra` is the variance half of the output, or None."""
        out = run_network(self.apply, self.params, self.schedule, self.conditioning, x, t, self.cond)
        out, extra = split_variance(out, x, self.learned_variance)
        return Prediction(*solve(self.schedule, self.target, x, out, t), extra)


def denoiser(
    apply: Callable,
    params: Any,
    schedule: Schedule,
    target: Target,
    cond: Any = None,
    *,
    conditioning=LogSNR(),
    learned_variance: bool = False,
) -> Denoiser:
    """Turn a network `apply(params, x, label, cond) -> F` into a denoiser `(x, t) -> E[x_0 | x_t]`.

    `conditioning(schedule, x, t) -> (input, label (B,))` is what it was trained with. With `learned_variance` the last
    axis of F is twice x's, and its second half is handed on as `Prediction.extra`. Calling it raises ValueError if
    the network's output has not the shape that this asks for.
    """
    return Denoiser(params, schedule, target, conditioning, cond, apply, learned_variance)


def run_network(apply, params, schedule, conditioning, x, t, cond) -> Array:
    """The network's raw output for x_t, in the dtype of x."""
    shown, label = conditioning(schedule, x, t)
    return jnp.asarray(apply(params, shown.astype(x.dtype), label, cond)).astype(x.dtype)


def split_variance(out: Array, x: Array, learned_variance: bool) -> tuple[Array, Array | None]:
    """(F of x's shape, the variance half or None); ValueError if the output's shape is another."""
    expected = x.shape[:-1] + (2 * x.shape[-1],) if learned_variance else x.shape
    if out.shape != expected:
        raise ValueError(f"the network returned {out.shape} for an input of {x.shape}; expected {expected}")
    return tuple(jnp.split(out, 2, axis=-1)) if learned_variance else (out, None)
