"""Where the solver stops: descending times, the last of which is where `sample` denoises.

`n` is always the number of times. With a static `size`, n may be traced: the first n entries are the grid, and
the last time repeats up to `size`, so that one compiled sampler serves every n <= size.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.special import betainc, betaln

from jdiff.core.arrays import Array, Number, as_time
from jdiff.core.inverse import bisected
from jdiff.core.names import choose
from jdiff.core.pytrees import concrete
from jdiff.process.clock import Schedule, time_of
from jdiff.process.clock import log_snr as log_snr_of
from jdiff.process.learned_grid import optimize as optimize
from jdiff.process.times import LOWEST_LOG_SNR, ends_of


def uniform(n, t_min: float = 1e-3, t_max: float = 1.0, *, size: int | None = None) -> Array:
    """n times evenly spaced from t_max down to t_min.

    >>> [round(float(t), 3) for t in uniform(3, 0.0, size=4)]
    [1.0, 0.5, 0.0, 0.0]

    Args:
        n: the number of times.
        t_min: the last time.
        t_max: the first time.
        size: the length of the result if n is traced; the last time repeats up to it.

    Returns:
        The times, (n,) or (size,), descending.

    Raises:
        ValueError: unless 0 <= t_min < t_max.
    """
    if concrete(t_min, t_max) and not 0 <= t_min < t_max:
        raise ValueError(f"grid: t_min must be in [0, t_max), got t_min = {t_min}, t_max = {t_max}")
    u = _fractions(n, size)
    return _pinned(t_max + u * (t_min - t_max), u, t_min, t_max)


def log_snr(
    schedule: Schedule,
    n,
    t_min: Number | None = None,
    t_max: Number | None = None,
    *,
    lowest=LOWEST_LOG_SNR,
    size: int | None = None,
) -> Array:
    """n times evenly spaced in log-SNR.

    If the log-SNR of t_max is below `lowest`, the spacing starts at `lowest`: at a lower log-SNR x_t is noise. A
    table that ends with a little signal, alpha = 2e-9 say, then starts there too, and not at t_max: there x_0 = (x_t -
    sigma eps) / alpha would multiply a network's error by 1 / alpha. The first time is t_max where alpha is 0, and
    where the log-SNR of t_max is less than 1 below `lowest`.

    Args:
        schedule: the noise schedule.
        n: the number of times.
        t_min: the last time, the schedule's own end if None.
        t_max: the first time, the schedule's own end if None.
        lowest: the log-SNR at which the spacing starts at the latest.
        size: the length of the result if n is traced; the last time repeats up to it.

    Returns:
        The times, (n,) or (size,), descending.

    Raises:
        ValueError: for ends out of order or outside the schedule, and for a `lowest` above the log-SNR of t_min.

    Reference:
        Lu et al. 2022, arXiv:2206.00927, section 3.4.
    """
    t_min, t_max = ends_of("grid", schedule, t_min, t_max)
    (t_first, start), stop = _start(schedule, t_max, lowest), log_snr_of(schedule, t_min)
    if concrete(start, stop) and not start < stop:
        raise ValueError(f"grid: lowest must be below {stop}, the log-SNR at which the grid ends; got {lowest}")
    u = _fractions(n, size, stop.dtype)
    return _pinned(time_of(schedule, start + u * (stop - start)), u, t_min, t_first)


exponential = log_snr  # k-diffusion's name: log(sigma/alpha) is minus half the log-SNR


def karras(schedule: Schedule, n, rho=7.0, sigma_min=None, sigma_max=None, *, size: int | None = None) -> Array:
    """n times whose (sigma/alpha)^(1/rho) are evenly spaced from sigma_max down to sigma_min.

    Args:
        schedule: the noise schedule.
        n: the number of times.
        rho: the exponent; larger values take shorter steps at low noise.
        sigma_min: the last sigma/alpha, clipped to what the schedule reaches; its own end if None.
        sigma_max: the first sigma/alpha, clipped likewise; if None, the schedule's own end, or the sigma/alpha of
            a log-SNR of -10 where that is smaller, as for `log_snr`.
        size: the length of the result if n is traced; the last time repeats up to it.

    Returns:
        The times, (n,) or (size,), descending.

    Raises:
        ValueError: if the two ends leave no range.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, eq. 5.
    """

    _check_rho("karras", rho)

    def ratio(first, last, u):
        return (first ** (1 / rho) + u * (last ** (1 / rho) - first ** (1 / rho))) ** rho

    return _between(schedule, ratio, n, sigma_min, sigma_max, size)


def polyexponential(
    schedule: Schedule, n, rho=1.0, sigma_min=None, sigma_max=None, *, size: int | None = None
) -> Array:
    """n times with log(sigma/alpha) = log sigma_min + (1 - u)^rho log(sigma_max/sigma_min), u evenly spaced in [0, 1].

    rho = 1 is `exponential`. The name is that of Crowson's k-diffusion.

    Args:
        schedule: the noise schedule.
        n: the number of times.
        rho: the exponent; larger values take shorter steps at low noise.
        sigma_min: the last sigma/alpha, clipped to what the schedule reaches; its own end if None.
        sigma_max: the first sigma/alpha, clipped likewise; if None, the schedule's own end, or the sigma/alpha of
            a log-SNR of -10 where that is smaller, as for `log_snr`.
        size: the length of the result if n is traced; the last time repeats up to it.

    Returns:
        The times, (n,) or (size,), descending.

    Raises:
        ValueError: if the two ends leave no range.
    """

    _check_rho("polyexponential", rho)

    def ratio(first, last, u):
        return jnp.exp(jnp.log(last) + (1 - u) ** rho * (jnp.log(first) - jnp.log(last)))

    return _between(schedule, ratio, n, sigma_min, sigma_max, size)


def beta(schedule: Schedule, n, alpha=0.6, beta=0.6, t_min=None, t_max=None, *, size: int | None = None) -> Array:
    """n times at the quantiles 1, ..., 0 of a Beta(alpha, beta) law over [t_min, t_max]: dense at both ends.

    t = t_min + (t_max - t_min) I^(-1)(1 - u; alpha, beta), where I is the incomplete beta function and u evenly spaced.
    alpha = beta = 1 is `uniform`. A table that ends with a little signal starts as for `log_snr`.

    Args:
        schedule: the noise schedule.
        n: the number of times.
        alpha: the law's first parameter, positive.
        beta: the law's second parameter, positive.
        t_min: the last time, the schedule's own end if None.
        t_max: the first time, the schedule's own end if None.
        size: the length of the result if n is traced; the last time repeats up to it.

    Returns:
        The times, (n,) or (size,), descending.

    Raises:
        ValueError: for parameters that are not positive, and ends out of order or outside the schedule.

    Reference:
        Lee et al. 2024, arXiv:2407.12173, section 3.3.
    """
    if concrete(alpha, beta) and not (alpha > 0 and beta > 0):
        raise ValueError(f"grid.beta: alpha and beta must be positive, got {alpha} and {beta}")
    t_min, t_max = ends_of("grid", schedule, t_min, t_max)
    t_max, _ = _start(schedule, t_max, LOWEST_LOG_SNR)
    u = _fractions(n, size, jnp.result_type(t_min, t_max))
    share = _beta_quantile(jnp.asarray(alpha, u.dtype), jnp.asarray(beta, u.dtype), 1 - u)
    return _pinned(t_min + (t_max - t_min) * share, u, t_min, t_max)


@jax.custom_jvp
def _beta_quantile(a, b, q):
    """The x in [0, 1] with I(x; a, b) = q, by bisection."""
    return bisected(lambda x: betainc(a, b, x) >= q, q, a, b)


@_beta_quantile.defjvp
def _beta_quantile_jvp(primals, tangents):
    """From I(x; a, b) = q:  dx = (dq - I_a da - I_b db) / density(x); I_a and I_b by central differences."""
    (a, b, q), (da, db, dq) = primals, tangents
    x = _beta_quantile(a, b, q)
    h = float(jnp.finfo(q.dtype).eps) ** (1 / 3)
    by_a = (betainc(a * (1 + h), b, x) - betainc(a * (1 - h), b, x)) / (2 * h * a)
    by_b = (betainc(a, b * (1 + h), x) - betainc(a, b * (1 - h), x)) / (2 * h * b)
    inside = (q > 0) & (q < 1)
    x_in = jnp.where(inside, x, 0.5)
    log_density = (a - 1) * jnp.log(x_in) + (b - 1) * jnp.log1p(-x_in) - betaln(a, b)
    return x, jnp.where(inside, (dq - by_a * da - by_b * db) * jnp.exp(-log_density), 0)


def shift(times: Array, shift) -> Array:
    """Times of a `Flow` grid moved to a higher resolution's noise: shift t / (1 + (shift - 1) t).

    shift = sqrt(pixels / base pixels) keeps the uncertainty of the base resolution. The network is still shown the new
    times.

    >>> [round(float(t), 3) for t in shift(uniform(3, 0.0), 3.0)]
    [1.0, 0.75, 0.0]

    Args:
        times: times of any shape.
        shift: how much noisier, positive; 1 changes nothing.

    Returns:
        The new times, of the shape of `times`.

    Raises:
        ValueError: unless shift > 0.

    Reference:
        Esser et al. 2024, arXiv:2403.03206, eq. 23.
    """
    if concrete(shift) and not shift > 0:
        raise ValueError(f"grid.shift: shift must be positive, got {shift}")
    times = as_time(times)
    return shift * times / (1 + (shift - 1) * times)


def of_sigmas(schedule: Schedule, sigmas, n=None, *, size: int | None = None) -> Array:
    """The times at which sigma/alpha has given values; with n, a list of values interpolated to n times.

    It is for published lists, whose log sigma is interpolated linearly along the list.

    >>> from jdiff import EDM
    >>> [round(float(EDM().sigma(t)), 3) for t in of_sigmas(EDM(), [16.0, 4.0, 1.0], 5)]
    [16.0, 8.0, 4.0, 2.0, 1.0]

    Args:
        schedule: the noise schedule.
        sigmas: values of sigma/alpha, (K,), positive, descending. One value may lie beyond each end of the schedule's
            range and is clipped to it. Drop a final 0: `sample` denoises at the last time.
        n: the number of times, K if None.
        size: the length of the result if n is traced; the last time repeats up to it.

    Returns:
        The times, (n,) or (size,), descending.

    Raises:
        ValueError: for values that are not positive, do not descend, or leave the range by more than one.

    Reference:
        Sabour et al. 2024, arXiv:2404.14507 ("align your steps").
    """
    sigmas = as_time(sigmas)
    if sigmas.ndim != 1 or not sigmas.shape[0]:
        raise ValueError(f"grid.of_sigmas: sigmas have shape {sigmas.shape}; expected (K,) with K >= 1")
    t_min, t_max = ends_of("grid", schedule, None, None)
    low, high = -0.5 * log_snr_of(schedule, t_min), -0.5 * log_snr_of(schedule, t_max)
    logs = jnp.log(sigmas).astype(low.dtype)
    if concrete(logs, low, high):
        with jax.ensure_compile_time_eval():
            _check_sigmas(np.asarray(sigmas), np.asarray(logs), np.asarray(low), np.asarray(high))
    logs = jnp.clip(logs, low, high)
    K = len(sigmas)
    u = _fractions(K if n is None else n, size, logs.dtype)
    if K > 1:
        logs = jnp.interp(u * (K - 1), jnp.arange(K, dtype=u.dtype), logs)
    else:
        logs = jnp.broadcast_to(logs, u.shape)
    return jnp.clip(time_of(schedule, -2 * logs), t_min, t_max)


def _check_sigmas(sigmas, logs, low, high) -> None:
    if not (sigmas > 0).all():
        raise ValueError(
            f"grid.of_sigmas: sigma/alpha must be positive, got {sigmas.min()}; drop a final 0, sample denoises anyway"
        )
    rises = ~(np.diff(sigmas) < 0)
    if rises.any():
        i = int(np.argmax(rises))
        raise ValueError(f"grid.of_sigmas: must descend; sigmas[{i}] = {sigmas[i]}, sigmas[{i + 1}] = {sigmas[i + 1]}")
    if (logs > high).sum() > 1 or (logs < low).sum() > 1:
        raise ValueError(
            f"grid.of_sigmas: {sigmas[0]} to {sigmas[-1]} leaves the schedule's sigma/alpha, "
            f"{np.exp(low):.4g} to {np.exp(high):.4g}; keep to its range"
        )


def discrete(T: int, n, spacing: str = "leading", offset: int = 0, *, size: int | None = None) -> Array:
    """n of the knots t = k/T of a DDPM table; k - 1 is the index that the network sees.

    k - 1 = j (T // n) + offset for `leading` (DDIM's), round(T - j T/n) - 1 for `trailing`, round(j (T - 1)/(n - 1))
    for `linspace`; halves round to even.

    >>> [round(float(t) * 1000) - 1 for t in discrete(1000, 5, "leading")]
    [800, 600, 400, 200, 0]
    >>> [round(float(t) * 1000) - 1 for t in discrete(1000, 5, "trailing")]
    [999, 799, 599, 399, 199]

    Args:
        T: the number of steps of the table.
        n: the number of times, at most T.
        spacing: leading, trailing or linspace.
        offset: what is added to each index.
        size: the length of the result if n is traced; the last time repeats up to it.

    Returns:
        The times, (n,) or (size,), descending.

    Raises:
        ValueError: for n > T, an unknown spacing, or an offset that leaves the table.

    Reference:
        Lin et al. 2023, arXiv:2305.08891, table 2.
    """
    index_of = choose("spacing of grid.discrete", spacing, _SPACINGS)
    _check_count(n, size)
    if concrete(n) and n > T:
        raise ValueError(f"grid.discrete: {n} times from a table of {T}; n must be at most T")
    j = jnp.minimum(jnp.arange(size or n), n - 1)
    index = index_of(T, n, j) + offset
    if concrete(index) and not (0 <= np.asarray(index).min() and np.asarray(index).max() < T):
        raise ValueError(f"grid.discrete: offset {offset} leaves the table: indices would run to {index.max()} of {T}")
    return (index + 1).astype(float) / T


def _rounded_ratio(a, b):
    """round(a / b) for integers, halves to even, exact where float32 is not."""
    quotient, twice = a // b, 2 * (a % b)
    return quotient + ((twice > b) | ((twice == b) & (quotient % 2 == 1)))


_SPACINGS = {
    "leading": lambda T, n, j: (n - 1 - j) * (T // n),
    "trailing": lambda T, n, j: _rounded_ratio(T * (n - j), n) - 1,
    "linspace": lambda T, n, j: _rounded_ratio((T - 1) * (n - 1 - j), jnp.maximum(n - 1, 1)) if T > 1 else 0 * j,
}


def _check_count(n, size) -> None:
    if not concrete(n):
        if size is None:
            raise ValueError("grid: n is traced, so the length must be given: size=the largest n")
    elif isinstance(n, bool) or n != int(n) or n < 1:
        raise ValueError(f"grid: n is the number of times, a positive integer; got {n}")
    elif size is not None and n > size:
        raise ValueError(f"grid: n = {n} times do not fit in size = {size}")


def _check_rho(name: str, rho) -> None:
    if concrete(rho) and not 0 < float(rho) < np.inf:
        raise ValueError(f"{name}: rho must be positive, got {rho}")


def _fractions(n, size, dtype=None) -> Array:
    """0, 1/(n-1), ..., 1, then 1 up to `size`."""
    _check_count(n, size)
    j = jnp.arange(size or n, dtype=dtype or jnp.zeros(()).dtype)
    return jnp.minimum(j / jnp.maximum(jnp.asarray(n, j.dtype) - 1, 1), 1)


def _between(schedule, ratio, n, sigma_min, sigma_max, size) -> Array:
    """Times at sigma/alpha = ratio(first, last, u), u from 0 to 1, first and last being the ends after clipping."""
    t_min, t_max = ends_of("grid", schedule, None, None)
    low, high = (jnp.exp(-0.5 * log_snr_of(schedule, t)) for t in (t_min, t_max))
    t_first, start = _start(schedule, t_max, LOWEST_LOG_SNR)
    first = jnp.exp(-0.5 * start) if sigma_max is None else jnp.clip(as_time(sigma_max), low, high)
    last = low if sigma_min is None else jnp.clip(as_time(sigma_min), low, high)
    if concrete(first, last) and not last < first:
        raise ValueError(f"grid: [{sigma_min}, {sigma_max}] leaves no range of sigma/alpha in [{low}, {high}]")
    u = _fractions(n, size, first.dtype)
    times = time_of(schedule, -2 * jnp.log(ratio(first, last, u)))
    return _pinned(times, u, t_min if sigma_min is None else times[-1], t_first if sigma_max is None else times[0])


def _start(schedule, t_max, lowest) -> tuple[Array, Array]:
    """(first time, log-SNR at which the spacing starts) of a grid from t_max down: see `log_snr`."""
    own = log_snr_of(schedule, t_max)
    start = jnp.maximum(own, jnp.asarray(lowest, own.dtype))
    later = (schedule.alpha(t_max) > 0) & (own < start - 1)
    return jnp.where(later, time_of(schedule, start), t_max), start


def _pinned(times, u, t_min, t_max):
    """The two ends exactly, whatever rounding or clipping did on the way."""
    return jnp.where(u == 0, t_max, jnp.where(u == 1, t_min, times))
