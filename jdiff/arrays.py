"""Floor 0: what every other file needs of arrays, pytrees and randomness."""

import dataclasses
from collections.abc import Callable
from typing import Any, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np
from flax import struct

Array = jax.Array
Number = Any  # a float, or an array of shape (), or a tracer of one
Denoise = Callable[[Array, Array], Array]  # (x_t, t) -> E[x_0 | x_t]


# ---------------------------------------------------------------- pytrees of numbers


def static(default=dataclasses.MISSING, **kwargs):
    """A field of a `noun` that is part of its type, not a leaf: a function, a name, an order."""
    return dataclasses.field(default=default, metadata={"static": True}, **kwargs)


@dataclass_transform(frozen_default=True, field_specifiers=(static,))
def noun(cls):
    """Make `cls` a frozen dataclass and a pytree whose leaves are its numbers.

    Integers become floats on construction, so that `DDIM(eta=0)` and `DDIM(eta=0.5)` are one program.
    A method `check(self)`, if there is one, runs on construction too. Rebuilding the tree inside a
    transformation does neither: there the leaves may be anything.
    """
    own_check = cls.__dict__.get("check")

    def __post_init__(self):
        for field in leaves:
            value = getattr(self, field)
            if isinstance(value, (int, np.integer)) and not isinstance(value, bool):
                object.__setattr__(self, field, float(value))
        if own_check:
            own_check(self)

    cls.__post_init__ = __post_init__
    cls = dataclasses.dataclass(frozen=True)(cls)
    fields = dataclasses.fields(cls)
    leaves = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))

    def flatten_with_keys(self):
        children = tuple((jax.tree_util.GetAttrKey(name), getattr(self, name)) for name in leaves)
        return children, tuple(getattr(self, name) for name in statics)

    def flatten(self):
        return tuple(getattr(self, name) for name in leaves), tuple(getattr(self, name) for name in statics)

    def unflatten(aux, children):
        self = object.__new__(cls)
        for name, value in zip(leaves + statics, tuple(children) + tuple(aux), strict=True):
            object.__setattr__(self, name, value)
        return self

    jax.tree_util.register_pytree_with_keys(cls, flatten_with_keys, unflatten, flatten)
    cls.replace = dataclasses.replace
    return cls


def concrete(*values) -> bool:
    """Whether all values are known now (not traced), so that they can be checked."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


# ---------------------------------------------------------------- shapes and safe functions


def as_time(t) -> Array:
    """`t` as a floating array of at least float32: the dtype in which coefficients are computed."""
    t = jnp.asarray(t)
    if not jnp.issubdtype(t.dtype, jnp.floating):
        t = t.astype(float)
    return t if jnp.finfo(t.dtype).bits >= 32 else t.astype(jnp.float32)


def check_time(t, x) -> None:
    """Raise ValueError unless `t` has shape () or (B,), B being the leading axis of `x`."""
    shape = jnp.shape(t)
    if shape != () and shape != jnp.shape(x)[:1]:
        raise ValueError(f"t has shape {shape}; expected () or {jnp.shape(x)[:1]}, x being {jnp.shape(x)}")


def check_same_shape(name: str, a, other: str, b) -> None:
    """Raise ValueError unless two arrays agree in shape: nothing here broadcasts silently."""
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(f"{name} has shape {jnp.shape(a)} but {other} has {jnp.shape(b)}; they must be the same")


def expand(a, x) -> Array:
    """Right-pad the shape of `a` with ones and cast it, so that it scales `x`: (B,) -> (B, 1, ..., 1)."""
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


# ---------------------------------------------------------------- randomness by position


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
    own = getattr(key, "fold", None)
    if own is not None:
        return own(data)
    if isinstance(key, BatchKey):
        return key.replace(key=fold(key.key, data))
    key = as_key(key)
    return jax.random.fold_in(key, data) if key.ndim == 0 else jax.vmap(lambda k: jax.random.fold_in(k, data))(key)


def part(key, t, s, j: int):
    """The key of stretch j of a step, from t down to s: `fold(key, j)`, or that stretch of the same Brownian path."""
    own = getattr(key, "part", None)
    return fold(key, j) if own is None else own(t, s, j)


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
    """Standard normal noise (B, ...), row i a function of (key, global index of i) only, whatever B is.

    Given a step of a `BrownianTree` instead of a key, the increment of that path over the step, scaled to variance 1.
    """
    own = getattr(key, "normal", None)
    if own is not None:
        return own(shape, dtype)
    return jax.vmap(lambda k: jax.random.normal(k, shape[1:], dtype))(each(key, shape[0]))
