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


def per_sample(default=dataclasses.MISSING, **kwargs):
    """A field of a `noun` whose arrays have a row for each sample of a batch: labels, weights (B,), observations.

    A number has no rows, nor has the inside of a callable. What treats samples one by one, as `sample_adaptive`, goes
    by this mark. The field is kept as it is given: a label stays an integer.
    """
    return dataclasses.field(default=default, metadata={"per_sample": True}, **kwargs)


def number(value):
    """`value` as a Python float if it is one real number known now, else `value` itself.

    Python's, NumPy's and JAX's numbers differ in dtype and weakness of type, and each kind would compile anew. Arrays
    with axes, booleans, keys, traced values and arrays of other processes stay as they are.
    """
    if isinstance(value, (int, float)) and not isinstance(value, bool):
        return float(value)
    if isinstance(value, jax.core.Tracer) or not isinstance(value, (np.generic, np.ndarray, jax.Array)) or value.ndim:
        return value
    if isinstance(value, jax.Array) and not value.is_fully_addressable:
        return value
    real = jnp.issubdtype(value.dtype, jnp.floating) or jnp.issubdtype(value.dtype, jnp.integer)
    return float(jax.device_get(value)) if real else value


class _Rows(jax.tree_util.GetAttrKey):
    """The name of a `per_sample` field in a leaf's path."""


@dataclass_transform(frozen_default=True, field_specifiers=(static, per_sample))
def noun(cls):
    """Make `cls` a frozen dataclass and a pytree whose leaves are its numbers.

    A number given for a leaf becomes a Python float on construction, so that `DDIM(0)`, `DDIM(0.5)`,
    `DDIM(np.float64(0.5))` and `DDIM(jnp.float32(0.5))` are one program; NumPy's integers given for statics become
    Python's. A method `check(self)`, if there is one, runs on construction too. Rebuilding the tree inside a
    transformation does none of this: there the leaves may be anything.

    Nouns are equal if their types, statics and leaves are: arrays in shape, dtype and value, numbers in value alone.
    Equal nouns have one hash. Comparing traced leaves, and a hash of what can change (a dict, a list), is a TypeError.
    """
    own_check = cls.__dict__.get("check")

    def __post_init__(self):
        for name in numbers:
            object.__setattr__(self, name, number(getattr(self, name)))
        for name in statics:
            if isinstance(getattr(self, name), np.integer):
                object.__setattr__(self, name, int(getattr(self, name)))
        if own_check:
            own_check(self)

    def __eq__(self, other):
        if self is other:
            return True
        if type(other) is not cls:
            return NotImplemented
        (own, kind), (others, other_kind) = jax.tree.flatten(self), jax.tree.flatten(other)
        return kind == other_kind and all(_content(a) == _content(b) for a, b in zip(own, others, strict=True))

    def __hash__(self):
        parts = [cls]
        for name in leaves + statics:
            value = getattr(self, name)
            try:
                parts.append(_hash(value) if name in leaves else hash(value))
            except TypeError as error:
                raise TypeError(f"{cls.__name__} has no hash, because of its field {name}: {error}") from error
        return hash(tuple(parts))

    cls.__post_init__, cls.__eq__, cls.__hash__ = __post_init__, __eq__, __hash__
    cls = dataclasses.dataclass(frozen=True, eq=False)(cls)
    fields = dataclasses.fields(cls)
    leaves = tuple(f.name for f in fields if not f.metadata.get("static"))
    statics = tuple(f.name for f in fields if f.metadata.get("static"))
    rows = frozenset(f.name for f in fields if f.metadata.get("per_sample"))
    numbers = tuple(name for name in leaves if name not in rows)

    def flatten_with_keys(self):
        children = []
        for name in leaves:
            value = getattr(self, name)
            kind = _Rows if name in rows and not callable(value) else jax.tree_util.GetAttrKey
            children.append((kind(name), value))
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


def _content(value):
    """What a leaf is compared and hashed by: of an array, its shape, dtype and bytes, with one zero and one nan."""
    if isinstance(value, jax.core.Tracer):
        raise TypeError("traced values cannot be compared or hashed; compare nouns outside of jit, grad and vmap")
    value = number(value)
    if isinstance(value, float):
        value = np.asarray(value)
    if not isinstance(value, (np.ndarray, np.generic, jax.Array)):
        return value
    is_key = jnp.issubdtype(value.dtype, jax.dtypes.prng_key)
    host = np.asarray(jax.device_get(jax.random.key_data(value) if is_key else value))
    if jnp.issubdtype(host.dtype, jnp.inexact):
        host = np.where(np.isnan(host), np.asarray(np.nan, host.dtype), host + np.asarray(0, host.dtype))
    return value.shape, value.dtype, host.tobytes()


