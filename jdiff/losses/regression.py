"""The denoising regression, once: DDPM, score matching, EDM and flow matching are choices of its fields.

`uncertain` and `hybrid` are the same regression with one thing more that the network says of its own error: its size
at this noise level, or its variance at this pixel.
"""

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, expand, wide
from jdiff.core.checks import check_floating, check_is, check_same_shape
from jdiff.core.keys import each, normal, split
from jdiff.core.pytrees import Noun, concrete, noun
from jdiff.denoisers.conditioning import LogSNR
from jdiff.denoisers.network import Denoiser, check_target, denoiser, run_network, split_variance
from jdiff.denoisers.targets import Target, aim, solve
from jdiff.losses.coupling import Independent
from jdiff.losses.levels import Knots, Levels, LossAware, Uniform, WeightedLevels
from jdiff.losses.vlb import table_length, terms_of
from jdiff.losses.weights import Flat, Weight
from jdiff.process.clock import Schedule, check_schedule
from jdiff.process.forward import q_sample
from jdiff.process.prediction import Prediction


@noun
class Regression(Noun):
    """What is regressed, how it is shown to the network, at which noise levels, and the weight of each level.

    The losses take these fields by keyword: `denoising(apply, params, key, data, schedule=..., target=...)`.

    Attributes:
        schedule: the noise schedule.
        target: what the network regresses, F* = a_t x_0 + b_t eps.
        conditioning: what the network is shown of (x_t, t).
        levels: the law of t.
        weight: what each noise level counts.
        coupling: which noise meets which data, `coupling(key, x0, eps) -> eps`.
        self_conditioning: None, or the share of samples that are shown the network's own estimate of x_0, made without
            gradient, on the last axis beside x_t; the others are shown 0. The estimate costs every batch one forward
            pass. It is 0.5 in Chen et al. 2022, arXiv:2208.04202.
    """

    schedule: Schedule
    target: Target
    conditioning: Callable = LogSNR()
    levels: Levels = Uniform()
    weight: Weight = Flat()
    coupling: Callable = Independent()
    self_conditioning: Number | None = None

    def check(self):
        check_schedule(self.schedule)
        check_target(self.target)
        called = dict(conditioning=self.conditioning, weight=self.weight, coupling=self.coupling)
        for name, value in called.items():
            check_is(name, value, Callable, "an object that can be called")
        check_is("levels", self.levels, (Callable, LossAware), "a law of t, as levels.Uniform()")
        share = self.self_conditioning
        if share is not None and concrete(share) and not 0 <= float(share) <= 1:
            raise ValueError(f"self_conditioning is the share of samples shown, in [0, 1]; got {share}")

    def denoiser(self, apply: Callable, params: Any, cond: Any = None, *, learned_variance: bool = False) -> Denoiser:
        """The denoiser of a network that was trained so: see `jdiff.denoiser`."""
        return denoiser(
            apply, params, self.schedule, self.target, cond, conditioning=self.conditioning,
            learned_variance=learned_variance, self_conditioning=self.self_conditioning is not None,
        )  # fmt: skip


def denoising(
    apply: Callable, params: Any, key, data: Array, cond: Any = None, **regression
) -> tuple[Array, dict[str, Array]]:
    """The denoising loss E_{t, eps} weight_t mean |F(x_t, t) - F*|^2, the mean over a sample's numbers.

    t ~ levels, eps is normal and paired with the data by the coupling, x_t = alpha_t x_0 + sigma_t eps, and
    F* = a_t x_0 + b_t eps. Noise, x_t and errors are float32 at least, whatever the dtype of the data; the network may
    compute in another.

    Args:
        apply: the network, `apply(params, x, label, cond) -> F`, of the shape of x (B, ...).
        params: its parameters, a pytree.
        key: one key, or a `BatchKey` for a slice of the global batch: row i draws by its global position.
        data: x_0, (B, ...), floating.
        cond: what the network is given beside x_t, as labels (B,), or None.
        regression: the fields of `Regression` by keyword; `schedule` and `target` are required.

    Returns:
        (loss, aux): a number, and a dict of `t` (B,) and `each` (B,), the loss of each sample before it is multiplied
        by the importance of levels that have one.

    Raises:
        ValueError: if data is not floating, or the network's output has not the shape of its input.
    """
    of = Regression(**regression)
    seen = _regress(of, _plain, apply, params, key, data, cond)
    each = of.weight(of.schedule, of.target, seen.t).astype(seen.error.dtype) * seen.error
    return _mean(seen, each), dict(t=seen.t, each=each)


