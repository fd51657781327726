"""The variational bound of log p(x_0), term by term with its standard error: of a table, and in continuous time.

-log p(x_0) <= prior + diffusion + reconstruction, where

    prior = KL(q(x_T | x_0) | p(x_T)),    reconstruction = -E log p(x_0 | x_{t_min}),

and diffusion is the sum of the KL terms of a table's knots or, in continuous time, 1/2 int E |eps - eps_hat|^2 dlambda
over the log-SNR lambda.
"""

import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, Number, as_time, expand, safe_log, wide
from jdiff.core.checks import check_floating
from jdiff.core.keys import each, fold, normal
from jdiff.core.pytrees import known
from jdiff.losses.vlb import negative_log_likelihood, terms_of
from jdiff.process.clock import Schedule, check_schedule, log_snr, time_of
from jdiff.process.forward import moments_at, q_sample
from jdiff.process.prediction import Denoise, as_denoise
from jdiff.process.table import Discrete
from jdiff.process.times import ends_of


class VariationalInfo(NamedTuple):
    """The terms of `variational_bound`, per sample, (B,), in nats: costs, so that their sum is minus the bound.

    Attributes:
        prior: what the end of the process leaves of the data; computed, not drawn.
        diffusion: what the steps between cost, of the draws.
        reconstruction: what the data cost given x at t_min, of the draws.
        stderr: the standard error of the bound by its draws; nan for a single one. The draws are stratified: the true
            error is this at most.
    """

    prior: Array
    diffusion: Array
    reconstruction: Array
    stderr: Array


def variational_bound(
    denoise: Denoise | Callable,
    schedule: Schedule,
    x0: Array,
    key,
    *,
    samples: int = 16,
    bins: Number | None = 256,
    sigma_data: Number = 0.5,
    v: Number = 0.0,
    t_min=None,
    t_max=None,
    mean=0.0,
    std=0.0,
) -> tuple[Array, VariationalInfo]:
    """A lower bound of log p(x_0) in nats, p being the model that is sampled backwards in time, with noise.

    On a table it is the bound of DDPM, with the terms of `vlb_terms`; on other schedules that of VDM, the limit of
    infinitely many steps. There log p(x_0 | x_{t_min}) is that of a normal law about the denoised x_{t_min}, with the
    variance that Gaussian data of `sigma_data` have.

    Noise levels are drawn with density sigmoid(lambda + 2 log sigma_data) of the log-SNR: in proportion to their terms
    if the data are Gaussian with that deviation. In continuous time the length of the drawn noise is a control variate,
    as it would be for such data. The bound is unbiased whatever sigma_data is.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the schedule of the process.
        x0: data, (B, ...), floating; images scaled to [-1, 1] by x / 127.5 - 1 unless bins is None.
        key: one key, or (B,) of them.
        samples: how many noise levels are drawn for a sample, one network call each, and how often its reconstruction
            is, one each too.
        bins: the levels of the data from -1 to 1, whose probability is bounded; None for the density of continuous
            data.
        sigma_data: the standard deviation of the data.
        v: of a table, the variance of its steps, as for `vlb_terms`. A denoiser's learned variances go before it.
        t_min: the time of the reconstruction; the schedule's own end if None. A table uses all its knots.
        t_max: where the prior stands; likewise.
        mean: the mean of the data, by which the prior is N(alpha mean, alpha^2 std^2 + sigma^2), as for `prior`.
        std: the standard deviation of the data, likewise; 1 for the N(0, I) of DDPM.

    Returns:
        (bound (B,), `VariationalInfo`), computed in float32 at least. Minus the bound over D log 2 is bits per
        dimension: of the data where they have bins, else as `bits_per_dim` has it.

    Raises:
        ValueError: for arrays that are not floating, a number of draws that is none, times out of order, and times
            given for a table.

    Reference:
        Ho et al. 2020, arXiv:2006.11239, eq. 5; Kingma et al. 2021, arXiv:2107.00630, eq. 11 to 14 and appendix I.
    """
    check_schedule(schedule)
    check_floating("x0", x0)
    if known(sigma_data) and not (np.asarray(sigma_data) > 0).all():
        raise ValueError(f"variational_bound: sigma_data must be positive, got {sigma_data}")
    if not isinstance(samples, (int, np.integer)) or isinstance(samples, bool) or samples < 1:
        raise ValueError(f"variational_bound: samples is how many draws a bound has, from 1 on; got {samples!r}")
    if isinstance(schedule, Discrete) and not (t_min is None and t_max is None):
        raise ValueError("variational_bound: the bound of a table goes over all its knots; leave t_min and t_max out")
    if isinstance(schedule, Discrete):
        t_min, t_max = as_time(schedule.t_min), as_time(schedule.t_max)
    else:
        t_min, t_max = ends_of("variational_bound", schedule, t_min, t_max)
    x0, keys, denoise = wide(jnp.asarray(x0)), each(key, len(x0)), as_denoise(denoise, schedule)
    law = Law(2 * safe_log(as_time(sigma_data)), log_snr(schedule, t_max), log_snr(schedule, t_min))
    terms = _table_terms if isinstance(schedule, Discrete) else _continuous_terms

    def draw(i):
        """(diffusion, reconstruction) of draw i, each (B,)."""
        own = fold(keys, i)
        u = jax.vmap(jax.random.uniform)(fold(own, 0))
        lam = law.quantile((i + u) / samples)
        eps = [normal(fold(own, j), x0.shape, x0.dtype) for j in (1, 2)]
        return terms(denoise, schedule, x0, law, lam, eps, t_min, v=v, bins=bins)

    diffusion, reconstruction = jax.lax.map(draw, jnp.arange(samples))
    prior = _prior_term(schedule, x0, t_max, mean, std)
    total = diffusion + reconstruction
    stderr = jnp.std(total, axis=0, ddof=1) / math.sqrt(samples) if samples > 1 else jnp.full_like(prior, jnp.nan)
    return -(prior + total.mean(0)), VariationalInfo(prior, diffusion.mean(0), reconstruction.mean(0), stderr)


