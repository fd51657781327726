"""The one core of the fast solvers: the integral of a polynomial through predictions, past, present or future.

Let p be the prediction that a method interpolates (x_0 or eps), c the coordinate in which it is a polynomial, and j run
over the nodes, j = 0 being the present one. Then every step of every linear multistep and exponential method is

    x_s = alpha_s x_0 + sigma_s eps + sum_{j > 0} W_j (p_j - p_0),      W_j = total * int l_j(c) m(c) dc / int m(c) dc,

with l_j Lagrange's polynomials and m the density of the exact solution. Written this way the first-order part is DDIM
whatever the method, exact and finite also at alpha = 0. What remains to choose is a `Rule`:

    prediction   coordinate c       density m          total                         method
    x_0          log(alpha/sigma)   exp(rate c)        alpha_s (1 - exp(-rate h))    DPM-Solver++ kM, UniPC, SA-Solver
    eps          log(alpha/sigma)   exp(-c)            sigma_s (1 - exp(h))          DPM-Solver, DEIS (log rho)
    eps          sigma/alpha        1                  the same                      LMS
    eps          t                  d(sigma/alpha)     the same                      DEIS (tAB)
    eps          index of step      1                  the same                      PNDM, iPNDM

h = log(alpha_s/sigma_s) - log(alpha_t/sigma_t). The rate is 1 for the ODE, and 1 + eta for the SDE whose fresh noise
has the share 1 - exp(-2 eta h).
Lu et al. 2022, arXiv:2211.01095; Zhang & Chen 2022, arXiv:2204.13902; Xue et al. 2023, arXiv:2309.05019.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, as_time, safe_divide
from jdiff.core.names import choose
from jdiff.process.clock import log_snr, time_of
from jdiff.process.sde import derivative
from jdiff.solvers.base import nearly_noise

# Gauss-Legendre on [0, 1]: sixteen points integrate exp over the longest step (h = 20) to 1e-12
POINTS, MASSES = ((a * 0.5 + shift) for a, shift in zip(np.polynomial.legendre.leggauss(16), (0.5, 0.0), strict=True))


class Rule(NamedTuple):
    """What is interpolated, in which coordinate, and what the exact solution weighs it with.

    Attributes:
        pick: Prediction -> p, its x_0 or its eps.
        coordinate: (schedule, times (N,)) -> c (N,).
        time: (schedule, c) -> the time at which the coordinate is c.
        density: (schedule, c, c_t, c_s, rate) -> m(c), up to a factor.
        total: (schedule, t, s, rate) -> the sum of all W_j, j = 0 included.
        retained: (schedule, t, s, rate) -> what x_s keeps of a change of x_t, the predictions held fixed.
        highest_order: the highest order that the method reaches; finite where the density is only nearly right.
    """

    pick: Callable
    coordinate: Callable
    time: Callable
    density: Callable
    total: Callable
    retained: Callable
    highest_order: float = float("inf")


# ---------------------------------------------------------------- coordinates and times


def half_log_snr(schedule, t) -> Array:
    """log(alpha_t / sigma_t)."""
    return 0.5 * log_snr(schedule, t)


def step_size(schedule, t, s) -> Array:
    """h = log(alpha_s / sigma_s) - log(alpha_t / sigma_t)."""
    return half_log_snr(schedule, s) - half_log_snr(schedule, t)


def _time_of_half_log_snr(schedule, c):
    return time_of(schedule, 2 * c)


def _ratio(schedule, t):
    alpha = schedule.alpha(t)
    return schedule.sigma(t) / jnp.where(nearly_noise(schedule, t), 1, alpha)  # such nodes are never used


def _time_of_ratio(schedule, c):
    return time_of(schedule, -2 * jnp.log(c))


def _times(schedule, times):
    return times


def _same_time(schedule, c):
    return c


def _index(schedule, times):
    return jnp.arange(len(times)).astype(times.dtype)


def _no_time(schedule, c):
    raise ValueError("the index of a step is no coordinate of single steps: there is no time between two indices")


# ---------------------------------------------------------------- densities


def _data_density(schedule, c, c_t, c_s, rate):
    return jnp.exp(rate * (c - c_s))


def _noise_density(schedule, c, c_t, c_s, rate):
    return jnp.exp(c_t - c)


def _ratio_density(schedule, c, c_t, c_s, rate):
    return -derivative(lambda t: _ratio(schedule, t), c)


def _flat_density(schedule, c, c_t, c_s, rate):
    return jnp.ones_like(c)


# ---------------------------------------------------------------- totals


def _data_total(schedule, t, s, rate):
    return schedule.alpha(s) * -jnp.expm1(-rate * step_size(schedule, t, s))


def _data_retained(schedule, t, s, rate):
    return safe_divide(schedule.sigma(s), schedule.sigma(t)) * jnp.exp(-(rate - 1) * step_size(schedule, t, s))


def _noise_retained(schedule, t, s, rate):
    alpha = schedule.alpha(t)
    no_signal = nearly_noise(schedule, t)
    return jnp.where(no_signal, 0, schedule.alpha(s) / jnp.where(no_signal, 1, alpha))


def _noise_total(schedule, t, s, rate):
    # From pure noise h is infinite, and the first-order part alone is the step.
    retained = _noise_retained(schedule, t, s, rate)
    total = schedule.sigma(s) * -jnp.expm1(jnp.where(retained == 0, 0, step_size(schedule, t, s)))
    return jnp.where(retained == 0, 0, total)


# ---------------------------------------------------------------- rules


def _x0(prediction):
    return prediction.x0


def _eps(prediction):
    return prediction.eps


# Their functions have names, not lambdas: a solver that holds a rule can then be pickled.
DATA = Rule(
    pick=_x0, coordinate=half_log_snr, time=_time_of_half_log_snr,
    density=_data_density, total=_data_total, retained=_data_retained,
)  # fmt: skip
NOISE = Rule(
    pick=_eps, coordinate=half_log_snr, time=_time_of_half_log_snr,
    density=_noise_density, total=_noise_total, retained=_noise_retained,
)  # fmt: skip
NOISE_BY_RATIO = NOISE._replace(coordinate=_ratio, time=_time_of_ratio, density=_flat_density)
NOISE_BY_TIME = NOISE._replace(coordinate=_times, time=_same_time, density=_ratio_density)
# The flat density is nearly right for two nodes, and wrong at third order.
NOISE_BY_INDEX = NOISE._replace(coordinate=_index, time=_no_time, density=_flat_density, highest_order=2)
RULES = {"x0": DATA, "eps": NOISE}  # by the names that users give


def choose_rule(name: str, prediction: str) -> Rule:
    """The rule in log(alpha/sigma) of a prediction, "x0" or "eps"; ValueError, naming the solver, for another."""
    return choose(f"prediction of {name}", prediction, RULES)


# ---------------------------------------------------------------- weights


def lagrange(nodes: Array, usable: Array, points: Array) -> Array:
    """Lagrange's polynomials l_j at points.

    Args:
        nodes: (..., J).
        usable: (..., J), which of the nodes are interpolated.
        points: (..., Q).

    Returns:
        l_j(points), (..., J, Q); 0 where node j is not usable.
    """
    J = nodes.shape[-1]
    rows = []
    for j in range(J):
        row = jnp.broadcast_to(usable[..., j, None], points.shape).astype(points.dtype)
        for m in range(J):
            if m != j:
                apart = nodes[..., j, None] - nodes[..., m, None]
                factor = safe_divide(points - nodes[..., m, None], apart)
                row = row * jnp.where(usable[..., m, None], factor, 1)
        rows.append(row)
    return jnp.stack(rows, -2)


def weights(
    rule: Rule, schedule, t: Array, s: Array, *,
    c_t: Array, c_s: Array, nodes: Array, usable: Array, rate, two_nodes: Callable | None = None,
) -> Array:  # fmt: skip
    """W_j of every step.

    Args:
        rule: what is interpolated, and how it is weighed.
        schedule: the noise schedule.
        t: where the steps begin, (N,).
        s: where they end, (N,).
        c_t: the coordinate at t, (N,).
        c_s: the coordinate at s, (N,).
        nodes: the coordinates of the predictions, (N, J).
        usable: which of them are interpolated, (N, J).
        rate: 1 for the ODE, 1 + eta for the SDE.
        two_nodes: rate h (N,) -> u (N,), or None. Wherever just two nodes are usable, the value of their line at
            c_t + u (c_s - c_t) then replaces the exact integral: the freedom in which DPM-Solver++ 2M (u = 1/2) and
            UniPC's B(h) differ.

    Returns:
        W_j, (N, J).
    """
    h = c_s - c_t
    points = jnp.asarray(POINTS, h.dtype)[None] + jnp.zeros_like(h)[:, None]
    c = c_t[:, None] + h[:, None] * points
    mass = jnp.asarray(MASSES, h.dtype)[None] * rule.density(schedule, c, c_t[:, None], c_s[:, None], rate)
    mass = safe_divide(mass, mass.sum(-1, keepdims=True))
    if two_nodes is not None:
        points = jnp.where((usable.sum(-1) == 2)[:, None], as_time(two_nodes(rate * h))[..., None], points)
    basis = lagrange(safe_divide(nodes - c_t[:, None], h[:, None]), usable, points)
    return rule.total(schedule, t, s, rate)[:, None] * jnp.einsum("nq,njq->nj", mass, basis)


def midpoint(h) -> Array:
    """u = 1/2: the line's value half-way, with the whole weight."""
    return jnp.full_like(h, 0.5)
