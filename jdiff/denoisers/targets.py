"""What the network regresses: one row (a_t, b_t) of the (x_0, eps) plane,  F* = a_t x_0 + b_t eps.

With the schedule the row makes an invertible map (x_t, F) = [[alpha, sigma], [a, b]] (x_0, eps), so every conversion
between parameterisations is the same 2x2 solve. Solved for x_0 it reads, in Karras' words, x_0 = c_skip x_t + c_out F.
"""

from typing import NamedTuple, Protocol, runtime_checkable

import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, as_time, expand
from jdiff.core.checks import SMALLEST, check_floating, check_range, check_same_shape, check_time
from jdiff.core.pytrees import Noun, noun
from jdiff.process.clock import Schedule, check_schedule
from jdiff.process.sde import derivative


class Row(NamedTuple):
    """The coefficients of F* = a x_0 + b eps, each of the shape of t."""

    a: Array
    b: Array


@runtime_checkable
class Target(Protocol):
    """What the verbs ask of a target. A class of your own has this method, and @jdiff.noun above it."""

    def row(self, schedule: Schedule, t: Array) -> Row:
        """(a_t, b_t) of F* = a_t x_0 + b_t eps, each of the shape of t."""
        ...


@noun
class X0(Noun):
    """F* = x_0: the data. Singular at sigma = 0."""

    def row(self, schedule, t):
        return Row(jnp.ones_like(t), jnp.zeros_like(t))


@noun
class Eps(Noun):
    """F* = eps: the noise. Singular at alpha = 0.  Ho et al. 2020, arXiv:2006.11239, eq. 12."""

    def row(self, schedule, t):
        return Row(jnp.zeros_like(t), jnp.ones_like(t))


@noun
class Score(Noun):
    """F* = -eps / sigma_t: the conditional score. Singular at alpha = 0.  Vincent 2011; arXiv:2011.13456, eq. 7."""

    def row(self, schedule, t):
        return Row(jnp.zeros_like(t), -1 / schedule.sigma(t))


@noun
class V(Noun):
    """F* = alpha_t eps - sigma_t x_0.  Salimans & Ho 2022, arXiv:2202.00512, section 4."""

    def row(self, schedule, t):
        return Row(-schedule.sigma(t), schedule.alpha(t))


@noun
class Velocity(Noun):
    """F* = dx_t/dt = alpha'_t x_0 + sigma'_t eps: flow matching, with noise at t = 1.  arXiv:2210.02747, eq. 15."""

    def row(self, schedule, t):
        return Row(derivative(schedule.alpha, t), derivative(schedule.sigma, t))


@noun
class EDM(Noun):
    """F* = (sigma x_0 / sigma_data - alpha sigma_data eps) / sqrt((alpha sigma_data)^2 + sigma^2).

    Karras et al. 2022, arXiv:2206.00364, table 1 (alpha = 1); for any alpha, F* has unit variance when x_0 has
    standard deviation sigma_data, and c_out is as small as it can be.
    """

    sigma_data: Number = 0.5

    def check(self):
        check_range(self, SMALLEST, sigma_data=self.sigma_data)

    def row(self, schedule, t):
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        total = jnp.sqrt((alpha * self.sigma_data) ** 2 + sigma**2)
        return Row(sigma / (self.sigma_data * total), -alpha * self.sigma_data / total)


def aim(schedule: Schedule, target: Target, x0: Array, eps: Array, t) -> Array:
    """The value F* = a_t x_0 + b_t eps that the network should output.

    Args:
        schedule: the schedule of the process.
        target: what the network regresses.
        x0: data, (B, ...), floating.
        eps: noise, of the shape of x0.
        t: times, () or (B,).

    Returns:
        F*, of the shape of x0.

    Raises:
        ValueError: when shapes disagree, or an array is not floating.
    """
    check_same_shape("eps", eps, "x0", x0)
    check_floating("x0", x0)
    check_floating("eps", eps)
    check_time(t, x0)
    check_schedule(schedule)
    a, b = target.row(schedule, as_time(t))
    return expand(a, x0) * x0 + expand(b, x0) * eps


class System(NamedTuple):
    """The map (x_t, F) = [[alpha, sigma], [a, b]] (x_0, eps) and its determinant, each of the shape of t."""

    alpha: Array
    sigma: Array
    a: Array
    b: Array
    determinant: Array


def system(schedule: Schedule, target: Target, t: Array) -> System:
    """The 2x2 system of a target under a schedule: every conversion and every weight solves it."""
    a, b = target.row(schedule, t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return System(alpha, sigma, a, b, alpha * b - sigma * a)


def solve(schedule: Schedule, target: Target, x: Array, out: Array, t) -> tuple[Array, Array]:
    """(x_0, eps) implied by x_t and the network's output.

    The coefficients are formed before they meet x, so an eps-network's eps and an x0-network's x_0 pass unchanged.

    Args:
        schedule: the schedule of the process.
        target: what the network regresses.
        x: x_t, (B, ...), floating.
        out: the network's output F, of the shape of x.
        t: times, () or (B,).

    Returns:
        (x_0, eps), each of the shape of x.

    Raises:
        ValueError: when shapes disagree, or x is not floating.
    """
    check_same_shape("the network's output", out, "x", x)
    check_floating("x", x)
    check_time(t, x)
    check_schedule(schedule)
    alpha, sigma, a, b, det = system(schedule, target, as_time(t))
    of_x, of_out = (b / det, -a / det), (-sigma / det, alpha / det)
    x0, eps = (expand(p, x) * x + expand(q, x) * out for p, q in zip(of_x, of_out, strict=True))
    return x0, eps


def c_skip(schedule: Schedule, target: Target, t) -> Array:
    """The weight of x_t in x_0 = c_skip x_t + c_out F, of the shape of t."""
    at = system(schedule, target, as_time(t))
    return at.b / at.determinant


def c_out(schedule: Schedule, target: Target, t) -> Array:
    """The weight of the network's output in x_0 = c_skip x_t + c_out F, of the shape of t."""
    at = system(schedule, target, as_time(t))
    return -at.sigma / at.determinant
