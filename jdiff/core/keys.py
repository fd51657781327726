"""Randomness by position: noise is a function of (key, step, position in the global batch).

Where a key is asked for, it may be one key, one key per sample (B,), a `BatchKey`, or any `Noise`.
"""

from typing import Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

from jdiff.core.arrays import Array, wide_dtype
from jdiff.core.checks import check_is


@runtime_checkable
class Noise(Protocol):
    """What may stand in place of a key within one step of a solver: a source of noise of its own."""

    def normal(self, shape, dtype=jnp.float32) -> Array:
        """Standard normal noise of a shape (B, ...)."""
        ...

    def fold(self, data):
        """Keys or noise that are independent of this noise and of those of other `data`."""
        ...

    def part(self, t, s, j: int) -> "Noise":
        """The noise of stretch j of the step, from t down to s."""
        ...


@runtime_checkable
class NoisePath(Protocol):
    """What may stand in place of a key for a whole run: the noise of all its steps."""

    def rows(self, n: int) -> "NoisePath":
        """The same with one path per sample, n of them."""
        ...

    def over(self, i, t, s) -> Noise:
        """The noise of step i, from t down to s."""
        ...


@struct.dataclass
class BatchKey:
    """A key that also knows which rows of the global batch it is for.

    Rows `start`, ..., `start + len(batch) - 1` of `size` draw the same numbers as they would in one
    batch of `size`: what makes 1 device, pmap and gradient accumulation agree.
    """

    key: Array
    start: Array
    size: int = struct.field(pytree_node=False)


def as_key(key) -> Array:
    """A typed key array; the raw uint32 keys of `jax.random.PRNGKey` are wrapped."""
    check_is("key", key, (jax.Array, np.ndarray), "a PRNG key: jax.random.key(seed)")
    if jnp.issubdtype(key.dtype, jax.dtypes.prng_key):
        return key
    if key.dtype == jnp.uint32 and key.ndim and key.shape[-1] == 2:
        return jax.random.wrap_key_data(key)
    raise ValueError(f"expected a PRNG key, got an array of {key.dtype}{key.shape}; make one with jax.random.key(seed)")


def positions(key, n: int) -> tuple[Array, int]:
    """(global index of each of the n rows (n,), size of the global batch)."""
    if isinstance(key, BatchKey):
        return key.start + jnp.arange(n), key.size
    return jnp.arange(n), n


def fold(key, data):
    """`jax.random.fold_in` for one key, (B,) keys or a BatchKey; of a step of a Brownian path, independent keys."""
    if isinstance(key, Noise):
        return key.fold(data)
    if isinstance(key, BatchKey):
        return key.replace(key=fold(key.key, data))
    key = as_key(key)
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def part(key, t, s, j: int):
    """The key of stretch j of a step, from t down to s: `fold(key, j)`, or that stretch of the same Brownian path."""
    return key.part(t, s, j) if isinstance(key, Noise) else fold(key, j)


def split(key, n: int = 2) -> list:
    """n independent keys of the same kind as `key`: one key, (B,) keys or a BatchKey."""
    return [fold(key, i) for i in range(n)]


def joint(key) -> Array:
    """One plain key for what a network draws for a whole batch, as dropout: of a BatchKey, another for each slice."""
    return fold(as_key(key.key), key.start) if isinstance(key, BatchKey) else as_key(key)


def each(key, n: int) -> Array:
    """One key per row, (n,): row i has `fold_in(key, global index of i)`, or its own if `key` is (n,) already."""
    if not isinstance(key, BatchKey):
        key = as_key(key)
        if key.ndim == 1:
            if key.shape != (n,):
                raise ValueError(f"{key.shape[0]} keys for a batch of {n}; give one key, or one per sample")
            return key
        if key.ndim:
            raise ValueError(f"keys have shape {key.shape}; give one key, or one per sample: ({n},)")
    index, _ = positions(key, n)
    base = as_key(key.key if isinstance(key, BatchKey) else key)
    return jax.vmap(lambda i: jax.random.fold_in(base, i))(index)


def normal(key, shape, dtype=jnp.float32) -> Array:
    """Standard normal noise, row i of which is a function of (key, global index of i) only, whatever B is.

    It is drawn in float32 at least and then cast: JAX's own draws of bfloat16 have 128 values and no tails.

    Args:
        key: one key, (B,) keys, a `BatchKey`, or a `Noise`, which draws by itself: a step of a `BrownianTree` gives the
            increment of its path over the step, scaled to variance 1.
        shape: of the result, (B, ...).
        dtype: of the result, floating.

    Returns:
        The noise, of that shape and dtype.
    """
    if isinstance(key, Noise):
        return key.normal(shape, dtype)
    drawn = jax.vmap(lambda k: jax.random.normal(k, shape[1:], wide_dtype(dtype)))(each(key, shape[0]))
    return drawn.astype(dtype)


def rows_of(key, n: int):
    """`key` with one key or path per sample, (n,), whether it is one key, (n,) keys, a `BatchKey` or a `NoisePath`."""
    if key is None:
        return None
    return key.rows(n) if isinstance(key, NoisePath) else each(key, n)


def noise_of_step(keys, i, t, s):
    """The noise of step i, from t to s, given what `rows_of` made."""
    if keys is None:
        return None
    return keys.over(i, t, s) if isinstance(keys, NoisePath) else fold(keys, i)


def shared(key) -> Array:
    """The key that all rows of the global batch share, if there is one; (B,) keys as they are."""
    return as_key(key.key if isinstance(key, BatchKey) else key)


def strata(key, n: int) -> Array:
    """One uniform number per row, (n,): frac(u + i/size), with one u for the whole global batch of that size.

    Together they cover [0, 1) evenly. With (n,) keys, one independent uniform number each.
    """
    base = shared(key)
    if base.ndim:
        return jax.vmap(jax.random.uniform)(each(base, n))
    index, size = positions(key, n)
    u = jax.random.uniform(base)
    return (u + index.astype(u.dtype) / size) % 1
