"""The denoising loss, once: DDPM, score matching, EDM and flow matching are choices of its keywords.

`uncertain` and `hybrid` are the same regression with one thing more that the network says of its own error: its size
at this noise level, its variance at this pixel. `loss_aware` lets a loss learn where to train.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array, Number, expand, wide
from jdiff.core.checks import check_floating, check_same_shape
from jdiff.core.keys import each, normal, split
from jdiff.core.pytrees import concrete
from jdiff.denoisers.conditioning import LogSNR
from jdiff.denoisers.network import run_network, split_variance
from jdiff.denoisers.targets import Target, aim, solve
from jdiff.losses import levels as laws
from jdiff.losses.coupling import Independent
from jdiff.losses.levels import LossAware, Uniform
from jdiff.losses.vlb import table_length, terms_of, vlb_prior, vlb_terms
from jdiff.losses.weights import Flat
from jdiff.process.clock import Schedule
from jdiff.process.forward import q_sample
from jdiff.process.prediction import Prediction

__all__ = ["denoising", "hybrid", "loss_aware", "uncertain", "vlb_prior", "vlb_terms"]


def denoising(
    apply: Callable,
    params: Any,
    key,
    data: Array,
    cond: Any = None,
    *,
    schedule: Schedule,
    target: Target,
    conditioning=LogSNR(),
    levels=Uniform(),
    weight=Flat(),
    coupling=Independent(),
    self_conditioning: Number | None = None,
) -> tuple[Array, dict]:
    """(loss, aux):  loss = E_{t, eps} weight_t mean |F(x_t, t) - F*|^2, the mean over a sample's numbers.

    data: x_0 (B, ...), floating; `apply(params, x, label, cond) -> F`; t ~ levels; F* = a_t x_0 + b_t eps, eps normal,
    paired with the data by `coupling(key, x0, eps) -> eps`. `self_conditioning`, if given, is the share of samples, 0.5
    in Chen et al. 2022, arXiv:2208.04202, that are shown the network's own estimate of x_0, made without gradient, on
    the last axis beside x_t; the others 0 (the estimate costs every batch one forward pass).

    `key`: one key, or a `BatchKey` for a slice of the global batch: row i draws by its global position. Noise, x_t and
    errors are float32 at least, whatever the data's dtype; the network may compute in another.
    aux: `t` (B,) and `each` (B,), the loss of each sample, before the importance of levels that have one. Raises
    ValueError if data is not floating, the network's output has not data's shape, or the share is not in [0, 1].
    """
    how = dict(schedule=schedule, target=target, conditioning=conditioning, levels=levels, coupling=coupling)
    seen = _look(apply, params, key, data, cond, _plain, self_conditioning, **how)
    each = weight(schedule, target, seen.t).astype(seen.error.dtype) * seen.error
    return _mean(seen, each), dict(t=seen.t, each=each)


def uncertain(
    apply: Callable,
    params: Any,
    key,
    data: Array,
    cond: Any = None,
    *,
    schedule: Schedule,
    target: Target,
    conditioning=LogSNR(),
    levels=Uniform(),
    weight=Flat(),
    coupling=Independent(),
    self_conditioning: Number | None = None,
) -> tuple[Array, dict]:
    """(loss, aux):  loss = E weight_t mean |F - F*|^2 / e^u + u, for a network that also returns u (B,).

    At its best u = log E[weight_t mean |F - F*|^2 | t]: all noise levels then pull alike, whatever `weight` is.
    `apply(params, x, label, cond) -> (F, u)`: `EDM2UNet` with return_logvar=True.  Karras et al. 2024,
    arXiv:2312.02696, eq. 14 and 15 (their D-space weight is `weights.EDM`); Kendall et al. 2018, arXiv:1705.07115.

    Everything else as in `denoising`; aux has `error` (B,), the weighted error, and `u` (B,) too. Raises ValueError as
    it does, and unless the network returns such a pair.
    """
    how = dict(schedule=schedule, target=target, conditioning=conditioning, levels=levels, coupling=coupling)
    seen = _look(apply, params, key, data, cond, _pair, self_conditioning, **how)
    error = weight(schedule, target, seen.t).astype(seen.error.dtype) * seen.error
    each = error * jnp.exp(-seen.more) + seen.more
    return _mean(seen, each), dict(t=seen.t, each=each, error=error, u=seen.more)


def hybrid(
    apply: Callable,
    params: Any,
    key,
    data: Array,
    cond: Any = None,
    *,
    schedule: Schedule,
    target: Target,
    conditioning=LogSNR(),
    levels=None,
    weight=Flat(),
    coupling=Independent(),
    self_conditioning: Number | None = None,
    vlb: Number = 1e-3,
    bins: Number | None = 256,
) -> tuple[Array, dict]:
    """(loss, aux):  loss = L_simple + vlb T L_t, for a network that also learns the variance of the reverse step.

    L_simple is that of `denoising`, L_t that of `vlb_terms` in bits per dimension with the gradient of its mean
    stopped: it teaches only the variances. T L_t, averaged over the knots, is the bound itself; `vlb` times it is what
    the authors' code trains with.  Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 14 to 16.
    `apply(params, x, label, cond) -> F`, its last axis twice data's: the second half is read as `DDPM("learned")` does.

    `schedule` is `Discrete`, data in [-1, 1] unless `bins` is None (see `vlb_terms`), t uniform over the knots if
    `levels` is None. Everything else as in `denoising`; aux has `simple` and `vlb` (B,) too, the latter in bits per
    dimension: an estimate of the bound, less `vlb_prior`, at each sample. Raises ValueError as it does, and for another
    schedule.
    """
    T = table_length("hybrid", schedule)
    levels = laws.Knots(T) if levels is None else levels
    how = dict(schedule=schedule, target=target, conditioning=conditioning, levels=levels, coupling=coupling)
    seen = _look(apply, params, key, data, cond, _halves, self_conditioning, **how)
    simple = weight(schedule, target, seen.t).astype(seen.error.dtype) * seen.error
    x0, eps = lax.stop_gradient(solve(schedule, target, seen.x, seen.out, seen.t))
    bound = T * terms_of(Prediction(x0, eps, seen.more), schedule, data, seen.t, bins=bins)
    each = simple + vlb * bound.astype(simple.dtype)
    return _mean(seen, each), dict(t=seen.t, each=each, simple=simple, vlb=bound)


def loss_aware(loss: Callable, law: LossAware, schedule: Schedule, *, axis_name: str | None = None) -> Callable:
    """A loss that trains where it is large: `loss(params, key, data, cond, levels)` with `levels` from `law`'s history.

    Returns `(params, key, data, cond, extra) -> (loss, aux)`, as `make_train_step` calls it for a state whose `extra`
    has `law.init()` under "levels"; aux["extra"] holds the new one, learnt from aux's `t` and `each`. Collections
    beside it pass through, or are aux["extra"] of the loss itself. `axis_name` must be that of the pmap or shard_map
    around the step, if any: all devices learn from all rows, and agree. With accumulation each slice already draws by
    what the ones before it saw. The returned loss raises ValueError for a state without that collection.
    """

    def aware(params, key, data, cond=None, extra=None):
        if not isinstance(extra, dict) or "levels" not in extra:
            raise ValueError('loss_aware: the training state needs extra={"levels": law.init()}')
        value, aux = loss(params, key, data, cond, law.at(extra["levels"]))
        history = law.update(extra["levels"], aux["t"], aux["each"], schedule, axis_name=axis_name)
        return value, dict(aux, extra=dict(extra, **aux.get("extra", {}), levels=history))

    return aware


# ---------------------------------------------------------------- what the losses share


class _Seen(NamedTuple):
    t: Array
    x: Array
    out: Array
    more: Array | None  # what the network returned beside F
    error: Array
    importance: Array | None


def _look(
    apply, params, key, data, cond, read, self_conditioning, *, schedule, target, conditioning, levels, coupling
) -> _Seen:
    """Noise the data, run the network, compare. `read(output, x) -> (F, what else it says)`."""
    check_floating("data", data)
    data = wide(data)
    k_t, k_eps, k_pair, k_self = split(key, 4)
    t = levels(k_t, data.shape[0], schedule)
    eps = coupling(k_pair, data, normal(k_eps, data.shape, data.dtype))
    x = q_sample(schedule, data, t, eps)

    def network(params, previous=None):
        return read(run_network(apply, params, schedule, conditioning, x, t, cond, previous), x)

    previous = None
    if self_conditioning is not None:
        if concrete(self_conditioning) and not 0 <= float(np.asarray(self_conditioning)) <= 1:
            raise ValueError(f"self_conditioning is the share of samples shown, in [0, 1]; got {self_conditioning}")
        first, _ = network(lax.stop_gradient(params), jnp.zeros_like(x))
        x0, _ = lax.stop_gradient(solve(schedule, target, x, first, t))
        shown = jax.vmap(lambda k: jax.random.bernoulli(k, self_conditioning))(each(k_self, x.shape[0]))
        # at alpha = 0 an eps-network says nothing of x_0
        previous = jnp.where((expand(shown, x) > 0) & jnp.isfinite(x0), x0, 0)
    out, more = network(params, previous)
    error = jnp.mean((out - aim(schedule, target, data, eps, t)) ** 2, axis=tuple(range(1, data.ndim)))
    importance = getattr(levels, "importance", None)
    return _Seen(t, x, out, more, error, None if importance is None else importance(t, schedule))


def _mean(seen: _Seen, each: Array) -> Array:
    return each.mean() if seen.importance is None else (seen.importance.astype(each.dtype) * each).mean()


def _plain(out, x):
    check_same_shape("the network's output", out, "its input", x)
    return out, None


def _pair(out, x):
    if not isinstance(out, tuple) or len(out) != 2 or jnp.shape(out[1]) != x.shape[:1]:
        given = jax.tree.map(jnp.shape, out)
        raise ValueError(f"uncertain: the network returned {given}; expected F {x.shape} and u {x.shape[:1]}")
    return _plain(out[0], x)[0], out[1]


def _halves(out, x):
    return split_variance(out, x, True)
