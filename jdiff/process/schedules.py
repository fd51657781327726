"""The noise schedules of the literature: x_t = alpha_t x_0 + sigma_t eps, with t in [0, 1] and data at t = 0.

Each is a pytree of its numbers with the methods of `clock.Schedule`. `t` has any shape.
"""

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Number, as_time
from jdiff.core.checks import check_ends, check_positive, check_range
from jdiff.core.pytrees import noun
from jdiff.process.clock import Schedule


@noun
class VP(Schedule):
    """Variance preserving, the limit of DDPM: alpha^2 = exp(-B), sigma^2 = 1 - exp(-B), with B = int_0^t beta.

    beta_t = beta_min + t (beta_max - beta_min), constant where the two are equal.

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.

    Reference:
        Song et al. 2021, arXiv:2011.13456, eq. 11 and 32.
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0

    def check(self):
        check_ends(self, may_be_equal=True, beta_min=self.beta_min, beta_max=self.beta_max)

    def alpha(self, t):
        return jnp.exp(-0.5 * _beta_integral(self, t))

    def sigma(self, t):
        return jnp.sqrt(-jnp.expm1(-_beta_integral(self, t)))  # expm1: 1 - exp(-B) has no digits left near t = 0

    def time_at(self, alpha, sigma):
        return _invert_beta_integral(self, jax.nn.softplus(2 * (jnp.log(sigma) - jnp.log(alpha))))


@noun
class SubVP(Schedule):
    """sub-VP: alpha as in `VP`, sigma = 1 - alpha^2.

    Args:
        beta_min: beta at t = 0.
        beta_max: beta at t = 1.

    Raises:
        ValueError: unless 0 < beta_min <= beta_max.

    Reference:
        Song et al. 2021, arXiv:2011.13456, eq. 29.
    """

    beta_min: Number = 0.1
    beta_max: Number = 20.0

    def check(self):
        check_ends(self, may_be_equal=True, beta_min=self.beta_min, beta_max=self.beta_max)

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
class VE(Schedule):
    """Variance exploding: alpha = 1, sigma = sigma_min (sigma_max / sigma_min)^t; SMLD as N grows.

    It is defined from t = 0, and goes on past t = 1.

    Args:
        sigma_min: sigma at t = 0.
        sigma_max: sigma at t = 1.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max.

    Reference:
        Song & Ermon 2019, arXiv:1907.05600; Song et al. 2021, arXiv:2011.13456, eq. 30.
    """

    sigma_min: Number = 0.01
    sigma_max: Number = 50.0
    t_min = 0.0
    last_time = float("inf")
    bounded = True

    def check(self):
        check_ends(self, sigma_min=self.sigma_min, sigma_max=self.sigma_max)

    def alpha(self, t):
        return jnp.ones_like(as_time(t))

    def sigma(self, t):
        return self.sigma_min * jnp.exp(t * _log_range(self))

    def time_at(self, alpha, sigma):
        return (jnp.log(sigma) - jnp.log(alpha) - jnp.log(self.sigma_min)) / _log_range(self)


def _log_range(schedule):
    return jnp.log(schedule.sigma_max) - jnp.log(schedule.sigma_min)


@noun
class EDM(Schedule):
    """EDM: alpha = 1, and a uniform grid in t is the rho-grid in sigma.

    sigma = (sigma_min^(1/rho) + t (sigma_max^(1/rho) - sigma_min^(1/rho)))^rho. It is defined from t = 0, and goes on
    past t = 1.

    Args:
        sigma_min: sigma at t = 0.
        sigma_max: sigma at t = 1.
        rho: the exponent, from 0.1 to 100.

    Raises:
        ValueError: unless 0 < sigma_min < sigma_max and rho is in its range.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """

    sigma_min: Number = 0.002
    sigma_max: Number = 80.0
    rho: Number = 7.0
    t_min = 0.0
    last_time = float("inf")
    bounded = True

    def check(self):
        check_ends(self, sigma_min=self.sigma_min, sigma_max=self.sigma_max)
        check_positive(self, rho=self.rho)
        check_range(self, 0.1, 100, rho=self.rho)  # beyond, the powers leave float32 or its digits

    def _roots(self):
        return jnp.power(self.sigma_min, 1 / self.rho), jnp.power(self.sigma_max, 1 / self.rho)

    def alpha(self, t):
        return jnp.ones_like(as_time(t))

    def sigma(self, t):
        low, high = self._roots()
        return (low + t * (high - low)) ** self.rho

    def time_at(self, alpha, sigma):
        low, high = self._roots()
        return ((sigma / alpha) ** (1 / self.rho) - low) / (high - low)


@noun
class Cosine(Schedule):
    """alpha = cos(pi t / 2), sigma = sin(pi t / 2), so that alpha_1 is exactly 0.

    Reference:
        Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17, without its offset, which `betas.cosine` has.
    """

    def alpha(self, t):
        return jnp.sin(0.5 * jnp.pi * (1 - t))  # float32 cos(pi/2) is -4.4e-8: a negative alpha

    def sigma(self, t):
        return jnp.sin(0.5 * jnp.pi * t)

    def time_at(self, alpha, sigma):
        return jnp.arctan2(sigma, alpha) * (2 / jnp.pi)


@noun
class Flow(Schedule):
    """Rectified flow, the conditional optimal-transport path: alpha = 1 - t, sigma = t.

    Reference:
        Liu et al. 2022, arXiv:2209.03003; Lipman et al. 2022, arXiv:2210.02747, whose time runs the other way.
    """

    def alpha(self, t):
        return 1 - as_time(t)

    def sigma(self, t):
        return as_time(t)

    def time_at(self, alpha, sigma):
        return sigma / (alpha + sigma)
