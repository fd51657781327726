"""What a denoiser is: (x_t, t) -> E[x_0 | x_t], with the noise that it implies."""

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, Self, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array
from jdiff.core.checks import check_is, check_same_shape
from jdiff.core.pytrees import is_leaf, known, noun, static
from jdiff.process.clock import Schedule, check_schedule
from jdiff.process.forward import eps_from

NO_SCHEDULE = "a plain function does not say its schedule; give jdiff.as_denoise(function, schedule)"


class Prediction(NamedTuple):
    """What a denoiser says of x_t.

    Attributes:
        x0: E[x_0 | x_t], (B, ...).
        eps: E[eps | x_t], (B, ...).
        extra: what else its network returned, as the half of its output that is a variance; or None.
    """

    x0: Array
    eps: Array
    extra: Any = None


@runtime_checkable
class Denoise(Protocol):
    """A denoiser: inherit from this class, give `schedule` and `predict`, and declare the class a `noun`.

    Attributes:
        schedule: the schedule of the process that it denoises.
    """

    if TYPE_CHECKING:  # a field of some denoisers and a property of others, which both checkers allow for Any alone
        schedule: Any

        def replace(self, **changes: Any) -> Self:  # as of every noun
            return self
    else:
        schedule: Schedule

    def predict(self, x: Array, t) -> Prediction:
        """(E[x_0 | x_t], E[eps | x_t], extra) for x (B, ...) at t, () or (B,)."""
        ...

    def __call__(self, x: Array, t) -> Array:
        """E[x_0 | x_t], (B, ...)."""
        return self.predict(x, t).x0


@noun
class PlainDenoise(Denoise):
    """A function (x, t) -> E[x_0 | x_t] as a denoiser; eps follows from its x_0.

    The function is `code` if JAX sees no arrays in it, and `pytree` if it is a pytree that can be called. The schedule
    is None until the function meets one.
    """

    pytree: Any
    schedule: Any  # a Schedule, or None
    code: Callable | None = static(default=None)

    def predict(self, x: Array, t) -> Prediction:
        """(x_0, eps) with eps = (x_t - alpha_t x_0) / sigma_t."""
        if self.schedule is None:
            raise ValueError(NO_SCHEDULE)
        x0 = (self.pytree if self.code is None else self.code)(x, t)
        check_same_shape("the denoiser's output", x0, "x", x)
        x0 = jnp.asarray(x0, x.dtype)  # as of a network: solvers compute in the dtype of x
        return Prediction(x0, eps_from(self.schedule, x0, x, t))


def check_same_schedule(one: Schedule | None, other: Schedule | None) -> None:
    """Raise ValueError unless two schedules are the same: of one type, one set of statics, and equal numbers.

    Numbers are equal if they differ by rounding to float32 only. Traced numbers are not compared. None, which stands
    for no schedule yet, goes with every schedule.
    """
    if one is None or other is None or one is other:
        return
    names = type(one).__name__, type(other).__name__
    (own, kind), (others, other_kind) = jax.tree.flatten(one), jax.tree.flatten(other)
    if (type(one), kind) != (type(other), other_kind):
        kinds = " and ".join(names) if names[0] != names[1] else f"two {names[0]} of different settings"
        raise ValueError(f"denoisers and samplers must have one schedule, got {kinds}")
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(one)]
    for path, a, b in zip(paths, own, others, strict=True):
        if not known(a, b):
            continue
        if not _agree(a, b):
            what = f"{names[0]}{jax.tree_util.keystr(path)}"
            got = f": {a} and {b}" if np.ndim(a) == np.ndim(b) == 0 else ""
            raise ValueError(f"denoisers and samplers must have one schedule, got two that differ in {what}{got}")


def as_denoise(denoise: Denoise | Callable, schedule: Schedule | None) -> Denoise:
    """A `Denoise`, whether it is one already or a plain function (x, t) -> E[x_0 | x_t].

    Args:
        denoise: a denoiser, guidance around denoisers or functions, or a function.
        schedule: the schedule of plain functions that have met none so far, also of those inside guidance.

    Returns:
        `denoise` itself where there is nothing to add.

    Raises:
        TypeError: for what is neither.
        ValueError: if the denoiser was made for another schedule.
    """
    if schedule is not None:
        check_schedule(schedule)
    expected = "a denoiser, or a function (x, t) -> E[x_0 | x_t]"
    if hasattr(denoise, "predict"):
        expected += "; inherit from jdiff.Denoise, and predict makes it one"
    check_is("denoise", denoise, Callable, expected)
    if not isinstance(denoise, Denoise):
        return PlainDenoise(None, schedule, denoise) if is_leaf(denoise) else PlainDenoise(denoise, schedule)
    if is_leaf(denoise):
        raise TypeError(f"{type(denoise).__name__} is no pytree; decorate the class with @jdiff.noun")
    check_same_schedule(denoise.schedule, schedule)

    def is_plain(node):
        return isinstance(node, PlainDenoise)

    def place(node):
        return node.replace(schedule=schedule) if is_plain(node) and node.schedule is None else node

    return jax.tree.map(place, denoise, is_leaf=is_plain)


def as_denoises(*denoises) -> list[Denoise]:
    """Several denoisers of one process: plain functions among them take the schedule of the others."""
    lifted = [as_denoise(denoise, None) for denoise in denoises]
    schedule = next((denoise.schedule for denoise in lifted if denoise.schedule is not None), None)
    return [as_denoise(denoise, schedule) for denoise in lifted]


def _agree(a, b) -> bool:
    """Whether two arrays differ by rounding to float32 only; a log-SNR near 0 is rounded as the larger ones are."""
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    rounding = 1e-6 * np.abs(b).max(initial=0, where=np.isfinite(b))
    return a.shape == b.shape and np.allclose(a, b, rtol=1e-5, atol=rounding, equal_nan=True)