class Law(NamedTuple):
    """The law of the log-SNR from `low` to `high` whose density is sigmoid(log-SNR + shift), up to its mass."""

    shift: Any
    low: Any
    high: Any

    def mass(self, low, high):
        """The integral of the density, not normalised, from low to high."""
        return jax.nn.softplus(high + self.shift) - jax.nn.softplus(low + self.shift)

    def quantile(self, u):
        """The log-SNR below which a share u of the mass is."""
        y = jax.nn.softplus(self.low + self.shift) + u * self.mass(self.low, self.high)
        return jnp.clip(y + safe_log(-jnp.expm1(-y)) - self.shift, self.low, self.high)  # softplus inverted


def _continuous_terms(denoise, schedule, x0, law, lam, eps, t_min, *, v, bins):
    t = time_of(schedule, lam)
    found = denoise.predict(q_sample(schedule, x0, t, eps[0]), t).eps
    share = jax.nn.sigmoid(lam + law.shift).astype(x0.dtype)  # of eps that Gaussian data leave in eps - eps_hat
    squares = _sum((eps[0] - found) ** 2) - share**2 * _sum(eps[0] ** 2 - 1)
    diffusion = 0.5 * squares * law.mass(law.low, law.high).astype(x0.dtype) / share

    away = x0 - denoise(q_sample(schedule, x0, t_min, eps[1]), t_min)
    # 1 / variance = SNR + 1 / sigma_data^2
    end = log_snr(schedule, t_min)
    log_std = -0.5 * jnp.logaddexp(end, -law.shift).astype(x0.dtype)
    reconstruction = _sum(negative_log_likelihood(x0, away, log_std, bins))
    if bins is None:
        reconstruction = reconstruction - 0.5 * jax.nn.sigmoid(end + law.shift).astype(x0.dtype) * _sum(eps[1] ** 2 - 1)
    return diffusion, reconstruction


def _table_terms(denoise, schedule, x0, law, lam, eps, t_min, *, v, bins):
    T, D = schedule.log_nsr.shape[-1], math.prod(x0.shape[1:])

    def cost(t, eps):
        prediction = denoise.predict(q_sample(schedule, x0, t, eps), t)
        return D * math.log(2) * terms_of(prediction, schedule, x0, t, v=v, bins=bins)

    reconstruction = cost(t_min, eps[1])
    if T == 1:
        return jnp.zeros_like(reconstruction), reconstruction
    k = jnp.clip(jnp.ceil(time_of(schedule, lam) * T), 2, T)
    share = law.mass(log_snr(schedule, k / T), log_snr(schedule, (k - 1) / T)) / law.mass(law.low, law.high)
    return cost(k / T, eps[0]) / share.astype(x0.dtype), reconstruction


def _prior_term(schedule, x0, t, mean, std):
    """KL(N(alpha x_0, sigma^2) | N(alpha mean, alpha^2 std^2 + sigma^2)), (B,)."""
    centre, scale = (a[None] for a in moments_at("variational_bound", schedule, x0.shape, t, mean, std, x0.dtype))
    alpha, sigma = expand(schedule.alpha(t), x0), expand(schedule.sigma(t), x0)
    ratio = (sigma / scale) ** 2
    return 0.5 * _sum(ratio - 1 - jnp.log(ratio) + ((alpha * x0 - centre) / scale) ** 2)


def _sum(a):
    return a.sum(axis=tuple(range(1, a.ndim)))
