"""Where the solver stops: descending times, the last of which is where `sample` denoises.

`n` is always the number of times. With a static `size`, n may be traced: the first n entries are the grid, and
the last time repeats up to `size`, so that one compiled sampler serves every n <= size.
"""

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.arrays import Array, as_time, concrete
from jdiff.schedules import Schedule, time_of
from jdiff.schedules import log_snr as log_snr_of

LOWEST_LOG_SNR = -10.0  # where a grid in log-SNR starts if alpha = 0 there: VP's own value at t = 1


def uniform(n, t_min: float = 1e-3, t_max: float = 1.0, *, size: int | None = None) -> Array:
    """n times evenly spaced from t_max down to t_min.

    >>> [round(float(t), 3) for t in uniform(3, 0.0, size=4)]
    [1.0, 0.5, 0.0, 0.0]
    """
    if concrete(t_min, t_max) and not 0 <= t_min < t_max:
        raise ValueError(f"grid: t_min must be in [0, t_max), got t_min = {t_min}, t_max = {t_max}")
    u = _fractions(n, size)
    return t_max + u * (t_min - t_max)


def log_snr(schedule: Schedule, n, t_min: float | None = None, t_max: float | None = None, *, size=None) -> Array:
    """n times evenly spaced in log-SNR, from t_max down to t_min (the schedule's own ends when None).

    Lu et al. 2022, arXiv:2206.00927, section 3.4. Where alpha(t_max) = 0 the spacing starts at log-SNR -10.
    """
    t_min, t_max = _ends(schedule, t_min, t_max)
    start, stop = _reachable_log_snr(schedule, t_max), log_snr_of(schedule, t_min)
    u = _fractions(n, size, stop.dtype)
    return _pinned(time_of(schedule, start + u * (stop - start)), u, t_min, t_max)


def karras(schedule: Schedule, n, rho=7.0, sigma_min=None, sigma_max=None, *, size: int | None = None) -> Array:
    """n times whose (sigma/alpha)^(1/rho) are evenly spaced from sigma_max down to sigma_min.

    Karras et al. 2022, arXiv:2206.00364, eq. 5. sigma_min and sigma_max are values of sigma/alpha, clipped to what
    the schedule reaches on its domain, and its ends when None; where alpha = 0 there, spacing starts at log-SNR -10.
    """
    t_min, t_max = _ends(schedule, None, None)
    low, high = jnp.exp(-0.5 * log_snr_of(schedule, t_min)), jnp.exp(-0.5 * _reachable_log_snr(schedule, t_max))
    first = high if sigma_max is None else jnp.clip(as_time(sigma_max), low, high)
    last = low if sigma_min is None else jnp.clip(as_time(sigma_min), low, high)
    if concrete(first, last) and not last < first:
        raise ValueError(f"grid.karras: [{sigma_min}, {sigma_max}] leaves no range of sigma/alpha in [{low}, {high}]")
    u = _fractions(n, size, first.dtype)
    ratio = (first ** (1 / rho) + u * (last ** (1 / rho) - first ** (1 / rho))) ** rho
    times = time_of(schedule, -2 * jnp.log(ratio))
    return _pinned(times, u, t_min if sigma_min is None else times[-1], t_max if sigma_max is None else times[0])


def discrete(T: int, n, spacing: str = "leading", offset: int = 0, *, size: int | None = None) -> Array:
    """n of the knots t = k/T of a DDPM table; k - 1 is the index the network sees.

    k - 1 = j (T // n) + offset for `leading` (DDIM's), round(T - j T/n) - 1 for `trailing`, round(j (T - 1)/(n - 1))
    for `linspace`; halves round to even. Lin et al. 2023, arXiv:2305.08891, table 2. Raises ValueError for n > T, an
    unknown spacing, or an offset that leaves the table.

    >>> [round(float(t) * 1000) - 1 for t in discrete(1000, 5, "leading")]
    [800, 600, 400, 200, 0]
    >>> [round(float(t) * 1000) - 1 for t in discrete(1000, 5, "trailing")]
    [999, 799, 599, 399, 199]
    """
    if spacing not in _SPACINGS:
        raise ValueError(f"grid.discrete: unknown spacing {spacing!r}; one of {', '.join(_SPACINGS)}")
    _check_count(n, size)
    if concrete(n) and n > T:
        raise ValueError(f"grid.discrete: {n} times from a table of {T}; n must be at most T")
    j = jnp.minimum(jnp.arange(size or n), n - 1)
    index = _SPACINGS[spacing](T, n, j) + offset
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
    elif n != int(n) or n < 1:
        raise ValueError(f"grid: n is the number of times, a positive integer; got {n}")
    elif size is not None and n > size:
        raise ValueError(f"grid: n = {n} times do not fit in size = {size}")


def _fractions(n, size, dtype=None) -> Array:
    """0, 1/(n-1), ..., 1, then 1 up to `size`."""
    _check_count(n, size)
    j = jnp.arange(size or n, dtype=dtype or jnp.zeros(()).dtype)
    return jnp.minimum(j / jnp.maximum(jnp.asarray(n, j.dtype) - 1, 1), 1)


def _ends(schedule, t_min, t_max):
    t_min = schedule.t_min if t_min is None else t_min
    t_max = schedule.t_max if t_max is None else t_max
    if concrete(t_min, t_max) and not schedule.t_min * (1 - 1e-6) <= t_min < t_max:
        raise ValueError(
            f"grid: times must satisfy {schedule.t_min} <= t_min < t_max on {type(schedule).__name__}, "
            f"got t_min = {t_min}, t_max = {t_max}"
        )
    return as_time(t_min), as_time(t_max)


def _reachable_log_snr(schedule, t_max):
    return jnp.where(schedule.alpha(t_max) > 0, log_snr_of(schedule, t_max), LOWEST_LOG_SNR)


def _pinned(times, u, t_min, t_max):
    """The two ends exactly, whatever rounding or clipping did on the way."""
    return jnp.where(u == 0, t_max, jnp.where(u == 1, t_min, times))


def check_times(schedule: Schedule, times) -> Array:
    """`times` as an array, after the checks of a caller's grid: (N,), descending, sigma > 0 at its end.

    Raises ValueError otherwise; traced values are not looked at.
    """
    times = as_time(times)
    if times.ndim != 1 or not times.shape[0]:
        raise ValueError(f"times have shape {times.shape}; expected (N,) with N >= 1")
    if concrete(times, schedule):
        with jax.ensure_compile_time_eval():  # inside jit even a constant's slice is traced
            _check_values(schedule, np.asarray(times))
    return times


def _check_values(schedule, values: np.ndarray) -> None:
    rises = ~(np.diff(values) < 0)
    if rises.any():
        i = int(np.argmax(rises))
        raise ValueError(
            f"times must descend, from noise to data; times[{i}] = {values[i]}, times[{i + 1}] = {values[i + 1]}"
        )
    if not schedule.sigma(jnp.asarray(values[-1])) > 0:
        raise ValueError(
            f"times end at {values[-1]}, where sigma = 0 and there is nothing to denoise; "
            f"end at t_min = {schedule.t_min} instead: the last denoise goes the rest of the way"
        )
