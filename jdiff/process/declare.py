"""A schedule of a user's own: a class with `alpha` and `sigma`, made what the library asks of a schedule."""

from typing import Any, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.pytrees import check_class, known, noun, per_sample, static
from jdiff.process.clock import ABILITIES, Schedule

T = TypeVar("T")
POINTS = 9  # at which the two methods are tried
METHODS = "a schedule has the methods alpha(self, t) and sigma(self, t)"


@dataclass_transform(frozen_default=True, field_specifiers=(static, per_sample))
def schedule(cls: type[T]) -> type[T]:
    """Make a schedule of a class with `alpha(self, t)` and `sigma(self, t)`.

        x_t = alpha_t x_0 + sigma_t eps, with data at t = 0 and the log-SNR falling with t

    >>> import jdiff
    >>> @jdiff.schedule
    ... class Power:
    ...     power: float = 2.0
    ...     def alpha(self, t):
    ...         return 1 - t**self.power
    ...     def sigma(self, t):
    ...         return t**self.power
    >>> Power(3), isinstance(Power(), jdiff.Schedule)
    (Power(power=3.0), True)

    The class becomes a `noun`, whose fields are its numbers. What else `Schedule` has is taken from there: the domain
    from t_min = 0.001 to t_max = 1, `time_at` by bisection. A class says otherwise by an attribute, as `t_min = 0.0`,
    or by a method of that name. For type checkers, which do not see this, let the class inherit from `jdiff.Schedule`.

    Each object is tried at a few times when it is made, if its numbers are known then.

    Args:
        cls: the class. `t` has any shape, and both methods return arrays of that shape.

    Returns:
        The same class.

    Raises:
        TypeError: for a class without the two methods or one that `noun` refuses. When an object is made: for methods
            that JAX cannot trace.
        ValueError: when an object is made: for values that are not finite or have not the shape of t, for alpha < 0,
            for sigma <= 0, for a log-SNR that does not fall, and for a `time_at` that is not its inverse.
    """
    check_class("schedule", cls)
    kind: Any = cls
    for name in ("alpha", "sigma"):
        method = getattr(kind, name, None)
        if not callable(method) or method is getattr(Schedule, name):
            raise TypeError(f"{kind.__name__} has no method {name}; {METHODS}")
    for name in ABILITIES:
        if not hasattr(kind, name) and name not in kind.__dict__.get("__annotations__", {}):
            setattr(kind, name, Schedule.__dict__[name])
    own_check = getattr(kind, "check", None)

    def check(self):
        if own_check:
            own_check(self)
        if known(self):
            _try(self)

    kind.check = check
    return noun(kind)


def _try(schedule) -> None:
    """Ask for alpha and sigma at a few times, and raise for what no schedule answers."""
    name, low, high = type(schedule).__name__, schedule.t_min, schedule.t_max
    if not (known(low, high) and np.ndim(low) == np.ndim(high) == 0):
        return
    if not 0 <= low < high <= 1:
        raise ValueError(f"{name}: times lie between 0 and 1, but t_min = {low} and t_max = {high}")
    with jax.ensure_compile_time_eval():
        t = jnp.linspace(low, high, POINTS)
        for what in ("alpha", "sigma"):
            for times in (t[0], t):
                shape = _shape(f"{name}: {what}", getattr(schedule, what), times)
                if shape == times.shape:
                    continue
                if shape in {np.shape(leaf) for leaf in jax.tree.leaves(schedule)} - {()}:
                    return  # numbers of several schedules, for a vmap
                raise ValueError(
                    f"{name}: {what}(t) has shape {shape} for t of shape {times.shape}; expected the shape of t: a "
                    "constant c is jnp.full_like(t, c)"
                )
        alpha, sigma = np.asarray(schedule.alpha(t), np.float64), np.asarray(schedule.sigma(t), np.float64)
    tried = np.asarray(t, np.float64)
    _check_values(name, tried, alpha, sigma)
    if type(schedule).time_at is not Schedule.time_at:
        with jax.ensure_compile_time_eval():
            back = np.asarray(schedule.time_at(jnp.asarray(alpha, t.dtype), jnp.asarray(sigma, t.dtype)))
        i = int(np.argmax(~(np.abs(back - tried) < 1e-2)))
        if not abs(back[i] - tried[i]) < 1e-2:
            raise ValueError(f"{name}: time_at gives {back[i]:.3g} for alpha and sigma of t = {tried[i]:.3g}")


def _shape(what: str, method, t) -> Any:
    """The shape of what a method returns, by tracing it, as every verb does under `jax.jit`."""
    try:
        out = jax.eval_shape(method, t)
    except Exception as error:
        reason = str(error).strip().partition("\n")[0]
        raise TypeError(
            f"{what} fails for an array t that JAX traces ({type(error).__name__}: {reason:.100}); "
            "use jax.numpy, and jnp.where for branches"
        ) from error
    return getattr(out, "shape", None)


def _check_values(name: str, t, alpha, sigma) -> None:
    for what, values in (("alpha", alpha), ("sigma", sigma)):
        wrong = ~(np.isfinite(values) & (values >= 0))
        if wrong.any():
            i = int(np.argmax(wrong))
            cure = "; if that is rounding, take jnp.maximum(..., 0)" if -1e-5 < values[i] < 0 else ""
            raise ValueError(f"{name}: {what}({t[i]:.3g}) = {values[i]:.3g}; expected a finite number, 0 or more{cure}")
    with np.errstate(divide="ignore", invalid="ignore"):
        log_snr = 2 * (np.log(alpha) - np.log(sigma))
    rises = ~(np.diff(log_snr) < 0)
    if rises.any():
        i = int(np.argmax(rises))
        raise ValueError(
            f"{name}: log(alpha^2 / sigma^2) must fall from t = 0, data, to t = 1, noise; it is {log_snr[i]:.3g} at "
            f"t = {t[i]:.3g} and {log_snr[i + 1]:.3g} at t = {t[i + 1]:.3g}"
        )
    if not sigma[0] > 0:
        raise ValueError(f"{name}: sigma is 0 at t_min = {t[0]:g}, where it must be more than 0; set t_min = 0.001")
