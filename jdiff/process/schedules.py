"""Gaussian noise schedules: x_t = alpha_t x_0 + sigma_t eps, with t in [0, 1] and data at t = 0.

A schedule is a pytree of its numbers with two pure methods, `alpha(t)` and `sigma(t)`, and its domain
`[t_min, t_max]`. log(alpha_t^2 / sigma_t^2) must fall with t. `t` has any shape. Everything else (f, g^2,
velocities, betas) is derived from the two methods elsewhere. A schedule may also invert itself in closed form,
`time_at(alpha, sigma)`: the t whose alpha_t : sigma_t is alpha : sigma; without it `time_of` bisects.
"""

from typing import Protocol

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array, Number, as_time, safe_log
from jdiff.core.checks import LARGEST, check_range
from jdiff.core.pytrees import concrete, noun, vary_as


class Schedule(Protocol):
    """What the verbs of this library ask of a schedule."""

    t_min: float
    t_max: float

    def alpha(self, t: Array) -> Array: ...
    def sigma(self, t: Array) -> Array: ...


def _positive(schedule, **numbers) -> None:
    for name, value in numbers.items():
        if concrete(value) and not ((np.asarray(value) > 0) & (np.asarray(value) <= LARGEST)).all():
            raise ValueError(f"{type(schedule).__name__}: {name} must be positive, at most {LARGEST:g}, got {value}")


def _check_range(schedule, low: str, high: str, may_be_equal: bool = False) -> None:
    """Numbers of a range must be positive and in order; traced ones are the caller's business."""
    a, b = getattr(schedule, low), getattr(schedule, high)
    _positive(schedule, **{low: a, high: b})
    if not concrete(a, b):
        return
    in_order = np.asarray(a) <= np.asarray(b) if may_be_equal else np.asarray(a) < np.asarray(b)
    if not in_order.all():
        equal = " or equal to it" if may_be_equal else ""
        raise ValueError(f"{type(schedule).__name__}: {low} must be below {high}{equal}, got {a} and {b}")


@noun
class VP:
    """Variance preserving, the limit of DDPM: alpha^2 = exp(-B), sigma^2 = 1 - exp(-B), B = int_0^t beta.

    beta_t = beta_min + t (beta_max - beta_min), constant where the two are equal.  Song et al. 2021, arXiv:2011.13456,
    eq. 11 and 32. Raises ValueError unless 0 < beta_min <= beta_max.
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    t_min = 1e-3
    t_max = 1.0

    def check(self):
        _check_range(self, "beta_min", "beta_max", may_be_equal=True)

    def alpha(self, t):
        return jnp.exp(-0.5 * _beta_integral(self, t))

    def sigma(self, t):
        return jnp.sqrt(-jnp.expm1(-_beta_integral(self, t)))  # expm1: 1 - exp(-B) has no digits left near t = 0

    def time_at(self, alpha, sigma):
        return _invert_beta_integral(self, jax.nn.softplus(2 * (jnp.log(sigma) - jnp.log(alpha))))


@noun
class SubVP:
    """sub-VP: alpha as in VP, sigma = 1 - alpha^2.  Song et al. 2021, arXiv:2011.13456, eq. 29.

    Raises ValueError unless 0 < beta_min <= beta_max.
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0
    t_min = 1e-3
    t_max = 1.0

    def check(self):
        _check_range(self, "beta_min", "beta_max", may_be_equal=True)

    def alpha(self, t):
        return jnp.exp(-0.5 * _beta_integral(self, t))

    def sigma(self, t):
        return -jnp.expm1(-_beta_integral(self, t))

    def time_at(self, alpha, sigma):
        # sigma/alpha = (1 - a^2)/a = 2 sinh(B/2)
        return _invert_beta_integral(self, 2 * jnp.arcsinh(0.5 * sigma / alpha))


def _beta_integral(schedule, t):
    """B_t = int_0^t beta = beta_min t + (beta_max - beta_min) t^2 / 2."""
    return schedule.beta_min * t + 0.5 * (schedule.beta_max - schedule.beta_min) * t**2


def _invert_beta_integral(schedule, b):
    """The t >= 0 with B_t = b, in the form of the quadratic's root that does not cancel."""
    low, rise = schedule.beta_min, schedule.beta_max - schedule.beta_min
    return 2 * b / (low + jnp.sqrt(low**2 + 2 * rise * b))


