"""The variational bound of a DDPM table, term by term, in bits per dimension.

-log p(x_0) <= KL(q(x_T | x_0) | p(x_T)) + sum_{k >= 2} KL(q(x_{k-1} | x_k, x_0) | p(x_{k-1} | x_k)) - log p(x_0 | x_1).
Ho et al. 2020, arXiv:2006.11239, eq. 5; with learned variances, Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 4 to 7.
"""

import math

import jax.numpy as jnp
from jax.scipy.special import log_ndtr

from jdiff.core.arrays import Array, Number, as_time, expand, safe_log, wide
from jdiff.core.checks import check_floating, check_same_shape
from jdiff.process.clock import Schedule, log_snr
from jdiff.process.forward import fresh_noise
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.process.table import Discrete


def vlb_terms(
    denoise: Denoise, schedule: Schedule, x0: Array, x_t: Array, t, *, v: Number = 0.0, bins: Number | None = 256
) -> Array:
    """The term of the variational bound at the knot t = k/T and x_t ~ q(x_t | x_0), in bits per dimension.

    The terms of k = 1..T, averaged over x_t and added up, plus `vlb_prior`, bound -log_2 p(x_0) / D.

    For k >= 2 the term is KL(q(x_s | x_t, x_0) | p(x_s | x_t)) with s = t - 1/T. Both laws are normal. q is that of
    `q_posterior`. p has the mean of `q_posterior` for the predicted x_0, and the variance of `DDPM`,
    c sigma_s^2 (sigma_t/sigma_s)^2v. If the denoiser learned variances, o being its `Prediction.extra`,
    v = (o + 1) / 2; else v is the argument.

    For k = 1 the term is -log p(x_0 | x_1), p being the probability of the bin that x_0 is in. There the small variance
    would be 0, and that of k = 2 takes its place. It is the variance of the term whatever v is, unless variances were
    learned. Published code does the same.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: a `Discrete` schedule.
        x0: data, (B, ...), floating; images scaled to [-1, 1] unless bins is None.
        x_t: the noised data, of the shape of x0.
        t: knots k/T, () or (B,).
        v: 0 for the variance "small" of `DDPM`, 1 for "large".
        bins: the levels of the data from -1 to 1, or None for the density of continuous data.

    Returns:
        The term of each sample, (B,), computed in float32 at least.

    Raises:
        ValueError: for a schedule that is not `Discrete`, and for arrays that are not floating.

    Reference:
        Ho et al. 2020, arXiv:2006.11239, eq. 5 and 13; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 4 to 7.
    """
    check_floating("x0", x0)
    check_floating("x_t", x_t)
    return terms_of(as_denoise(denoise, schedule).predict(wide(x_t), t), schedule, x0, t, v=v, bins=bins)


def terms_of(prediction: Prediction, schedule: Schedule, x0: Array, t, *, v: Number = 0.0, bins=256) -> Array:
    """`vlb_terms` of what a denoiser said of x_t, (B,)."""
    T = table_length("vlb_terms", schedule)
    check_same_shape("the predicted x0", prediction.x0, "x0", x0)
    t = jnp.broadcast_to(as_time(t), x0.shape[:1])
    x0, prediction = wide(x0), wide(prediction)
    away = x0 - prediction.x0
    learned = None if prediction.extra is None else 0.5 * (prediction.extra + 1)
    v, v_first = (v, 0.0) if learned is None else (learned, learned)
    first = t * T < 1.5
    s = jnp.where(first, t, t - 1 / T)

    log_ratio = 2 * v * expand(safe_log(schedule.sigma(t)) - safe_log(schedule.sigma(s)), away)  # model over posterior
    pull = expand(jnp.exp(log_snr(schedule, s)) * fresh_noise(schedule, t, s), away)
    kl = 0.5 * (log_ratio + jnp.expm1(-log_ratio) + pull * jnp.exp(-log_ratio) * away**2)

    knot = as_time(1 / T)
    small = safe_log(fresh_noise(schedule, 2 * knot, knot)).astype(x0.dtype)  # log of the small variance over beta_1
    log_std = safe_log(schedule.sigma(knot)).astype(x0.dtype) + 0.5 * (1 - v_first) * small
    nats = jnp.where(expand(first, away) > 0, negative_log_likelihood(x0, away, log_std, bins), kl)
    return jnp.mean(nats, axis=tuple(range(1, x0.ndim))) / math.log(2)


def vlb_prior(schedule: Schedule, x0: Array) -> Array:
    """KL(q(x_T | x_0) | N(0, I)) in bits per dimension: what the end of the table leaves of the data.

    Args:
        schedule: a `Discrete` schedule.
        x0: data, (B, ...), floating.

    Returns:
        The divergence of each sample, (B,), computed in float32 at least.

    Raises:
        ValueError: for a schedule that is not `Discrete`, and for data that is not floating.
    """
    table_length("vlb_prior", schedule)
    end = as_time(schedule.t_max)
    alpha, sigma = schedule.alpha(end), schedule.sigma(end)
    check_floating("x0", x0)
    x0 = wide(x0)
    # sigma^2 - 1 = -alpha^2
    nats = 0.5 * alpha**2 * (x0**2 - 1) - safe_log(sigma)
    return jnp.mean(nats, axis=tuple(range(1, x0.ndim))) / math.log(2)


def table_length(name: str, schedule: Schedule) -> int:
    """T of a `Discrete` schedule; ValueError for others."""
    if not isinstance(schedule, Discrete):
        kind = type(schedule).__name__
        raise ValueError(f"{name}: {kind} has no steps; the bound is of a table: jdiff.discrete(jdiff.betas.linear(T))")
    return schedule.log_nsr.shape[-1]


def negative_log_likelihood(x0, away, log_std, bins) -> Array:
    """-log p of each number of x_0 under N(x_0 - away, std^2), of its bin if there are bins, in nats, like x0."""
    log_std = jnp.broadcast_to(log_std, away.shape)
    if bins is None:
        return 0.5 * jnp.exp(-2 * log_std) * away**2 + log_std + 0.5 * math.log(2 * math.pi)
    half = 1 / (bins - 1)
    std = jnp.exp(log_std)
    # |away|: in the lower tail differences of the distribution function keep their digits
    upper, lower = log_ndtr((half - jnp.abs(away)) / std), log_ndtr((-half - jnp.abs(away)) / std)
    inside = upper + safe_log(-jnp.expm1(lower - upper))
    # the outermost bins reach to infinity
    log_p = jnp.where(x0 < half - 1, log_ndtr((half + away) / std), inside)
    return -jnp.where(x0 > 1 - half, log_ndtr((half - away) / std), log_p)
