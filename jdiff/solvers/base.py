"""What a solver is: an update rule between two times, (x_t, t, s) -> x_s with s < t.

A solver is a pytree of numbers with three pure methods, like an optax transformation. `plan` computes the coefficients
of all steps at once, `init` the state, and `step` receives the denoiser, not a prediction: it evaluates it as often
as it likes. `order` is the order of convergence; `stochastic` says that it cannot run without a key.
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp

from jdiff.arrays import Array, Denoise, expand, normal
from jdiff.forward import Prediction
from jdiff.schedules import Schedule


class Now(NamedTuple):
    """One step of the grid: its index, from t to s, and its slice of the plan."""

    i: Array
    t: Array
    s: Array
    plan: Any


class Solver(Protocol):
    """What `sample` asks of a solver."""

    order: int
    stochastic: bool

    def plan(self, schedule: Schedule, times: Array, n) -> Any:
        """A pytree with leading axis N - 1: what each step needs, from times (N,) of which n count."""

    def init(self, x: Array) -> Any:
        """The state before the first step."""

    def step(self, denoise: Denoise, schedule: Schedule, x: Array, now: Now, state: Any, key) -> tuple[Array, Any]:
        """(x_s, state). `key`: one key per sample (B,), or None."""


class Mix(NamedTuple):
    """The coefficients of x_s = x0 * (x_0 hat) + eps * (eps hat) + noise * z, each (N - 1,)."""

    x0: Array
    eps: Array
    noise: Array


def mix(coefficients: Mix, prediction: Prediction, x: Array, key, scale=None) -> Array:
    """x_s from a prediction at x_t and fresh noise, the noise multiplied by `scale` (like x) if given.

    Without a key, noise that is asked for is nan, never left out.
    """
    noise = expand(coefficients.noise, x)
    if key is None:
        fresh = jnp.where(noise == 0, 0, jnp.nan).astype(x.dtype)
    else:
        fresh = noise * normal(key, x.shape, x.dtype)
    if scale is not None:
        fresh = fresh * scale
    return expand(coefficients.x0, x) * prediction.x0 + expand(coefficients.eps, x) * prediction.eps + fresh
