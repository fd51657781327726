"""The forward process in continuous time, its reversal, and the probability-flow ODE.

dx = f_t x dt + g_t dw. Every derivative is taken by `jax.jvp` of the schedule's two methods.
Song et al. 2021, arXiv:2011.13456.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, as_time, expand, safe_log
from jdiff.core.checks import check_time
from jdiff.process.clock import Schedule, log_snr
from jdiff.process.forward import rates
from jdiff.process.prediction import Denoise, as_denoise


def derivative(f, t):
    """f'(t) for an elementwise f, shape of `t`."""
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def forward(schedule: Schedule, t) -> tuple[Array, Array]:
    """(f, g^2) of dx = f x dt + g dw:  f = (log alpha)',  g^2 = -sigma^2 (log SNR)'; shape of `t`.

    Holds where alpha > 0 and t >= t_min.  Song et al. 2021, arXiv:2011.13456, eq. 5; Kingma et al. 2021,
    arXiv:2107.00630, section 3.1.
    """
    t = as_time(t)
    f = derivative(lambda t: safe_log(schedule.alpha(t)), t)
    g2 = -(schedule.sigma(t) ** 2) * derivative(lambda t: log_snr(schedule, t), t)
    return f, g2


def score(denoise: Denoise, schedule: Schedule, x: Array, t) -> Array:
    """grad log p_t(x) = (alpha_t E[x_0 | x_t] - x) / sigma_t^2, (B, ...): Tweedie's formula (Efron 2011)."""
    alpha, sigma = rates(schedule, t, x)
    return (alpha * as_denoise(denoise, schedule)(x, t) - x) / sigma**2


def reverse(denoise: Denoise, schedule: Schedule) -> Callable:
    """The reverse-time SDE as (x, t) -> (drift, diffusion):  dx = (f x - g^2 score) dt + g dw, t falling.

    drift: (B, ...) like x; diffusion: g, of the shape of t.  Song et al. 2021, arXiv:2011.13456, eq. 6.
    """

    def terms(x, t):
        check_time(t, x)
        f, g2 = forward(schedule, t)
        return expand(f, x) * x - expand(g2, x) * score(denoise, schedule, x, t), jnp.sqrt(g2)

    return terms


def probability_flow(denoise: Denoise, schedule: Schedule) -> Callable:
    """The probability-flow ODE as (x, t) -> dx/dt = alpha'_t E[x_0 | x_t] + sigma'_t E[eps | x_t], (B, ...).

    Equal to f x - g^2 score / 2 (Song et al. 2021, arXiv:2011.13456, eq. 13), but finite at alpha = 0; the velocity
    of flow matching (Lipman et al. 2022, arXiv:2210.02747).
    """

    denoise = as_denoise(denoise, schedule)

    def velocity(x, t):
        check_time(t, x)
        t = as_time(t)
        x0, eps, _ = denoise.predict(x, t)
        return expand(derivative(schedule.alpha, t), x) * x0 + expand(derivative(schedule.sigma, t), x) * eps

    return velocity
