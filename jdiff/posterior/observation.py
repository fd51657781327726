"""What was observed: y = A(x_0) + noise_std z with z ~ N(0, I), one y for all samples or one for each."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array
from jdiff.core.checks import check_is
from jdiff.core.pytrees import concrete, known, noun, per_sample
from jdiff.guidance.base import as_pytree

ARRAYS = (jax.Array, np.ndarray, np.generic, float, int)


@noun
class PerSample:
    """Observations that are marked as one for each sample, so that methods which treat samples one by one find them.

    `jdiff.sample` needs no mark. `jdiff.sample_adaptive` does.

    Args:
        y: (B, ...), row i being the observation of sample i.
    """

    y: Any

    def check(self):
        check_is("the y of PerSample", self.y, ARRAYS, "an array (B, ...), one row for each sample")


class Seen(NamedTuple):
    """An observation beside an estimate of x_0, with A linearised there.

    Attributes:
        residual: y - A(x_0), (B, ...).
        push: v -> A' v, from the shape of x_0 to that of the residual.
        pull: u -> A'^T u, the way back.
        variance: noise_std^2, shaped to scale the residual.
    """

    residual: Array
    push: Callable[[Array], Array]
    pull: Callable[[Array], Array]
    variance: Array


@noun
class Observation:
    """y, the operator that made it of x_0, and the standard deviation of its noise: see `observe`."""

    y: Any  # one for all samples, or (B, ...); None where `rows` has them
    noise_std: Any
    A: Any  # a matrix, or a pytree that is called
    rows: Any = per_sample(default=None)

    def apply(self, x0: Array) -> Array:
        """A(x_0), (B, ...)."""
        if callable(self.A):
            out = self.A(x0)
            check_is("what A returned", out, jax.Array, "an array (B, ...)")
            return out
        flat = x0.reshape(len(x0), -1)
        if flat.shape[1] != self.A.shape[1]:
            raise ValueError(f"A has shape {self.A.shape} for an x of {x0.shape}; expected (M, {flat.shape[1]})")
        return flat @ jnp.asarray(self.A, x0.dtype).T

    def beside(self, x0: Array) -> Seen:
        """The residual of x_0 (B, ...), and A linearised there."""
        made, push = jax.linearize(self.apply, x0)
        y = self.y if self.rows is None else self.rows
        expected = made.shape if self.rows is not None or jnp.ndim(y) == made.ndim else made.shape[1:]
        if made.shape[:1] != x0.shape[:1] or jnp.shape(y) != expected:
            raise ValueError(
                f"A makes {made.shape} of x {x0.shape}, and y has shape {jnp.shape(y)}; expected {made.shape[1:]}, "
                f"one observation for all samples, or {(*x0.shape[:1], *made.shape[1:])}"
            )
        std = jnp.asarray(self.noise_std, made.dtype)
        if std.shape not in ((), made.shape[1:]):
            raise ValueError(f"noise_std has shape {std.shape}; expected () or that of one y, {made.shape[1:]}")
        y = jnp.asarray(y, made.dtype)
        residual = (y if y.ndim == made.ndim else y[None]) - made
        pull = jax.linear_transpose(push, x0)
        variance = std**2 if std.ndim == 0 else (std**2)[None]
        return Seen(residual, push, lambda u: pull(u)[0], variance)


def observe(A, y, noise_std, *, may_be_exact: bool = True) -> Observation:
    """y = A(x_0) + noise_std z, after the checks that need no x.

    Args:
        A: a matrix (M, D), which acts on each sample as a vector; or a function, linear or not, from x_0 (B, ...) to
            (B, ...), as one of the operators of `jdiff.posterior`.
        y: one observation for all samples, of the shape of A(x_0)[0]; or one for each, of the shape of A(x_0).
            `PerSample(y)` marks the second.
        noise_std: the standard deviation of the noise, a number or an array of the shape of one observation.
        may_be_exact: whether a noise_std of 0 is allowed.

    Returns:
        The observation. It checks the shapes when it first meets an x_0.

    Raises:
        TypeError: for an A that is neither, and a y that is no array.
        ValueError: for a y that is not finite, and a noise_std out of range.
    """
    rows = y.y if isinstance(y, PerSample) else None
    y = None if isinstance(y, PerSample) else y
    if rows is None:
        check_is("y", y, ARRAYS, "an observation, an array of the shape of A(x)[0] or A(x)")
    values = rows if y is None else y
    if known(values) and not np.isfinite(np.asarray(values, np.float64)).all():
        raise ValueError("y has numbers that are not finite; where a mask hides y, give 0")
    check_noise(noise_std, may_be_exact)
    matrix = isinstance(A, (jax.Array, np.ndarray))
    if isinstance(A, type) or not (matrix or callable(A)):
        check_is("A", A, (jax.Array, np.ndarray), "a matrix (M, D), or a function from x (B, ...) to (B, ...)")
    if matrix and A.ndim != 2:
        raise ValueError(f"A has shape {A.shape}; expected a matrix (M, D), or a function")
    return Observation(y, noise_std, A if matrix else as_pytree(A), rows)


def check_noise(noise_std, may_be_exact: bool) -> None:
    """Raise ValueError for a noise_std that is no number, is negative, or is 0 where it may not be."""
    if not concrete(noise_std):
        return
    a = np.asarray(noise_std)
    a = a if np.issubdtype(a.dtype, np.number) else np.asarray(np.nan)
    if not (np.isfinite(a) & ((a >= 0) if may_be_exact else (a > 0))).all():
        range = "0 or more" if may_be_exact else "positive"
        raise ValueError(f"noise_std must be {range} and finite, a number or one for each number of y; got {noise_std}")
