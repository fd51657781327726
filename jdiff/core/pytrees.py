"""Nouns: frozen pytrees whose leaves are their numbers."""

import dataclasses
import functools
import inspect
from collections.abc import Callable
from typing import Any, ParamSpec, Self, TypeVar, dataclass_transform

import jax
import jax.numpy as jnp
import numpy as np

P = ParamSpec("P")
T = TypeVar("T")


def static(default=dataclasses.MISSING, **kwargs):
    """A field of a `noun` that is part of its type and no leaf: a function, a name, an order.

    Args:
        default: its default, if it has one.
        kwargs: as for `dataclasses.field`.
    """
    return dataclasses.field(default=default, metadata={"static": True}, **kwargs)


def per_sample(default=dataclasses.MISSING, **kwargs):
    """A field of a `noun` whose arrays have a row for each sample of a batch: labels, weights (B,), observations.

    A number has no rows, and the inside of a callable has none. What treats samples one by one, as `sample_adaptive`,
    goes by this mark. The field is kept as it is given: a label stays an integer.

    Args:
        default: its default, if it has one.
        kwargs: as for `dataclasses.field`.
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


class Noun:
    """What type checkers know of every noun. `noun` itself adds the method to any class, with or without this base."""

    def replace(self, **changes: Any) -> Self:
        """The same noun with other values of some fields: `VP().replace(beta_min=0.2)`."""
        return dataclasses.replace(self, **changes)  # type: ignore[type-var]  # whoever inherits is a dataclass


@dataclass_transform(frozen_default=True, field_specifiers=(static, per_sample))
def noun(cls):
    """Make `cls` a frozen dataclass and a pytree whose leaves are its numbers.

    >>> @noun
    ... class Line:
    ...     slope: float = 1.0
    >>> Line(2)
    Line(slope=2.0)

    A number given for a leaf becomes a Python float on construction, so that `DDIM(0)`, `DDIM(0.5)`,
    `DDIM(np.float64(0.5))` and `DDIM(jnp.float32(0.5))` are one program; NumPy's integers given for statics become
    Python's. A method `check(self)`, if there is one, runs on construction too. Rebuilding the tree inside a
    transformation does none of this: there the leaves may be anything.

    Nouns are equal if their types, statics and leaves are: arrays in shape, dtype and value, numbers in value alone.
    Equal nouns have one hash. Comparing traced leaves, and a hash of what can change (a dict, a list), is a TypeError.
    They print as the call that makes them, without what is at its default, and large arrays by shape and dtype.

    Raises:
        TypeError: for what is no class, a class that is a dataclass already, and one with an `__init__` of its own.
    """
    check_class("noun", cls)
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
    if cls.__repr__ is object.__repr__:
        cls.__repr__ = _call_that_makes
    cls = dataclasses.dataclass(frozen=True, eq=False, repr=False)(cls)
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
    cls.replace = Noun.replace
    return cls


def prints_as_call(make: Callable[P, T]) -> Callable[P, T]:
    """Let the nouns that a function returns print as its call, `DPMpp2M()`, for as long as they are not changed."""
    signature = inspect.signature(make)

    @functools.wraps(make)
    def called(*args: P.args, **kwargs: P.kwargs) -> T:
        made = make(*args, **kwargs)
        given = signature.bind(*args, **kwargs)
        given.apply_defaults()
        fields = {name: (value, signature.parameters[name].default) for name, value in given.arguments.items()}
        object.__setattr__(made, "_call", _call(make.__name__, fields))
        return made

    return called


def check_class(decorator: str, cls) -> None:
    """Raise TypeError for what a decorator cannot make a noun of: a class that says already how it is made."""
    if not isinstance(cls, type):
        raise TypeError(f"@jdiff.{decorator} stands above a class; got an object, a {type(cls).__name__}")
    if "__dataclass_fields__" in cls.__dict__:
        raise TypeError(f"{cls.__name__} is a dataclass already; leave the other decorator out: {decorator} makes one")
    for name in ("__init__", "__post_init__"):
        if name in cls.__dict__:
            raise TypeError(
                f"{cls.__name__} has an {name} of its own; declare what it is given as fields, as power: float = 2.0, "
                "and look at their values in a method check(self)"
            )


def _call_that_makes(self) -> str:
    """`Name(field=value, ...)`, or what `prints_as_call` noted."""
    fields = {
        f.name: (
            getattr(self, f.name),
            f.default if f.default_factory is dataclasses.MISSING else f.default_factory(),
        )
        for f in dataclasses.fields(self)
        if f.repr
    }
    return self.__dict__.get("_call") or _call(type(self).__name__, fields)


def _call(name: str, fields: dict[str, tuple]) -> str:
    """`name(field=value, ...)` of {field: (value, default)}, without those at their defaults."""
    shown = [f"{name}={in_short(v)}" for name, (v, default) in fields.items() if not _is_default(v, default)]
    return f"{name}({', '.join(shown)})"


def _is_default(value, default) -> bool:
    if value is default:
        return True
    # arrays and traced values are never compared: printing must not wait for a device
    plain = all(isinstance(leaf, (int, float, str)) for leaf in jax.tree.leaves((value, default)))
    return plain and isinstance(value, bool) == isinstance(default, bool) and value == default


def in_short(value) -> str:
    """A value as it is printed inside a noun: arrays of more than 4 numbers by dtype and shape, functions by name.

    >>> in_short({"w": np.zeros((3, 2), np.float32), "b": np.zeros(2, np.float32)})
    '<2 arrays, 8 numbers>'
    >>> in_short(np.zeros((3, 2), np.float32))
    'float32[3,2]'
    """
    if isinstance(value, (jax.Array, np.ndarray, np.generic)):
        plain = isinstance(value, (np.ndarray, np.generic)) or (known(value) and _has_numbers(value))
        if plain and value.size <= 4:
            return str(np.asarray(value).tolist())
        return f"{value.dtype}[{','.join(map(str, value.shape))}]"
    if isinstance(value, (dict, list, tuple)):
        leaves = jax.tree.leaves(value)
        arrays = [leaf for leaf in leaves if isinstance(leaf, (jax.Array, np.ndarray))]
        if arrays and (isinstance(value, dict) or len(leaves) > 4):
            numbers = sum(leaf.size for leaf in arrays)
            return f"<{len(arrays)} array{'s' * (len(arrays) > 1)}, {numbers:,} numbers>"
        if type(value) in (list, tuple) and arrays:
            inside = ", ".join(map(in_short, value))
            return f"[{inside}]" if isinstance(value, list) else f"({inside}{',' * (len(value) == 1)})"
    if isinstance(value, functools.partial):
        return f"partial({in_short(value.func)})"
    if inspect.ismethod(value):
        return f"{type(value.__self__).__name__}.{value.__name__}"
    if callable(value) and hasattr(value, "__qualname__"):
        return value.__qualname__.replace("<locals>.", "")
    text = repr(value)
    return text if dataclasses.is_dataclass(value) or len(text) <= 80 else text[:77] + "..."


def _has_numbers(value: jax.Array) -> bool:
    return not jnp.issubdtype(value.dtype, jax.dtypes.prng_key) and not value.is_deleted()


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


def row_field(path: tuple) -> str | None:
    """The name of the `per_sample` field that a leaf's path leads through, or None; outside of callables only."""
    return next((key.name for key in path if isinstance(key, _Rows)), None)


