"""The one core of the fast solvers: the integral of a polynomial through predictions, past, present or future.

Let p be the prediction that a method interpolates (x_0 or eps), c the coordinate in which it is a polynomial, and j run
over the nodes, j = 0 being the present one. Then every step of every linear multistep and exponential method is

    x_s = alpha_s x_0 + sigma_s eps + sum_{j > 0} W_j (p_j - p_0),      W_j = total * int l_j(c) m(c) dc / int m(c) dc,

with l_j Lagrange's polynomials and m the density of the exact solution. Written this way the first-order part is DDIM
whatever the method, exact and finite also at alpha = 0. What remains to choose is a `Rule`:

    prediction   coordinate c    density m         total                       method
    x_0          log(alpha/sig)  exp(k c)          alpha_s (1 - exp(-k h))     DPM-Solver++ kM, UniPC, SA-Solver
    eps          log(alpha/sig)  exp(-c)           sigma_s (1 - exp(h))        DPM-Solver, DEIS (log rho)
    eps          sigma/alpha     1                 the same                    LMS
    eps          t               d(sigma/alpha)    the same                    DEIS (tAB)
    eps          index of step   1                 the same                    PNDM, iPNDM

h = c_s - c_t in log(alpha/sigma). k is 1 for the ODE, 1 + eta for the SDE whose fresh noise has the share
1 - exp(-2 eta h).
Lu et al. 2022, arXiv:2211.01095; Zhang & Chen 2022, arXiv:2204.13902; Xue et al. 2023, arXiv:2309.05019.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, as_time, safe_divide
from jdiff.process.clock import log_snr, time_of
from jdiff.process.sde import derivative
from jdiff.solvers.base import nearly_noise

# Gauss-Legendre on [0, 1]: sixteen points integrate exp over the longest step (h = 20) to 1e-12
POINTS, MASSES = ((a * 0.5 + shift) for a, shift in zip(np.polynomial.legendre.leggauss(16), (0.5, 0.0), strict=True))


class Rule(NamedTuple):
    """What is interpolated, in which coordinate, and what the exact solution weighs it with."""

    pick: Callable  # Prediction -> x_0 or eps
    coordinate: Callable  # (schedule, times (N,)) -> c (N,)
    time: Callable  # (schedule, c) -> t
    density: Callable  # (schedule, c, c_t, c_s, k) -> m(c), up to a factor
    total: Callable  # (schedule, t, s, k) -> the sum of all W_j, j = 0 included
    retained: Callable  # (schedule, t, s, k) -> what x_s keeps of a change of x_t, the predictions held fixed
    highest_order: float = float("inf")  # where the density is only nearly right


def half_log_snr(schedule, t) -> Array:
    """log(alpha_t / sigma_t)."""
    return 0.5 * log_snr(schedule, t)


def _time_of_half(schedule, c):
    return time_of(schedule, 2 * c)


def _ratio(schedule, t):
    alpha = schedule.alpha(t)
    return schedule.sigma(t) / jnp.where(nearly_noise(schedule, t), 1, alpha)  # such nodes are never used


def _step(schedule, t, s):
    return half_log_snr(schedule, s) - half_log_snr(schedule, t)


def _data_total(schedule, t, s, k):
    return schedule.alpha(s) * -jnp.expm1(-k * _step(schedule, t, s))


def _data_retained(schedule, t, s, k):
    return safe_divide(schedule.sigma(s), schedule.sigma(t)) * jnp.exp(-(k - 1) * _step(schedule, t, s))


def _noise_retained(schedule, t, s, k):
    alpha = schedule.alpha(t)
    no_signal = nearly_noise(schedule, t)
    return jnp.where(no_signal, 0, schedule.alpha(s) / jnp.where(no_signal, 1, alpha))


def _noise_total(schedule, t, s, k):
    kept = _noise_retained(schedule, t, s, k)
    change = schedule.sigma(s) * -jnp.expm1(jnp.where(kept == 0, 0, _step(schedule, t, s)))
    return jnp.where(kept == 0, 0, change)


def _time_of_ratio(schedule, c):
    return time_of(schedule, -2 * jnp.log(c))


def _times(schedule, times):
    return times


def _same_time(schedule, c):
    return c


def _index(schedule, times):
    return jnp.arange(len(times)).astype(times.dtype)


def _data_density(schedule, c, c_t, c_s, k):
    return jnp.exp(k * (c - c_s))


def _noise_density(schedule, c, c_t, c_s, k):
    return jnp.exp(c_t - c)


def _ratio_density(schedule, c, c_t, c_s, k):
    return -derivative(lambda t: _ratio(schedule, t), c)


def _flat(schedule, c, c_t, c_s, k):
    return jnp.ones_like(c)


def _x0(prediction):
    return prediction.x0


def _eps(prediction):
    return prediction.eps


# functions with names: solvers can then be pickled
DATA = Rule(_x0, half_log_snr, _time_of_half, _data_density, _data_total, _data_retained)
NOISE = Rule(_eps, half_log_snr, _time_of_half, _noise_density, _noise_total, _noise_retained)
NOISE_BY_RATIO = Rule(_eps, _ratio, _time_of_ratio, _flat, _noise_total, _noise_retained)
NOISE_BY_TIME = Rule(_eps, _times, _same_time, _ratio_density, _noise_total, _noise_retained)
NOISE_BY_INDEX = Rule(  # a grid has no time between its steps; the density is nearly right for two nodes
    _eps, _index, None, _flat, _noise_total, _noise_retained, 2
)


def lagrange(nodes: Array, usable: Array, points: Array) -> Array:
    """l_j(points), (..., J, Q), for the usable ones among nodes (..., J); 0 for the others."""
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


def weights(rule: Rule, schedule, t, s, c_t, c_s, nodes, usable, k, two_nodes: Callable | None = None) -> Array:
    """W_j of every step, (N, J):  t, s, c_t, c_s (N,), nodes and usable (N, J).

    `two_nodes(k h) -> u`, if given, replaces the exact integral wherever just two nodes are usable by the value of
    their line at c_t + u (c_s - c_t): the freedom in which DPM-Solver++ 2M (u = 1/2) and UniPC's B(h) differ.
    """
    h = c_s - c_t
    points = jnp.asarray(POINTS, h.dtype)[None] + jnp.zeros_like(h)[:, None]
    at = c_t[:, None] + h[:, None] * points
    mass = jnp.asarray(MASSES, h.dtype)[None] * rule.density(schedule, at, c_t[:, None], c_s[:, None], k)
    mass = safe_divide(mass, mass.sum(-1, keepdims=True))
    if two_nodes is not None:
        points = jnp.where((usable.sum(-1) == 2)[:, None], as_time(two_nodes(k * h))[..., None], points)
    basis = lagrange(safe_divide(nodes - c_t[:, None], h[:, None]), usable, points)
    return rule.total(schedule, t, s, k)[:, None] * jnp.einsum("nq,njq->nj", mass, basis)


def midpoint(h) -> Array:
    """u = 1/2: the line's value half-way, with the whole weight."""
    return jnp.full_like(h, 0.5)
