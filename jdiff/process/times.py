"""The checks of a grid of times."""

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, as_time
from jdiff.core.pytrees import concrete
from jdiff.process.clock import Schedule, check_schedule

LOWEST_LOG_SNR = -10.0  # the lowest log-SNR that is worth a step, close to VP's own at t = 1


def ends_of(name: str, schedule: Schedule, t_min, t_max) -> tuple[Array, Array]:
    """The ends of a stretch of time, the schedule's own where None is given.

    Args:
        name: who asks, for the message.
        schedule: the noise schedule.
        t_min: the last time, or None.
        t_max: the first time, or None.

    Returns:
        (t_min, t_max), floating.

    Raises:
        ValueError: for ends out of order or outside the schedule; traced values are not looked at.
    """
    check_schedule(schedule)
    t_min = schedule.t_min if t_min is None else t_min
    t_max = schedule.t_max if t_max is None else t_max
    if concrete(t_min, t_max, schedule.t_min) and not schedule.t_min * (1 - 1e-6) <= float(t_min) < float(t_max):
        raise ValueError(
            f"{name}: times must satisfy {schedule.t_min} <= t_min < t_max on {type(schedule).__name__}, "
            f"got t_min = {t_min}, t_max = {t_max}"
        )
    return as_time(t_min), as_time(t_max)


def check_times(schedule: Schedule, times) -> Array:
    """`times` as an array, after the checks of a caller's grid: (N,), descending, sigma > 0 at its end.

    Raises ValueError otherwise; traced values are not looked at.
    """
    check_schedule(schedule)
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
    name, least = type(schedule).__name__, schedule.t_min if schedule.bounded else 0.0
    if values[0] > schedule.last_time * (1 + 1e-6) or values[-1] < least * (1 - 1e-6):
        raise ValueError(
            f"times run from {values[0]} to {values[-1]}, outside [{least:g}, {schedule.last_time:g}] where {name} is "
            f"defined; its own ends are t_max = {schedule.t_max} and t_min = {schedule.t_min}"
        )
    if not schedule.sigma(jnp.asarray(values[-1])) > 0:
        raise ValueError(
            f"times end at {values[-1]}, where sigma = 0 and there is nothing to denoise; "
            f"end at t_min = {schedule.t_min} instead: the last denoise goes the rest of the way"
        )