def row_axes(tree, n: int):
    """Where the rows of a tree are: the `in_axes` of a vmap over samples.

    Args:
        tree: a pytree of nouns.
        n: the number of samples.

    Returns:
        A tree like `tree` with 0 for the arrays in `per_sample` fields and None for all other leaves.

    Raises:
        ValueError: for such an array that has not n rows.
    """

    def axis(path, leaf):
        field = row_field(path)
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
    """`tree` with its arrays varying over the axes of a surrounding `jax.shard_map` over which those of `like` vary.

    The carry of a loop must vary before the first pass as it does after it. Elsewhere nothing changes.

    Args:
        tree: a pytree of arrays.
        like: pytrees of arrays.

    Returns:
        The tree, with the same numbers.
    """
    axes = varying(like)

    def cast(leaf):
        missing = tuple(axes - varying(leaf))
        return jax.lax.pcast(leaf, missing, to="varying") if missing else leaf

    return jax.tree.map(cast, tree) if axes else tree


def is_leaf(value) -> bool:
    """Whether a value is itself a leaf to JAX: an array, a number, a function, or an object of an unknown class."""
    leaves = jax.tree.leaves(value)
    return len(leaves) == 1 and leaves[0] is value


def concrete(*values) -> bool:
    """Whether all values are known now (not traced), so that they can be checked."""
    return not any(isinstance(leaf, jax.core.Tracer) for leaf in jax.tree.leaves(values))


def known(*values) -> bool:
    """Whether all values can be read now and here: neither traced, nor on devices of other processes."""
    leaves = jax.tree.leaves(values)
    return concrete(*leaves) and all(not isinstance(a, jax.Array) or a.is_fully_addressable for a in leaves)
