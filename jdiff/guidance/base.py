"""What all guidance shares: its parts, its weights, both branches in one call, and moving a prediction."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array, as_time, expand, safe_divide, safe_sqrt, wide
from jdiff.core.checks import check_is, check_per_sample
from jdiff.core.pytrees import is_leaf, known, number
from jdiff.denoisers.targets import Target, aim, system
from jdiff.process.clock import Schedule
from jdiff.process.forward import rates
from jdiff.process.memory import has_own_noise, memory_of, predict_with
from jdiff.process.prediction import NO_SCHEDULE, Denoise, Prediction


class Guidance(Denoise):
    """Guidance around `parts`, denoisers of one process: give `parts` and `predict_with`."""

    @property
    def parts(self) -> tuple[Denoise, ...]:
        """The denoisers inside it; the first is the one that is guided."""
        raise NotImplementedError

    @property
    def schedule(self) -> Schedule:
        return self.parts[0].schedule

    @property
    def own_noise(self) -> bool:
        return any(has_own_noise(part) for part in self.parts)

    def memory(self, x: Array) -> Any:
        """The memories of the parts, in their order."""
        return tuple(memory_of(part, x) for part in self.parts)

    def predict(self, x: Array, t) -> Prediction:
        """(x_0, eps, extra) of the guided denoiser, before its first step if it has a memory."""
        if self.schedule is None:  # of plain functions that have met none
            raise ValueError(NO_SCHEDULE)
        return self.predict_with(x, t, self.memory(x))[0]

    def predict_with(self, x: Array, t, memory: Any) -> tuple[Prediction, Any]:
        raise NotImplementedError

    def ask(self, x: Array, t, memory: tuple) -> tuple[tuple[Prediction, ...], tuple]:
        """The predictions of all parts, and their memories after it."""
        asked = [predict_with(part, x, t, own) for part, own in zip(self.parts, memory, strict=True)]
        return tuple(prediction for prediction, _ in asked), tuple(own for _, own in asked)

    def moved(self, prediction: Prediction, change: Array, x: Array, t, target: Target | None = None) -> Prediction:
        """The prediction with `change` added to its x_0, or to its value of `target`; eps goes with x_0.

        alpha x_0 + sigma eps stays as it is, unless eps is one of its own: that one stays. Where a target is singular,
        as eps is at alpha = 0, nothing is moved.
        """
        x0, eps, extra = prediction
        if target is None:
            alpha, sigma = rates(self.schedule, t, x)
            of_eps = -safe_divide(alpha * change, sigma)
        else:
            at = system(self.schedule, target, as_time(t))
            change, of_eps = (expand(safe_divide(a, at.determinant), x) * change for a in (-at.sigma, at.alpha))
        new_eps = eps if self.own_noise else (eps + of_eps).astype(eps.dtype)
        return Prediction((x0 + change).astype(x0.dtype), new_eps, extra)


class Combination(Guidance):
    """Guidance that is a formula in the predictions of its parts, each evaluated once: give `parts` and `guide`."""

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        """The guided prediction from those of the parts."""
        raise NotImplementedError

    def predict_all(self, x: Array, t, memory: Any) -> tuple[Prediction, tuple[Prediction, ...], Any]:
        """(the guided prediction, those of the parts, the memory after them)."""
        predictions, memory = self.ask(x, t, memory)
        return self.guide(x, t, predictions), predictions, memory

    def predict_with(self, x: Array, t, memory: Any) -> tuple[Prediction, Any]:
        guided, _, memory = self.predict_all(x, t, memory)
        return guided, memory


# ---------------------------------------------------------------- weights


def as_weight(w, name: str = "w", most: float | None = None):
    """A weight as it is kept: a float, an array (B,), or a pytree that is called with t.

    Args:
        w: as it was given; a plain function becomes a pytree.
        name: what it is called in messages.
        most: None for any finite number, else the largest; the smallest is then 0.

    Raises:
        ValueError: for numbers that are not finite, or not from 0 to `most`.
    """
    w = number(w)
    if callable(w):
        return as_pytree(w)
    if known(w):
        value = np.asarray(w)
        if not jnp.issubdtype(value.dtype, np.number) or not np.isfinite(value).all():
            raise ValueError(f"{name} must be finite: a number, one a sample (B,), or a function of t; got {w!r}")
        if most is not None and not ((value >= 0) & (value <= most)).all():
            raise ValueError(f"{name} must be from 0 to {most:g}; got {w!r}")
    return w


def weight_at(w, x: Array, t, name: str = "w") -> Array:
    """The weight at t, shaped to scale x: of a number, one a sample (B,), or a function of t."""
    w = w(as_time(t)) if callable(w) else w
    check_per_sample(name, w, x)
    return expand(jnp.asarray(w, jax.dtypes.result_type(float)), x)


def as_pytree(function: Callable) -> Callable:
    """A callable whose arrays JAX sees: itself if it is a pytree, else the function as a static part of one."""
    return jax.tree_util.Partial(function) if is_leaf(function) else function


def check_number(owner: str, name: str, value, allowed: Callable, expected: str) -> None:
    """Raise ValueError unless `value` is None or one number, and one that is `allowed` where it is known now.

    Args:
        owner: the method's name.
        name: the number's.
        value: the number.
        allowed: which numbers are.
        expected: what it must be, in words.
    """
    if value is None:
        return
    if jnp.ndim(value):
        raise ValueError(f"{owner}: {name} is one number, got shape {jnp.shape(value)}")
    if known(value) and not (jnp.issubdtype(np.asarray(value).dtype, np.number) and allowed(value)):
        raise ValueError(f"{owner}: {name} must be {expected}, got {value!r}")


def check_target(owner: str, target) -> None:
    """Raise TypeError for what is neither a target nor None."""
    if target is not None:
        check_is(f"{owner}: target", target, Target, "a target, as targets.V(), or None for x_0")


# ---------------------------------------------------------------- numbers of a prediction


def value_of(schedule: Schedule, target: Target | None, prediction: Prediction, t) -> Array:
    """The prediction as a value of `target`: x_0 itself for None."""
    return prediction.x0 if target is None else aim(schedule, target, prediction.x0, prediction.eps, t)


def inner(a: Array, b: Array) -> Array:
    """<a, b> of each sample, (B, 1, ...), in float32 at least."""
    return jnp.sum(wide(a) * wide(b), axis=tuple(range(1, a.ndim)), keepdims=True)


def norm(a: Array) -> Array:
    """|a| of each sample, (B, 1, ...), with derivative 0 at 0."""
    return safe_sqrt(inner(a, a))


# ---------------------------------------------------------------- two of one, and one of two


def identical(a, b) -> bool:
    """Whether two pytrees are one: of one structure, with the same arrays and equal numbers as leaves."""
    kinds: list[Any] = [jax.tree.structure(tree) for tree in (a, b)]
    leaves = zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=kinds[0] == kinds[1])
    return kinds[0] == kinds[1] and all(
        one is other or (isinstance(one, float) and isinstance(other, float) and one == other) for one, other in leaves
    )


def either(inside: Array, x: Array, yes: Callable, no: Callable):
    """yes() where `inside`, else no(). For one time, () only that one is evaluated; for (B,) both are, row by row."""
    if inside.ndim == 0:
        return lax.cond(inside, yes, no)
    return jax.tree.map(lambda a, b: jnp.where(expand(inside, x) > 0, a, b) if jnp.ndim(a) else a, yes(), no())
