"""What a solver is: an update rule between two times, (x_t, t, s) -> x_s with s < t.

A solver is a pytree of numbers with three pure methods, like an optax transformation. `plan` computes the coefficients
of all steps at once, `init` makes the state, and `step` receives the denoiser, not a prediction: it evaluates the
denoiser as often as it likes.
"""

from typing import Any, NamedTuple, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array, expand
from jdiff.core.checks import check_noun
from jdiff.core.keys import normal
from jdiff.core.pytrees import concrete
from jdiff.process.clock import Schedule
from jdiff.process.prediction import Denoise, Prediction

# Of alpha / sigma. Below it 1 / alpha would amplify rounding, and a step in sigma / alpha would have no end.
SMALLEST_ALPHA = 1e-4
ABILITIES = ("order", "stochastic", "plan", "init", "step")  # of a solver


class Now(NamedTuple):
    """One step of the grid: its index i, its times t and s < t, and its slice of the plan."""

    i: Array
    t: Array
    s: Array
    plan: Any


@runtime_checkable
class Solver(Protocol):
    """What `sample` asks of a solver. `order` and `stochastic` may be attributes of the class, fields or properties.

    A class of your own has these attributes and methods, and @jdiff.noun above it.
    """

    @property
    def order(self) -> int:
        """The order of convergence to the solution of the ODE, or of the SDE."""
        ...

    @property
    def stochastic(self) -> bool:
        """Whether it cannot run without a key."""
        ...

    def plan(self, schedule: Schedule, times: Array, n, breaks: Array | None = None) -> Any:
        """What each step needs, computed for all steps at once.

        Args:
            schedule: the schedule of the process.
            times: (N,), descending.
            n: how many of the times are used, N or a traced number below it.
            breaks: (N - 1,), the steps before which another solver has moved x. A solver that remembers earlier
                predictions begins anew there, because they belong to another path; the others ignore it.

        Returns:
            A pytree whose arrays have the leading axis N - 1.
        """
        ...

    def init(self, x: Array) -> Any:
        """The state before the first step; () for a solver without memory."""
        ...

    def step(
        self, denoise: Denoise, schedule: Schedule, x: Array, now: Now, state: Any, key
    ) -> tuple[Array, Any, Prediction]:
        """One step from x_t to x_s.

        Args:
            denoise: the denoiser.
            schedule: the schedule of the process.
            x: x_t, (B, ...).
            now: the step.
            state: what `init` or the step before returned.
            key: one key per sample, (B,), or the `Noise` of the step, or None.

        Returns:
            (x_s, state, prediction): x_s (B, ...), the new state, and the first prediction that the step made. A
            step with a loop makes this prediction before the loop.
        """
        ...


@runtime_checkable
class OneStepSolver(Solver, Protocol):
    """A solver without memory whose steps may go between any two times, not only those of a grid."""

    def between(self, schedule: Schedule, t: Array, s: Array) -> Any:
        """The plan of steps from t (N,) to s (N,), as `plan` returns it."""
        ...


@runtime_checkable
class RecallingSolver(Solver, Protocol):
    """A solver whose state changes what the denoiser sees, also at the last evaluation of `sample`."""

    def recall(self, denoise: Denoise, state: Any) -> Denoise:
        """The denoiser as the next evaluation is to see it."""
        ...


@runtime_checkable
class MixingSolver(Solver, Protocol):
    """A solver that may take x_0 and eps as two predictions of two minds, as CFG++ makes them."""

    @property
    def mixes(self) -> bool:
        """Whether it does: each of its steps is one sum of the x_0 and the eps of one prediction."""
        ...


def mixes(solver) -> bool:
    """Whether each step of a solver is one sum of the x_0 and the eps of one prediction."""
    return isinstance(solver, MixingSolver) and solver.mixes


# ---------------------------------------------------------------- what the families share: updates


class Mix(NamedTuple):
    """The coefficients of x_s = x0 * (x_0 hat) + eps * (eps hat) + noise * z, each (N - 1,)."""

    x0: Array
    eps: Array
    noise: Array


