"""Two branches and a weight: what classifier-free guidance and its kin are made of."""

import dataclasses
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, as_time
from jdiff.core.pytrees import noun, per_sample, static
from jdiff.denoisers.network import Denoiser
from jdiff.guidance.base import Combination, as_weight, identical, weight_at
from jdiff.process.prediction import Denoise, Prediction, as_denoises


@noun
class Branches:
    """A conditional and an unconditional denoiser, a weight, and whether one call evaluates both."""

    conditional: Denoise
    unconditional: Denoise
    w: Any = per_sample()
    batched: bool = static(default=False)


def branches(
    name: str, conditional: Denoise | Callable, unconditional: Denoise | Callable, w, batched: bool, most=None
) -> Branches:
    """The branches of a method, checked.

    Args:
        name: the method's, for messages.
        conditional: a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        unconditional: a denoiser or a function (x, t) -> E[x_0 | x_t].
        w: the weight: a number, (B,), or a callable of t.
        batched: whether one call evaluates both.
        most: the largest weight that the method takes, from 0; None for any.

    Raises:
        ValueError: for a weight that is no finite number, denoisers of different schedules, and `batched` for
            denoisers of two networks.
    """
    conditional, unconditional = as_denoises(conditional, unconditional)
    if batched:
        _check_one_network(name, conditional, unconditional)
    return Branches(conditional, unconditional, as_weight(w, f"{name}: w", most), bool(batched))


class TwoBranches(Combination):
    """Guidance with `branches`: give that field and `guide`."""

    branches: Branches

    @property
    def parts(self):
        return self.branches.conditional, self.branches.unconditional

    def ask(self, x: Array, t, memory: tuple) -> tuple[tuple[Prediction, ...], tuple]:
        if self.branches.batched:
            return _in_one_call(self.branches.conditional, self.branches.unconditional, x, t), memory
        return super().ask(x, t, memory)

    def weight(self, x: Array, t) -> Array:
        """The weight at t, shaped to scale x."""
        return weight_at(self.branches.w, x, t)


# ---------------------------------------------------------------- both in one call


def _check_one_network(name: str, one: Denoise, other: Denoise) -> None:
    """Raise ValueError unless two denoisers are of one network and differ in `cond` alone."""
    for part in (one, other):
        if not isinstance(part, Denoiser):
            raise ValueError(f"{name}: batched=True joins two of jdiff.denoiser; got a {type(part).__name__}")
    if not identical(*(dataclasses.replace(part, cond=None) for part in (one, other))):  # type: ignore[type-var]
        raise ValueError(f"{name}: batched=True joins two denoisers of one network and params, of another cond")


def _in_one_call(one: Denoise, other: Denoise, x: Array, t) -> tuple[Prediction, Prediction]:
    """The predictions of two denoisers of one network at (x, t)."""
    assert isinstance(one, Denoiser) and isinstance(other, Denoiser)
    kinds: list[Any] = [jax.tree.structure(part.cond) for part in (one, other)]
    if kinds[0] != kinds[1]:
        raise ValueError("batched=True needs conds of one structure, as a class that stands for none; got two")
    n, t = x.shape[0], as_time(t)

    def rows(a, b):
        return jnp.concatenate([_filled(a, n), _filled(b, n)])

    joined = dataclasses.replace(
        one, cond=jax.tree.map(rows, one.cond, other.cond), previous=jax.tree.map(rows, one.previous, other.previous)
    )
    both = joined.predict(jnp.concatenate([x, x]), jnp.concatenate([t, t]) if t.ndim else t)
    return jax.tree.map(lambda a: a[:n], both), jax.tree.map(lambda a: a[n:], both)


def _filled(a, n: int) -> Array:
    """The rows of a condition; a number stands for n of them."""
    return jnp.broadcast_to(jnp.asarray(a), (n,)) if jnp.ndim(a) == 0 else jnp.asarray(a)