@noun
class VE:
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t; SMLD as N grows.

    Song & Ermon 2019, arXiv:1907.05600; Song et al. 2021, arXiv:2011.13456, eq. 30. Defined from t = 0, and
    continues past t = 1.
    """

    sigma_min: Number = 0.01
    sigma_max: Number = 50.0
    t_min = 0.0
    t_max = 1.0

    def check(self):
        _check_range(self, "sigma_min", "sigma_max")

    def alpha(self, t):
        return jnp.ones_like(as_time(t))

    def sigma(self, t):
        return self.sigma_min * jnp.exp(t * _log_range(self))

    def time_at(self, alpha, sigma):
        return (jnp.log(sigma) - jnp.log(alpha) - jnp.log(self.sigma_min)) / _log_range(self)


def _log_range(schedule):
    return jnp.log(schedule.sigma_max) - jnp.log(schedule.sigma_min)


@noun
class EDM:
    """EDM: alpha = 1, and a uniform grid in t *is* the rho-grid in sigma.

    sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho.
    Karras et al. 2022, arXiv:2206.00364, eq. 5. Defined from t = 0, and continues past t = 1.
    """

    sigma_min: Number = 0.002
    sigma_max: Number = 80.0
    rho: Number = 7.0
    t_min = 0.0
    t_max = 1.0

    def check(self):
        _check_range(self, "sigma_min", "sigma_max")
        _positive(self, rho=self.rho)
        check_range(self, 0.1, 100, rho=self.rho)  # beyond, the powers leave float32 or its digits

    def _ends(self):
        return jnp.power(self.sigma_min, 1 / self.rho), jnp.power(self.sigma_max, 1 / self.rho)

    def alpha(self, t):
        return jnp.ones_like(as_time(t))

    def sigma(self, t):
        low, high = self._ends()
        return (low + t * (high - low)) ** self.rho

    def time_at(self, alpha, sigma):
        low, high = self._ends()
        return ((sigma / alpha) ** (1 / self.rho) - low) / (high - low)


@noun
class Cosine:
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), so that alpha_1 is exactly 0.

    Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17, without its offset (`betas.cosine` has it).
    """

    t_min = 1e-3
    t_max = 1.0

    def alpha(self, t):
        return jnp.sin(0.5 * jnp.pi * (1 - t))  # float32 cos(pi/2) is -4.4e-8: a negative alpha

    def sigma(self, t):
        return jnp.sin(0.5 * jnp.pi * t)

    def time_at(self, alpha, sigma):
        return jnp.arctan2(sigma, alpha) * (2 / jnp.pi)


@noun
class Flow:
    """Rectified flow, the conditional optimal-transport path: alpha = 1 - t, sigma = t.

    Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747 (whose time runs the other way).
    """

    t_min = 1e-3
    t_max = 1.0

    def alpha(self, t):
        return 1 - as_time(t)

    def sigma(self, t):
        return as_time(t)

    def time_at(self, alpha, sigma):
        return sigma / (alpha + sigma)


@noun
class Discrete:
    """A DDPM table as a schedule: knots t_k = k/T for k = 1..T, variance preserving.

    log(sigma^2 / alpha^2) is kept, (T,), and is linear in t between the knots. Outside [1/T, 1] it is constant.
    With `exact` the last knot has alpha = 0 exactly. Made by `jdiff.discrete(betas)`.
    """

    log_nsr: Array
    exact: Number = 0.0

    @property
    def t_min(self):
        return 1 / self.log_nsr.shape[-1]

    t_max = 1.0

    def _read(self, t):
        t = as_time(t)
        T = self.log_nsr.shape[-1]
        place = t * T - 1
        # t moves at the end knots as it does inside, also where rounding puts them outside: a clip halves or kills that
        near = (place > -0.01) & (place < T - 0.99)
        moving = jnp.where(near, place - lax.stop_gradient(place), 0)
        place = lax.stop_gradient(jnp.clip(place, 0, T - 1)) + moving
        low = jnp.clip(jnp.floor(place).astype(int), 0, max(T - 2, 0))
        table = self.log_nsr.astype(t.dtype)
        below, above = table[low], table[jnp.minimum(low + 1, T - 1)]
        return below + (place - low.astype(t.dtype)) * (above - below), (t >= 1) & (self.exact > 0)

    def alpha(self, t):
        value, last = self._read(t)
        return jnp.where(last, 0, jnp.sqrt(jax.nn.sigmoid(-value)))

    def sigma(self, t):
        value, last = self._read(t)
        return jnp.where(last, 1, jnp.sqrt(jax.nn.sigmoid(value)))

    def time_at(self, alpha, sigma):
        value = 2 * (safe_log(sigma) - safe_log(alpha))
        table = self.log_nsr.astype(value.dtype)
        T = table.shape[-1]
        return jnp.interp(value, table, jnp.arange(1, T + 1, dtype=value.dtype) / T)


