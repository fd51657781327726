"""A law of t that learns where the loss is large."""

from collections.abc import Callable

import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, safe_divide
from jdiff.core.checks import check_count, check_range
from jdiff.core.keys import strata
from jdiff.core.pytrees import Noun, concrete, noun, static
from jdiff.process.clock import Schedule


@noun
class LossAware(Noun):
    """t in one of `bins` equal parts of the domain, with probability p ~ sqrt(E[loss^2]) over its last few losses.

    The law is uniform, and of low discrepancy as `Uniform` and `Knots` are, until each bin has `history` losses; then p
    is mixed with a share `uniform` of the uniform law. The losses are multiplied by 1 / (bins p), so that their mean
    stays what it is under the uniform law, with less variance. The methods are pure functions around a state of arrays,
    which rides in `TrainState.extra`: `losses.loss_aware` ties them together.

    Args:
        T: the steps of a table whose knots k/T are drawn; None for the whole domain of the schedule. `bins` = T is the
            published law.
        uniform: the share of the uniform law, in [0, 1].
        bins: the number of parts; it must divide T.
        history: how many losses of each bin are remembered.

    Raises:
        ValueError: for bins or a history below 1, and a T that the bins do not divide.

    Reference:
        Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 18.
    """

    T: Number | None = None
    uniform: Number = 0.001
    bins: int = static(default=100)
    history: int = static(default=10)

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

        The rows are remembered in their order, as if they came one after the other. In a pmap give its `axis_name`:
        every device then learns from all rows of the batch, and the state is that of the batch on one device. Losses
        that are not finite are not remembered.
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
        slot = (count.at[ranked].get(mode="clip") + rank) % self.history
        losses = state["losses"].at[row, slot].set(each[order].astype(state["losses"].dtype), mode="drop")
        count = count + new
        # a small number with the same remainder: exact in float32 for ever
        count = jnp.where(count < self.history, count, self.history + count % self.history)
        return dict(losses=losses, count=count.astype(state["count"].dtype))

    def _bin(self, t, schedule):
        if self.T is None:
            position = (t - schedule.t_min) / (schedule.t_max - schedule.t_min) * self.bins
        else:
            position = (jnp.round(t * self.T) - 1) * self.bins / self.T
            position = position + 0.25 * self.bins / self.T  # the middle of what rounding could confuse
        return jnp.clip(jnp.floor(position), 0, self.bins - 1).astype(int)


@noun
class Informed(Noun):
    """A `LossAware` law with the state that it has come to: a law of t as the others are, with `importance`."""

    law: LossAware
    state: dict

    def __call__(self, key, n, schedule):
        return self.law.draw(self.state, key, n, schedule)[0]

    def importance(self, t: Array, schedule: Schedule) -> Array:
        """1 / (bins p) at each t, (n,): what makes the mean loss that of the uniform law."""
        return 1 / (self.law.bins * self.law.shares(self.state)[self.law._bin(t, schedule)])


def loss_aware(loss: Callable, law: LossAware, schedule: Schedule, *, axis_name: str | None = None) -> Callable:
    """A loss that trains on the noise levels where it is large.

    Args:
        loss: `loss(params, key, data, cond, levels) -> (scalar, aux)`, called with what `law` has learnt as `levels`;
            aux has the `t` and `each` of the losses of this module.
        law: the law.
        schedule: the schedule of the process.
        axis_name: the axis of the pmap or shard_map around the training step, if there is one. All devices then learn
            from all rows, and agree. With accumulation each slice already draws by what the ones before it saw.

    Returns:
        `(params, key, data, cond, extra) -> (scalar, aux)`, as `make_train_step` calls it for a state whose `extra` is
        `{"levels": law.init()}`; aux["extra"] holds the new one. Collections beside it pass through, or are those of
        aux["extra"] of the loss itself. It raises ValueError for a state without that collection.
    """

    def aware(params, key, data, cond=None, extra=None):
        if not isinstance(extra, dict) or "levels" not in extra:
            raise ValueError('loss_aware: the training state needs extra={"levels": law.init()}')
        value, aux = loss(params, key, data, cond, law.at(extra["levels"]))
        history = law.update(extra["levels"], aux["t"], aux["each"], schedule, axis_name=axis_name)
        return value, dict(aux, extra=dict(extra, **aux.get("extra", {}), levels=history))

    return aware