def mix(coefficients: Mix, prediction: Prediction, x: Array, key, scale=None) -> Array:
    """x_s = x0 * (x_0 hat) + eps * (eps hat) + noise * scale * z.

    Args:
        coefficients: those of one step, each of shape () or (B,).
        prediction: the prediction at x_t.
        x: x_t, (B, ...), whose shape and dtype x_s has.
        key: for z, as in `Solver.step`.
        scale: an array like x, or None for 1.

    Returns:
        x_s, (B, ...). Without a key it is nan where the noise is not 0.
    """
    noise = scaled_noise(coefficients.noise, x, key)
    if scale is not None:
        noise = noise * scale
    return expand(coefficients.x0, x) * prediction.x0 + expand(coefficients.eps, x) * prediction.eps + noise


def scaled_noise(scale, x: Array, key) -> Array:
    """scale * z with z ~ N(0, I) of the shape of x, and `scale` () or (B,).

    Without a key it is nan where `scale` is not 0: noise that a method needs is never left out silently.
    """
    scale = expand(scale, x)
    if key is None:
        return jnp.where(scale == 0, 0, jnp.nan).astype(x.dtype)
    return scale * normal(key, x.shape, x.dtype)


def nearly_noise(schedule: Schedule, t: Array) -> Array:
    """Whether alpha is so small beside sigma that nothing may be divided by it."""
    return schedule.alpha(t) < SMALLEST_ALPHA * schedule.sigma(t)


def steps_since_break(breaks: Array | None, count: int) -> Array:
    """How many earlier steps of the same path each of `count` steps has, (count,): those since the last break."""
    i = jnp.arange(count)
    return i if breaks is None else i - lax.cummax(jnp.where(breaks, i, 0))


# ---------------------------------------------------------------- what the families share: settings


def check_solver(name: str, solver) -> None:
    """Raise TypeError unless `solver`, which is called `name` where it was given, is one."""
    lacking = [ability for ability in ABILITIES if not hasattr(solver, ability)]
    if 0 < len(lacking) < len(ABILITIES) - 1 and not isinstance(solver, type):
        kind, missing = type(solver).__name__, " and ".join(lacking)
        raise TypeError(f"{name} is a {kind}, which lacks {missing}; see jdiff.solvers.Solver")
    check_noun(name, solver, Solver, "a solver, as solvers.DDIM()")


def check_plan(solver, plan, steps: int) -> None:
    """Raise ValueError unless each array of a plan has a row for each step."""
    for leaf in jax.tree.leaves(plan):
        if jnp.shape(leaf)[:1] != (steps,):
            raise ValueError(
                f"{type(solver).__name__}: plan made an array {jnp.shape(leaf)} for {steps} steps; expected {steps} "
                "rows, one for each pair of times, as alpha(times[1:])"
            )


def check_order(name: str, order, most: int | None = None, what: str = "order") -> None:
    """Raise ValueError unless `order`, or what else it is, is a whole number from 1 to `most`."""
    whole = isinstance(order, (int, np.integer)) and not isinstance(order, bool)
    if not whole or order < 1 or (most is not None and order > most):
        allowed = f"1 to {most}" if most else "1 or more"
        raise ValueError(f"{name}: {what} must be a whole number, {allowed}; got {order!r}")


def check_base(solver, base) -> None:
    """Raise ValueError unless `base`, the solver inside `solver`, is a deterministic one without memory."""
    name = type(solver).__name__
    if not isinstance(base, OneStepSolver):
        raise ValueError(f"{name}: {type(base).__name__} cannot step between free times; use Euler, Heun, RK4 or DPM2")
    if base.stochastic:
        raise ValueError(f"{name}: {type(base).__name__} draws noise of its own; use Euler, Heun, RK4 or DPM2")


def is_positive(value) -> bool:
    """Whether a number is known now to be positive somewhere: then its noise needs a key."""
    return value is not None and concrete(value) and bool((np.asarray(value) > 0).any())