def _hash(value) -> int:
    """The hash of a field of leaves, part by part where it is a tuple."""
    return hash(tuple(_hash(part) for part in value) if isinstance(value, tuple) else _content(value))


def row_axes(tree, n: int):
    """A tree like `tree` with 0 for the arrays in `per_sample` fields and None for all other leaves: vmap's `in_axes`.

    Raises ValueError for such an array that has not n rows.
    """

    def axis(path, leaf):
        field = next((key.name for key in path if isinstance(key, _Rows)), None)
        if field is None or not jnp.ndim(leaf):
            return None
        if jnp.shape(leaf)[0] != n:
            raise ValueError(f"{field} has shape {jnp.shape(leaf)} for a batch of {n}; expected {n} rows or a number")
        return 0

    return jax.tree_util.tree_map_with_path(axis, tree)


def varying(*trees) -> frozenset:
    """The axes of a surrounding `jax.shard_map` over which any array in `trees` varies."""
    if not jax.sharding.get_abstract_mesh().manual_axes:
        return frozenset()
    arrays = [leaf for leaf in jax.tree.leaves(trees) if isinstance(leaf, jax.Array)]
    return frozenset().union(*(jax.typeof(leaf).manual_axis_type.varying for leaf in arrays))


def vary_as(tree, *like):
    """`tree` with its arrays varying over the axes of a surrounding `jax.shard_map` over which those of `like` do.

    The carry of a loop must vary before the first pass as it does after it. Elsewhere nothing changes.
    """
    axes = varying(like)

    def cast(leaf):
        missing = tuple(axes - varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def concrete(*values) -> bool:
    """Whether all values are known now (not traced), so that they can be checked."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


SMALLEST, LARGEST = 1e-9, 1e9  # of a setting: float32 holds the fourth power of both


def check_range(owner, low, high=LARGEST, /, **numbers) -> None:
    """Raise ValueError unless each number, where it is known now, is from `low` to `high`; None is left alone."""
    for name, value in numbers.items():
        if value is None or not concrete(value, low):
            continue
        a = np.asarray(value)
        is_number = jnp.issubdtype(a.dtype, np.number) and not isinstance(value, (tuple, list))
        if not is_number or not ((a >= low) & (a <= high)).all():
            raise ValueError(f"{type(owner).__name__}: {name} must be {low} or more, at most {high:g}, got {value}")


def check_count(owner, most: int = 1_000_000, /, **numbers) -> None:
    """Raise ValueError unless each number, where it is known now, is whole, from 1 to `most`."""
    check_range(owner, 1, most, **numbers)
    for name, value in numbers.items():
        if value is None or (concrete(value) and (np.asarray(value) % 1 != 0).any()):
            raise ValueError(f"{type(owner).__name__}: {name} must be a whole number, got {value}")


# ---------------------------------------------------------------- shapes and safe functions


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


def check_time(t, x) -> None:
    """Raise ValueError unless `t` has shape () or (B,), B being the leading axis of `x`."""
    shape = jnp.shape(t)
    if shape != () and shape != jnp.shape(x)[:1]:
        raise ValueError(f"t has shape {shape}; expected () or {jnp.shape(x)[:1]}, x being {jnp.shape(x)}")


def check_same_shape(name: str, a, other: str, b) -> None:
    """Raise ValueError unless two arrays agree in shape: nothing here broadcasts silently."""
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(f"{name} has shape {jnp.shape(a)} but {other} has {jnp.shape(b)}; they must be the same")


def check_floating(name: str, x) -> None:
    """Raise ValueError unless `x` is a floating array: coefficients cast to integers would be 0."""
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} is {dtype}; expected a floating array: scale images by x / 127.5 - 1")


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
    It is drawn in float32 at least and then cast: JAX's own draws of bfloat16 have 128 values and no tails.
    """
    own = getattr(key, "normal", None)
    if own is not None:
        return own(shape, dtype)
    drawn = jax.vmap(lambda k: jax.random.normal(k, shape[1:], wide_dtype(dtype)))(each(key, shape[0]))
    return drawn.astype(dtype)