def uncertain(
    apply: Callable, params: Any, key, data: Array, cond: Any = None, **regression
) -> tuple[Array, dict[str, Array]]:
    """The loss E weight_t mean |F - F*|^2 / e^u + u, for a network that also returns u.

    At its best u = log E[weight_t mean |F - F*|^2 | t]: then all noise levels pull alike, whatever the weight is.

    Args:
        apply: the network, `apply(params, x, label, cond) -> (F, u)` with u (B,): `EDM2UNet` with return_logvar=True.
        params: as in `denoising`.
        key: as in `denoising`.
        data: as in `denoising`.
        cond: as in `denoising`.
        regression: as in `denoising`. EDM2's own weight, stated on x_0, is `weights.EDM`.

    Returns:
        (loss, aux) as `denoising` does; aux has `error` (B,), the weighted error, and `u` (B,) too.

    Raises:
        ValueError: as `denoising` does, and unless the network returns such a pair.

    Reference:
        Karras et al. 2024, arXiv:2312.02696, eq. 14 and 15; Kendall et al. 2018, arXiv:1705.07115.
    """
    of = Regression(**regression)
    seen = _regress(of, _pair, apply, params, key, data, cond)
    u = seen.extra
    error = of.weight(of.schedule, of.target, seen.t).astype(seen.error.dtype) * seen.error
    each = error * jnp.exp(-u) + u
    return _mean(seen, each), dict(t=seen.t, each=each, error=error, u=u)


def hybrid(
    apply: Callable,
    params: Any,
    key,
    data: Array,
    cond: Any = None,
    *,
    vlb: Number = 1e-3,
    bins: Number | None = 256,
    levels: Levels | None = None,
    **regression,
) -> tuple[Array, dict[str, Array]]:
    """The loss L_simple + vlb T L_t, for a network that also learns the variance of the reverse step.

    L_simple is that of `denoising`. L_t is that of `vlb_terms`, in bits per dimension, with the gradient of its mean
    stopped: it teaches only the variances. T L_t, averaged over the knots, is the bound itself; `vlb` times it is what
    the authors' code trains with.

    Args:
        apply: the network, `apply(params, x, label, cond) -> F` whose last axis is twice that of the data: the second
            half is read as `DDPM("learned")` does.
        params: as in `denoising`.
        key: as in `denoising`.
        data: as in `denoising`, in [-1, 1] unless bins is None.
        cond: as in `denoising`.
        vlb: what the bound counts beside L_simple.
        bins: the levels of the data from -1 to 1, or None for continuous data: see `vlb_terms`.
        levels: the law of t; uniform over the knots if None.
        regression: as in `denoising`; the schedule is `Discrete`.

    Returns:
        (loss, aux) as `denoising` does; aux has `simple` (B,) and `vlb` (B,) too, the latter in bits per dimension: an
        estimate of the bound, less `vlb_prior`, at each sample.

    Raises:
        ValueError: as `denoising` does, and for another schedule.

    Reference:
        Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 14 to 16.
    """
    of = Regression(**regression)
    T = table_length("hybrid", of.schedule)
    of = dataclasses.replace(of, levels=Knots(T) if levels is None else levels)
    seen = _regress(of, _halves, apply, params, key, data, cond)
    simple = of.weight(of.schedule, of.target, seen.t).astype(seen.error.dtype) * seen.error
    x0, eps = lax.stop_gradient(solve(of.schedule, of.target, seen.x, seen.out, seen.t))
    bound = T * terms_of(Prediction(x0, eps, seen.extra), of.schedule, data, seen.t, bins=bins)
    each = simple + vlb * bound.astype(simple.dtype)
    return _mean(seen, each), dict(t=seen.t, each=each, simple=simple, vlb=bound)


# ---------------------------------------------------------------- what the losses share


class _Outcome(NamedTuple):
    """A batch that the network has seen: t, x_t, F, what else it returned, mean |F - F*|^2 (B,), importance."""

    t: Array
    x: Array
    out: Array
    extra: Any  # an array, or None
    error: Array
    importance: Array | None


def _regress(of: Regression, read: Callable, apply, params, key, data, cond) -> _Outcome:
    """Noise the data, run the network, compare. `read(output, x) -> (F, what else the network returned)`."""
    check_floating("data", data)
    data = wide(data)
    k_t, k_eps, k_pair, k_self = split(key, 4)
    t = of.levels(k_t, data.shape[0], of.schedule)
    eps = of.coupling(k_pair, data, normal(k_eps, data.shape, data.dtype))
    x = q_sample(of.schedule, data, t, eps)

    def network(params, previous=None):
        return read(run_network(apply, params, of.schedule, of.conditioning, x, t, cond, previous), x)

    previous = None
    share = of.self_conditioning
    if share is not None:
        first, _ = network(lax.stop_gradient(params), jnp.zeros_like(x))
        x0, _ = lax.stop_gradient(solve(of.schedule, of.target, x, first, t))
        shown = jax.vmap(lambda k: jax.random.bernoulli(k, share))(each(k_self, x.shape[0]))
        # at alpha = 0 an eps-network says nothing of x_0
        previous = jnp.where((expand(shown, x) > 0) & jnp.isfinite(x0), x0, 0)
    out, extra = network(params, previous)
    error = jnp.mean((out - aim(of.schedule, of.target, data, eps, t)) ** 2, axis=tuple(range(1, data.ndim)))
    importance = of.levels.importance(t, of.schedule) if isinstance(of.levels, WeightedLevels) else None
    return _Outcome(t, x, out, extra, error, importance)


def _mean(seen: _Outcome, each: Array) -> Array:
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
