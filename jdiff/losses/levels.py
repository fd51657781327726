"""Which noise levels to train on: laws of t.

Draws are by position in the global batch: `key` is one key or a `BatchKey`, and row i is a function of (key, i).
A law that learns, `LossAware`, keeps its memory in the training state.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, Number
from jdiff.core.checks import LARGEST, check_count, check_range
from jdiff.core.keys import each, positions, shared, strata
from jdiff.core.pytrees import Noun, concrete, noun
from jdiff.losses.loss_aware import Informed as Informed
from jdiff.losses.loss_aware import LossAware as LossAware
from jdiff.process.clock import Schedule, time_of


@runtime_checkable
class Levels(Protocol):
    """A law of t. A class of your own has this method, and @jdiff.noun above it."""

    def __call__(self, key, n: int, schedule: Schedule) -> Array:
        """n noise levels t, (n,), within the domain of the schedule."""
        ...


@runtime_checkable
class WeightedLevels(Levels, Protocol):
    """A law that prefers some levels without meaning to weigh them more."""

    def importance(self, t: Array, schedule: Schedule) -> Array:
        """What the losses multiply each sample by, (n,), to undo the preference."""
        ...


@noun
class Uniform(Noun):
    """Low-discrepancy uniform t in [t_min, t_max): one random offset and n equal strata.

    t_i = t_min + (t_max - t_min) frac(u + i/n): each t is uniform, and together they cover the interval evenly.

    Args:
        t_min: the lower end; that of the schedule's domain if None.
        t_max: the upper end; that of the schedule's domain if None.

    Raises:
        ValueError: unless 0 <= t_min < t_max <= 1, or t_min = t_max is given.

    Reference:
        Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """

    t_min: Number | None = None
    t_max: Number | None = None

    def check(self):
        _check_ends(self)

    def __call__(self, key, n, schedule):
        low, high = _domain(self, schedule)
        return low + (high - low) * strata(key, n)


@noun
class Independent(Noun):
    """Uniform t in [t_min, t_max), every sample by itself.

    Args:
        t_min: the lower end; that of the schedule's domain if None.
        t_max: the upper end; that of the schedule's domain if None.

    Raises:
        ValueError: unless 0 <= t_min < t_max <= 1, or t_min = t_max is given.
    """

    t_min: Number | None = None
    t_max: Number | None = None

    def check(self):
        _check_ends(self)

    def __call__(self, key, n, schedule):
        low, high = _domain(self, schedule)
        return low + (high - low) * jax.vmap(jax.random.uniform)(each(key, n))


@noun
class Knots(Noun):
    """Low-discrepancy uniform t over the T knots k/T of a DDPM table.

    Args:
        T: the number of steps of the table.

    Raises:
        ValueError: unless T is a whole number, 1 or more.
    """

    T: Number

    def check(self):
        check_count(self, T=self.T)

    def __call__(self, key, n, schedule):
        return (jnp.floor(strata(key, n) * self.T) + 1) / self.T


@noun
class Antithetic(Noun):
    """Uniform t over the T knots of a table, in pairs: rows i and i + n/2 have table indices k and T - 1 - k.

    Args:
        T: the number of steps of the table.

    Raises:
        ValueError: unless T is a whole number, 1 or more.
    """

    T: Number

    def check(self):
        check_count(self, T=self.T)

    def __call__(self, key, n, schedule):
        index, size = positions(key, n)
        half = (size + 1) // 2
        u = jax.random.uniform(shared(key), (half,))[index % half]
        k = jnp.floor(u * self.T)
        return (jnp.where(index < half, k, self.T - 1 - k) + 1) / self.T


@noun
class LogNormal(Noun):
    """log(sigma/alpha) ~ N(mean, std^2), clipped to the schedule's domain.

    Karras et al. 2022, arXiv:2206.00364, table 1; through `time_of` it holds for every schedule.
    """

    mean: Number = -1.2
    std: Number = 1.2

    def check(self):
        check_range(self, -LARGEST, mean=self.mean)
        check_range(self, 0, std=self.std)

    def __call__(self, key, n, schedule):
        log_sigma = self.mean + self.std * _normals(key, n)
        return jnp.clip(time_of(schedule, -2 * log_sigma), schedule.t_min, schedule.t_max)


@noun
class LogitNormal(Noun):
    """logit(t) ~ N(mean, std^2), clipped to the schedule's domain.

    Args:
        mean: of logit(t).
        std: of logit(t), 0 or more.

    Reference:
        Esser et al. 2024, arXiv:2403.03206, eq. 19.
    """

    mean: Number = 0.0
    std: Number = 1.0

    def check(self):
        check_range(self, -LARGEST, mean=self.mean)
        check_range(self, 0, std=self.std)

    def __call__(self, key, n, schedule):
        t = jax.nn.sigmoid(self.mean + self.std * _normals(key, n))
        return jnp.clip(t, schedule.t_min, schedule.t_max)


def _domain(law, schedule) -> tuple[Number, Number]:
    """Where t begins and ends: as the law says, else as the schedule does."""
    low = schedule.t_min if law.t_min is None else law.t_min
    return low, schedule.t_max if law.t_max is None else law.t_max


def _check_ends(law) -> None:
    """Raise ValueError unless 0 <= t_min < t_max <= 1, or t_min = t_max is given; traced ends are not looked at."""
    check_range(law, 0, 1, t_min=law.t_min, t_max=law.t_max)
    low, high = (0.0 if law.t_min is None else law.t_min), (1.0 if law.t_max is None else law.t_max)
    one = law.t_min is not None and law.t_max is not None
    if concrete(low, high) and not ((np.asarray(low) < high) | (one & (np.asarray(low) == high))).all():
        raise ValueError(f"{type(law).__name__}: t_min must be below t_max, got {law.t_min} and {law.t_max}")


def _normals(key, n: int) -> Array:
    return jax.vmap(jax.random.normal)(each(key, n))
