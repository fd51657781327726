"""Which noise levels to train on: laws of t, called as `levels(key, n, schedule) -> t (n,)`.

Draws are by position in the global batch: `key` is one key or a `BatchKey`, and row i is a function of (key, i).
"""

import jax
import jax.numpy as jnp

from jdiff.arrays import Array, BatchKey, Number, as_key, each, noun, positions
from jdiff.schedules import time_of


@noun
class Uniform:
    """Low-discrepancy uniform t in [t_min, t_max): one random offset and n equal strata.

    t_i = t_min + (t_max - t_min) frac(u + i/n): each t is uniform, and together they cover the interval evenly.
    The schedule's own domain when an end is None.  Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """

    t_min: Number | None = None
    t_max: Number | None = None

    def __call__(self, key, n, schedule):
        low = schedule.t_min if self.t_min is None else self.t_min
        high = schedule.t_max if self.t_max is None else self.t_max
        return low + (high - low) * _strata(key, n)


@noun
class Knots:
    """Low-discrepancy uniform over the T knots k/T of a DDPM table."""

    T: Number

    def __call__(self, key, n, schedule):
        return (jnp.floor(_strata(key, n) * self.T) + 1) / self.T


@noun
class Antithetic:
    """Uniform over the T knots, in pairs: rows i and i + n/2 have table indices k and T - 1 - k."""

    T: Number

    def __call__(self, key, n, schedule):
        index, size = positions(key, n)
        half = (size + 1) // 2
        u = jax.random.uniform(_base(key), (half,))[index % half]
        k = jnp.floor(u * self.T)
        return (jnp.where(index < half, k, self.T - 1 - k) + 1) / self.T


@noun
class LogNormal:
    """log(sigma/alpha) ~ N(mean, std^2), clipped to the schedule's domain.

    Karras et al. 2022, arXiv:2206.00364, table 1; through `time_of` it holds for every schedule.
    """

    mean: Number = -1.2
    std: Number = 1.2

    def __call__(self, key, n, schedule):
        log_sigma = self.mean + self.std * _normals(key, n)
        return jnp.clip(time_of(schedule, -2 * log_sigma), schedule.t_min, schedule.t_max)


@noun
class LogitNormal:
    """logit(t) ~ N(mean, std^2), clipped to the schedule's domain.  Esser et al. 2024, arXiv:2403.03206, eq. 19."""

    mean: Number = 0.0
    std: Number = 1.0

    def __call__(self, key, n, schedule):
        t = jax.nn.sigmoid(self.mean + self.std * _normals(key, n))
        return jnp.clip(t, schedule.t_min, schedule.t_max)


def _strata(key, n: int) -> Array:
    """frac(u + i/size), one u for the whole global batch; for (B,) keys, one independent uniform each."""
    base = _base(key)
    if base.ndim:
        return jax.vmap(jax.random.uniform)(each(base, n))
    index, size = positions(key, n)
    u = jax.random.uniform(base)
    return (u + index.astype(u.dtype) / size) % 1


def _base(key) -> Array:
    """The key that all rows of the global batch share."""
    return as_key(key.key if isinstance(key, BatchKey) else key)


def _normals(key, n: int) -> Array:
    return jax.vmap(jax.random.normal)(each(key, n))