@noun
class Shifted:
    """The same path on another clock: log_snr(t) is the schedule's own minus 2 log(shift).

    For `Flow`, t becomes shift t / (1 + (shift - 1) t).  Hoogeboom et al. 2023, arXiv:2301.11093, eq. 6;
    Esser et al. 2024, arXiv:2403.03206, eq. 23. Raises ValueError on bounded schedules (VE, EDM, Discrete),
    where the shifted log-SNR would leave the range.
    """

    schedule: Schedule
    shift: Number = 3.0

    def check(self):
        if isinstance(self.schedule, (VE, EDM, Discrete)):
            name = type(self.schedule).__name__
            raise ValueError(f"Shifted: {name} is bounded in log-SNR; shift VP, SubVP, Cosine or Flow")
        _positive(self, shift=self.shift)

    @property
    def t_min(self):
        return self.schedule.t_min

    @property
    def t_max(self):
        return self.schedule.t_max

    def _clock(self, t):
        t = as_time(t)
        return time_at(self.schedule, self.schedule.alpha(t), self.shift * self.schedule.sigma(t))

    def alpha(self, t):
        return self.schedule.alpha(self._clock(t))

    def sigma(self, t):
        return self.schedule.sigma(self._clock(t))

    def time_at(self, alpha, sigma):
        return time_at(self.schedule, alpha, sigma / self.shift)


# ---------------------------------------------------------------- the physical coordinate


def log_snr(schedule: Schedule, t) -> Array:
    """log(alpha_t^2 / sigma_t^2), shape of `t`; +-92 with derivative 0 where sigma or alpha is 0."""
    t = as_time(t)
    return 2 * (safe_log(schedule.alpha(t)) - safe_log(schedule.sigma(t)))


def time_of(schedule: Schedule, log_snr) -> Array:
    """The t with log_snr(schedule, t) = log_snr, same shape: differentiable in both arguments.

    >>> float(time_of(Flow(), 0.0))  # as much signal as noise
    0.5

    Closed form where the schedule has one, else bisection over [0, 1] with the derivative of the implicit function.
    """
    value = jnp.clip(as_time(log_snr), -80, 80)  # where float32's exponent ends; nothing is told apart beyond
    return time_at(schedule, jnp.sqrt(jax.nn.sigmoid(value)), jnp.sqrt(jax.nn.sigmoid(-value)))


def time_at(schedule: Schedule, alpha, sigma) -> Array:
    """The t whose alpha_t : sigma_t is alpha : sigma (homogeneous: alpha may be 0)."""
    closed_form = getattr(schedule, "time_at", None)
    if closed_form is not None:
        return closed_form(alpha, sigma)
    return _bisect(schedule, 2 * (safe_log(alpha) - safe_log(sigma)))


def last_time(schedule: Schedule) -> float:
    """Where a schedule can no longer be followed: nowhere for VE and EDM, whose formulas go on past t = 1."""
    return float("inf") if isinstance(schedule, (VE, EDM)) else schedule.t_max


@jax.custom_jvp
def _bisect(schedule, value):
    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        noisier = log_snr(schedule, middle) < value
        return jnp.where(noisier, low, middle), jnp.where(noisier, middle, high)

    steps = jnp.finfo(value.dtype).nmant + 7  # down to half a unit in the last place of t = 2^-7
    ends = vary_as((jnp.zeros_like(value), jnp.ones_like(value)), schedule)
    low, high = lax.fori_loop(0, steps, halve, ends)
    return 0.5 * (low + high)


@_bisect.defjvp
def _bisect_jvp(primals, tangents):
    """From log_snr(schedule, t) = value:  dt = (dvalue - d_schedule log_snr) / (d log_snr / dt)."""
    schedule, value = primals
    d_schedule, d_value = tangents
    t = _bisect(schedule, value)
    slope = jax.jvp(lambda t: log_snr(schedule, t), (t,), (jnp.ones_like(t),))[1]
    moved = jax.jvp(lambda schedule: log_snr(schedule, t), (schedule,), (d_schedule,))[1]
    return t, (d_value - moved) / slope
