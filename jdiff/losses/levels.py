"""Which noise levels to train on: laws of t, called as `levels(key, n, schedule) -> t (n,)`.

Draws are by position in the global batch: `key` is one key or a `BatchKey`, and row i is a function of (key, i).
A law that prefers some levels without meaning to weigh them more also has `importance(t, schedule) -> (n,)`, by which
the losses multiply each sample. A law that learns, `LossAware`, keeps its memory in the training state.
"""

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array, Number, safe_divide
from jdiff.core.checks import LARGEST, check_count, check_range
from jdiff.core.keys import each, positions, shared, strata
from jdiff.core.pytrees import concrete, noun, static
from jdiff.process.clock import Schedule, time_of


@noun
class Uniform:
    """Low-discrepancy uniform t in [t_min, t_max): one random offset and n equal strata.

    t_i = t_min + (t_max - t_min) frac(u + i/n): each t is uniform, and together they cover the interval evenly.
    The schedule's own domain when an end is None.  Kingma et al. 2021, arXiv:2107.00630, appendix I.1.
    """

    t_min: Number | None = None
    t_max: Number | None = None

    def check(self):
        _check_ends(self)

    def __call__(self, key, n, schedule):
        low, high = _ends(self, schedule)
        return low + (high - low) * strata(key, n)


@noun
class Independent:
    """Uniform t in [t_min, t_max), every sample by itself; the schedule's own domain when an end is None."""

    t_min: Number | None = None
    t_max: Number | None = None

    def check(self):
        _check_ends(self)

    def __call__(self, key, n, schedule):
        low, high = _ends(self, schedule)
        return low + (high - low) * jax.vmap(jax.random.uniform)(each(key, n))


@noun
class Knots:
    """Low-discrepancy uniform over the T knots k/T of a DDPM table."""

    T: Number

    def check(self):
        check_count(self, T=self.T)

    def __call__(self, key, n, schedule):
        return (jnp.floor(strata(key, n) * self.T) + 1) / self.T


@noun
class Antithetic:
    """Uniform over the T knots, in pairs: rows i and i + n/2 have table indices k and T - 1 - k."""

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
class LogNormal:
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
class LogitNormal:
    """logit(t) ~ N(mean, std^2), clipped to the schedule's domain.  Esser et al. 2024, arXiv:2403.03206, eq. 19."""

    mean: Number = 0.0
    std: Number = 1.0

    def check(self):
        check_range(self, -LARGEST, mean=self.mean)
        check_range(self, 0, std=self.std)

    def __call__(self, key, n, schedule):
        t = jax.nn.sigmoid(self.mean + self.std * _normals(key, n))
        return jnp.clip(t, schedule.t_min, schedule.t_max)


