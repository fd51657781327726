"""The arguments of exported programs: compared with what was exported, so that a wrong one is one clear line."""

from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.names import did_you_mean
from jdiff.core.pytrees import known
from jdiff.export.programs import BATCH


def concrete_numbers(leaves: Mapping[str, Any]) -> dict[str, Any]:
    """Leaves that can be written to a file, by name.

    Raises:
        ValueError: one of them is no number, or not known now.
    """
    for name, leaf in leaves.items():
        if isinstance(leaf, jax.core.Tracer) or not known(leaf):
            raise ValueError(f"{name} is traced or on another machine; export outside of jit, grad and vmap")
        plain = isinstance(leaf, int | float | np.ndarray | np.generic | jax.Array)
        if not plain or jnp.issubdtype(jnp.result_type(leaf), jax.dtypes.extended):
            raise ValueError(f"{name} is a {type(leaf).__name__}, which a file of numbers cannot hold")
    return dict(leaves)


def check_rows(given: Mapping[str, Any], expected: Mapping[str, Mapping[str, Any]]) -> dict[str, Any]:
    """Arrays of a call, of the shapes and dtypes that were exported; integers of other widths are cast.

    Raises:
        ValueError: for other names, shapes, dtypes, and batches of different sizes.
    """
    check_names("argument", given, expected)
    if missing := sorted(expected.keys() - given.keys()):
        raise ValueError(f"the argument {missing[0]} is missing; it was exported as {_shown(expected[missing[0]])}")
    rows = {name: _row(name, value, expected[name]) for name, value in given.items()}
    sizes = {name: rows[name].shape[0] for name in rows if expected[name]["shape"][:1] == [BATCH]}
    if len(set(sizes.values())) > 1:
        raise ValueError(
            f"all arguments must have one batch; got {', '.join(f'{n} of {size}' for n, size in sizes.items())}"
        )
    if 0 in sizes.values():
        raise ValueError("the batch is empty; an exported program takes 1 sample or more")
    return rows


def check_names(what: str, given: Mapping[str, Any], expected: Mapping[str, Any]) -> None:
    """Raise ValueError for a name that was not exported."""
    for name in given:
        if name not in expected:
            names = ", ".join(expected) or "none"
            raise ValueError(f"{what} {name!r} was not exported{did_you_mean(name, expected)}; there is {names}")


def _row(name: str, value: Any, spec: Mapping[str, Any]):
    array = jnp.asarray(value)
    shape, expected = list(array.shape), list(spec["shape"])
    if expected[:1] == [BATCH] and shape:
        expected[0] = shape[0]
    if shape != expected:
        raise ValueError(f"{name} has shape {array.shape}; it was exported as {_shown(spec)}")
    if str(array.dtype) == spec["dtype"]:
        return array
    integers = jnp.issubdtype(array.dtype, jnp.integer) and "int" in spec["dtype"]
    if not integers:
        raise ValueError(f"{name} is {array.dtype}; it was exported as {_shown(spec)}")
    return array.astype(spec["dtype"])


def _shown(spec: Mapping[str, Any]) -> str:
    return f"{spec['dtype']} ({', '.join(map(str, spec['shape']))}{',' * (len(spec['shape']) == 1)})"
