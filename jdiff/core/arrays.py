"""Arrays: times, dtypes, shapes that scale a batch, and functions that stay finite."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.core.checks import check_floating

Array = jax.Array
Number = Any  # a float, or an array of shape (), or a tracer of one


def as_time(t) -> Array:
    """`t` as a floating array of at least float32: the dtype in which coefficients are computed."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(float)
    return t if jnp.finfo(t.dtype).bits >= 32 else t.astype(jnp.float32)


def wide_dtype(dtype):
    """float32 for a floating dtype of fewer bits, else the dtype itself."""
    return jnp.float32 if jnp.finfo(dtype).bits < 32 else dtype


def wide(tree):
    """The same tree, its floating arrays in float32 at least: what sums and averages are computed in."""

    def leaf(a):
        dtype = jnp.result_type(a)
        return jnp.asarray(a, wide_dtype(dtype)) if jnp.issubdtype(dtype, jnp.floating) else a

    return jax.tree.map(leaf, tree)


def expand(a, x) -> Array:
    """Right-pad the shape of `a` with ones and cast it, so that it scales `x`: (B,) -> (B, 1, ..., 1).

    Raises ValueError if `x` is no floating array: the cast would make zeros of the coefficients.
    """
    check_floating("x", x)
    a = jnp.asarray(a)
    return jnp.reshape(a, a.shape + (1,) * (jnp.ndim(x) - a.ndim)).astype(x.dtype)


def safe_sqrt(u) -> Array:
    """sqrt(u), 0 where u <= 0, with derivative 0 there: plain sqrt has an infinite one, hence nan at eta = 0."""
    u = jnp.asarray(u)
    positive = u > 0
    return jnp.where(positive, jnp.sqrt(jnp.where(positive, u, 1)), 0)


def safe_log(u, tiny=1e-20) -> Array:
    """log(max(u, tiny)) with derivative 0 below `tiny`: finite where alpha or sigma vanishes."""
    u = jnp.asarray(u)
    return jnp.log(jnp.where(u > tiny, u, tiny))


def safe_divide(a, b) -> Array:
    """a / b, and 0 where b = 0, with finite derivatives in both."""
    b = jnp.asarray(b)
    zero = b == 0
    return jnp.where(zero, 0, a / jnp.where(zero, 1, b))
