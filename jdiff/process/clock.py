"""What a schedule is, and its physical coordinate: the log-SNR, log(alpha_t^2 / sigma_t^2)."""

import dataclasses
import functools
from typing import TYPE_CHECKING, Any, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, as_time, safe_log
from jdiff.core.inverse import bisect
from jdiff.core.pytrees import is_leaf


@runtime_checkable
class Schedule(Protocol):
    """A Gaussian noise schedule: x_t = alpha_t x_0 + sigma_t eps, with data at t = 0 and the log-SNR falling with t.

    A class of your own has `alpha` and `sigma`, and @jdiff.schedule above it; everything else has a default. Inherit
    from this class where type checkers should know. Derivatives (f, g^2, velocities, betas) are taken of the two
    methods by JAX.

    Attributes:
        t_min: the least time that the library uses by default, where the log-SNR is still finite.
        t_max: the time at which sampling starts.
        last_time: the last time at which the two methods mean anything; infinite where their formulas go on past t_max.
        bounded: whether the log-SNR has an end within the domain, so that the clock cannot be shifted. A bounded
            schedule is defined from t_min on, any other from 0 on.
        has_kinks: whether the derivatives of alpha and sigma jump somewhere, as those of a table do at its knots.
    """

    t_min: Number = 1e-3  # numbers of any kind, so that type checkers let a class override them by properties too
    t_max: Number = 1.0
    bounded: bool = False
    has_kinks: bool = False

    if TYPE_CHECKING:
        last_time: Number = 1.0

        def replace(self, **changes: Any) -> Self:  # as of every noun
            return self
    else:

        @property
        def last_time(self) -> float:
            """The schedule's own end; override where the formulas go on."""
            return self.t_max

    def alpha(self, t: Array) -> Array:
        """The scale of the data at t, of the shape of t."""
        ...

    def sigma(self, t: Array) -> Array:
        """The standard deviation of the noise at t, of the shape of t."""
        ...

    def time_at(self, alpha, sigma) -> Array:
        """The t whose alpha_t : sigma_t is alpha : sigma, of their shape.

        The default is a bisection over [0, 1], with the derivative of the implicit function. Override it where there is
        a closed form. Only the ratio matters, and alpha may be 0.
        """
        check_schedule(self)
        value = 2 * (safe_log(as_time(alpha)) - safe_log(as_time(sigma)))
        return bisect(log_snr, self, value)


ABILITIES = ("alpha", "sigma", "time_at", "t_min", "t_max", "last_time", "bounded", "has_kinks")


@functools.cache
def _has_all(kind: type) -> bool:
    """Whether the objects of a class have all abilities, which is found out without computing a property."""
    fields = {field.name for field in dataclasses.fields(kind)} if dataclasses.is_dataclass(kind) else set()
    return all(name in fields or hasattr(kind, name) for name in ABILITIES)


def check_schedule(schedule) -> None:
    """Raise TypeError for an object that cannot be asked what the library asks of a schedule."""
    if isinstance(schedule, type):
        raise TypeError(
            f"the schedule is the class {schedule.__name__}; give one of its objects: {schedule.__name__}()"
        )
    kind: Any = type(schedule)
    if _has_all(kind) and not is_leaf(schedule):
        return
    lacking = [name for name in ("alpha", "sigma") if not hasattr(schedule, name)]
    if lacking:
        raise TypeError(
            f"{kind.__name__} is no schedule: it lacks {' and '.join(lacking)}; expected an object as jdiff.VP(), or "
            "one of your own class under @jdiff.schedule"
        )
    raise TypeError(f"{kind.__name__} is no schedule yet: decorate the class with @jdiff.schedule")


def log_snr(schedule: Schedule, t) -> Array:
    """log(alpha_t^2 / sigma_t^2).

    Args:
        schedule: any schedule.
        t: times, of any shape.

    Returns:
        The log-SNR, of the shape of t; +-92 with derivative 0 where sigma or alpha is 0.
    """
    check_schedule(schedule)
    t = as_time(t)
    return 2 * (safe_log(schedule.alpha(t)) - safe_log(schedule.sigma(t)))


def time_of(schedule: Schedule, log_snr) -> Array:
    """The t with log_snr(schedule, t) = log_snr: the inverse of `log_snr`, differentiable in both arguments.

    >>> import jdiff
    >>> float(time_of(jdiff.Flow(), 0.0))  # as much signal as noise
    0.5

    Args:
        schedule: any schedule; its `time_at` is a closed form or a bisection.
        log_snr: values of any shape; beyond +-80, where float32's exponent ends, nothing is told apart.

    Returns:
        Times, of the shape of log_snr.
    """
    check_schedule(schedule)
    value = jnp.clip(as_time(log_snr), -80, 80)
    return schedule.time_at(jnp.sqrt(jax.nn.sigmoid(value)), jnp.sqrt(jax.nn.sigmoid(-value)))
