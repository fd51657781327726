"""The forward process in continuous time, its reversal, and the probability-flow ODE.

dx = f_t x dt + g_t dw. Every derivative is taken by `jax.jvp` of the schedule's two methods.
Song et al. 2021, arXiv:2011.13456.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, as_time, expand, safe_log
from jdiff.core.checks import check_time
from jdiff.process.clock import Schedule, check_schedule, log_snr
from jdiff.process.forward import rates
from jdiff.process.prediction import Denoise, as_denoise


def derivative(f, t):
    """f'(t) for an elementwise f, shape of `t`."""
    return jax.jvp(f, (t,), (jnp.ones_like(t),))[1]


def forward(schedule: Schedule, t) -> tuple[Array, Array]:
    """The coefficients of the forward SDE dx = f x dt + g dw:  f = (log alpha)',  g^2 = -sigma^2 (log SNR)'.

    Args:
        schedule: the noise schedule.
        t: times of any shape, where alpha > 0 and t >= t_min.

    Returns:
        (f, g^2), each of the shape of t.

    Reference:
        Song et al. 2021, arXiv:2011.13456, eq. 5; Kingma et al. 2021, arXiv:2107.00630, section 3.1.
    """
    check_schedule(schedule)
    t = as_time(t)
    f = derivative(lambda t: safe_log(schedule.alpha(t)), t)
    g2 = -(schedule.sigma(t) ** 2) * derivative(lambda t: log_snr(schedule, t), t)
    return f, g2


def score(denoise: Denoise, schedule: Schedule, x: Array, t) -> Array:
    """grad log p_t(x) = (alpha_t E[x_0 | x_t] - x) / sigma_t^2: Tweedie's formula.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the noise schedule.
        x: x_t, (B, ...), floating.
        t: times, () or (B,), with sigma_t > 0.

    Returns:
        The score, of the shape of x.

    Reference:
        Efron 2011, "Tweedie's formula and selection bias".
    """
    alpha, sigma = rates(schedule, t, x)
    return (alpha * as_denoise(denoise, schedule)(x, t) - x) / sigma**2


def reverse(denoise: Denoise, schedule: Schedule) -> Callable:
    """The reverse-time SDE, dx = (f x - g^2 score) dt + g dw with t falling.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the noise schedule.

    Returns:
        A function (x, t) -> (drift, diffusion): the drift is of the shape of x (B, ...), the diffusion g of the shape
        of t.

    Reference:
        Song et al. 2021, arXiv:2011.13456, eq. 6.
    """

    def terms(x, t):
        check_time(t, x)
        f, g2 = forward(schedule, t)
        return expand(f, x) * x - expand(g2, x) * score(denoise, schedule, x, t), jnp.sqrt(g2)

    return terms


def probability_flow(denoise: Denoise, schedule: Schedule) -> Callable:
    """The probability-flow ODE, dx/dt = alpha'_t E[x_0 | x_t] + sigma'_t E[eps | x_t].

    It equals f x - g^2 score / 2, but is finite at alpha = 0; it is the velocity of flow matching.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the noise schedule.

    Returns:
        A function (x, t) -> dx/dt, of the shape of x (B, ...).

    Reference:
        Song et al. 2021, arXiv:2011.13456, eq. 13; Lipman et al. 2022, arXiv:2210.02747.
    """

    denoise = as_denoise(denoise, schedule)

    def velocity(x, t):
        check_time(t, x)
        t = as_time(t)
        x0, eps, _ = denoise.predict(x, t)
        return expand(derivative(schedule.alpha, t), x) * x0 + expand(derivative(schedule.sigma, t), x) * eps

    return velocity
