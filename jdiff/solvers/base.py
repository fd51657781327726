"""What a solver is: an update rule between two times, (x_t, t, s) -> x_s with s < t.

A solver is a pytree of numbers with three pure methods, like an optax transformation. `plan` computes the coefficients
of all steps at once, `init` the state, and `step` receives the denoiser, not a prediction: it evaluates it as often
as it likes. `order` is the order of convergence; `stochastic` says that it cannot run without a key.
"""

from typing import Any, NamedTuple, Protocol

import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array, Denoise, expand
from jdiff.core.checks import check_range
from jdiff.core.keys import normal
from jdiff.core.pytrees import concrete
from jdiff.process.forward import Prediction
from jdiff.process.schedules import Schedule

LEAST_ALPHA = 1e-4  # of sigma: below it, 1/alpha would amplify rounding, and a step in sigma/alpha is endless


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

    def plan(self, schedule: Schedule, times: Array, n, breaks: Array | None = None) -> Any:
        """A pytree with leading axis N - 1: what each step needs, from times (N,) of which n count.

        `breaks`, (N - 1,): the steps before which another solver has moved x, so that the steps before it belong to
        another path. A solver that remembers earlier predictions begins anew there; the others ignore it.
        """

    def init(self, x: Array) -> Any:
        """The state before the first step."""

    def step(self, denoise: Denoise, schedule: Schedule, x: Array, now: Now, state: Any, key) -> tuple[Array, Any]:
        """(x_s, state). `key`: one key per sample (B,), or None."""


def steps_before(breaks: Array | None, count: int) -> Array:
    """How many earlier steps of the same path each of `count` steps has, (count,): those since the last break."""
    i = jnp.arange(count)
    return i if breaks is None else i - lax.cummax(jnp.where(breaks, i, 0))


def nearly_noise(schedule: Schedule, t: Array) -> Array:
    """Whether alpha is so small beside sigma that nothing may be divided by it."""
    return schedule.alpha(t) < LEAST_ALPHA * schedule.sigma(t)


def check_at_least(solver, least: float, /, **numbers) -> None:
    """Raise ValueError unless each number, where it is known now, is `least` or more, and finite."""
    check_range(solver, least, **numbers)


def check_order(name: str, order, most: int | None = None) -> None:
    """Raise ValueError unless `order` is a whole number from 1 to `most`."""
    whole = isinstance(order, (int, np.integer)) and not isinstance(order, bool)
    if not whole or order < 1 or (most is not None and order > most):
        upto = f"1 to {most}" if most else "1 or more"
        raise ValueError(f"{name}: order must be a whole number, {upto}; got {order!r}")


def is_positive(value) -> bool:
    """Whether a number is known now to be positive somewhere: then its noise needs a key."""
    return value is not None and concrete(value) and bool((np.asarray(value) > 0).any())


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