@noun
class LossAware:
    """t in one of `bins` equal parts of the domain, with probability p ~ sqrt(E[loss^2]) over its last few losses.

    The domain is the schedule's, or the T knots k/T of a table: then T must be a multiple of `bins`, and `bins` = T is
    the published law. Uniform, and low-discrepancy as `Uniform` and `Knots` are, until each bin has `history` losses;
    then p, mixed with a share `uniform` of the uniform law. Losses are multiplied by 1 / (bins p), so that their mean
    stays what it is under the uniform law, with less variance.  Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 18.

    Pure functions around a state of arrays, which rides in `TrainState.extra`: `losses.loss_aware` ties them together.
    Raises ValueError for bins or a history below 1, and a T that the bins do not divide.
    """

    T: Number | None = None
    uniform: Number = 0.001
    bins: int = static(100)
    history: int = static(10)

    def check(self):
        for name, value in dict(bins=self.bins, history=self.history).items():
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise ValueError(f"LossAware: {name} must be a whole number, 1 or more; got {value!r}")
        check_range(self, 0, 1, uniform=self.uniform)
        if self.T is not None:
            check_count(self, T=self.T)
        if self.T is not None and concrete(self.T) and self.T % self.bins:
            raise ValueError(f"LossAware: {self.bins} bins do not divide a table of {self.T:g} steps evenly")

    def init(self) -> dict:
        """The state before training: `losses` (bins, history), and how often each bin was written, `count` (bins,).

        Both floating, so that the average over the devices of a pmap leaves them as they are.
        """
        return dict(losses=jnp.zeros((self.bins, self.history)), count=jnp.zeros(self.bins))

    def shares(self, state: dict) -> Array:
        """The probability p of each bin, (bins,)."""
        size = jnp.sqrt(jnp.mean(state["losses"] ** 2, axis=1))
        informed = (1 - self.uniform) * safe_divide(size, size.sum()) + self.uniform / self.bins
        ready = (state["count"] >= self.history).all() & (size.sum() > 0)
        return jnp.where(ready, informed, 1 / self.bins)

    def draw(self, state: dict, key, n: int, schedule: Schedule) -> tuple[Array, Array]:
        """(t, 1 / (bins p)), each (n,)."""
        p = self.shares(state)
        total = jnp.cumsum(p)
        u = strata(key, n) * total[-1]
        chosen = jnp.clip(jnp.searchsorted(total, u, side="right"), 0, self.bins - 1)
        inside = jnp.clip((u - (total - p)[chosen]) / p[chosen], 0, 1 - jnp.finfo(u.dtype).epsneg)
        if self.T is None:
            low, high = schedule.t_min, schedule.t_max
            t = low + (high - low) * jnp.minimum((chosen + inside) / self.bins, 1)
        else:
            t = (chosen * (self.T / self.bins) + jnp.floor(inside * (self.T / self.bins)) + 1) / self.T
        return t, 1 / (self.bins * p[chosen])

    def at(self, state: dict) -> "Informed":
        """The law of t that the state has come to, for the keyword `levels` of any loss."""
        return Informed(self, state)

    def update(self, state: dict, t: Array, each: Array, schedule: Schedule, *, axis_name: str | None = None) -> dict:
        """The state after a batch with losses `each` at `t`, both (B,), before they are multiplied by anything.

        In the order of the rows, as if one after the other. In a pmap give its `axis_name`: every device then learns
        from all rows of the batch, and the state is that of the batch on one device. Losses that are not finite are
        not remembered.
        """
        t, each = lax.stop_gradient((t, each))
        if axis_name is not None:
            t, each = (lax.all_gather(a, axis_name, tiled=True) for a in (t, each))
        bins = jnp.where(jnp.isfinite(each), self._bin(t, schedule), self.bins)  # beyond the last: dropped
        order = jnp.argsort(bins, stable=True)
        ranked = bins[order]
        rank = jnp.arange(len(t)) - jnp.searchsorted(ranked, ranked)
        new = jnp.zeros(self.bins, int).at[bins].add(1, mode="drop")
        count = state["count"].astype(int)
        # of many in one bin only the last ones stay, or two would be written to one place
        kept = rank >= new.at[ranked].get(mode="clip") - self.history
        row = jnp.where(kept, ranked, self.bins)
        place = (count.at[ranked].get(mode="clip") + rank) % self.history
        losses = state["losses"].at[row, place].set(each[order].astype(state["losses"].dtype), mode="drop")
        count = count + new
        # a small number with the same remainder: exact in float32 for ever
        count = jnp.where(count < self.history, count, self.history + count % self.history)
        return dict(losses=losses, count=count.astype(state["count"].dtype))

    def _bin(self, t, schedule):
        if self.T is None:
            place = (t - schedule.t_min) / (schedule.t_max - schedule.t_min) * self.bins
        else:
            place = (jnp.round(t * self.T) - 1) * self.bins / self.T
            place = place + 0.25 * self.bins / self.T  # the middle of what rounding could confuse
        return jnp.clip(jnp.floor(place), 0, self.bins - 1).astype(int)


@noun
class Informed:
    """A `LossAware` law with the state that it has come to: a law of t as the others are, with `importance`."""

    law: LossAware
    state: dict

    def __call__(self, key, n, schedule):
        return self.law.draw(self.state, key, n, schedule)[0]

    def importance(self, t: Array, schedule: Schedule) -> Array:
        """1 / (bins p) at each t, (n,): what makes the mean loss that of the uniform law."""
        return 1 / (self.law.bins * self.law.shares(self.state)[self.law._bin(t, schedule)])


def _ends(law, schedule) -> tuple[Number, Number]:
    """Where t begins and ends: as the law says, else as the schedule does."""
    low = schedule.t_min if law.t_min is None else law.t_min
    return low, schedule.t_max if law.t_max is None else law.t_max


def _check_ends(law) -> None:
    """Raise ValueError unless 0 <= t_min < t_max <= 1, or the two are given as one; traced ends are not looked at."""
    check_range(law, 0, 1, t_min=law.t_min, t_max=law.t_max)
    low, high = (0.0 if law.t_min is None else law.t_min), (1.0 if law.t_max is None else law.t_max)
    one = law.t_min is not None and law.t_max is not None
    if concrete(low, high) and not ((np.asarray(low) < high) | (one & (np.asarray(low) == high))).all():
        raise ValueError(f"{type(law).__name__}: t_min must be below t_max, got {law.t_min} and {law.t_max}")


def _normals(key, n: int) -> Array:
    return jax.vmap(jax.random.normal)(each(key, n))
