"""The table between the tensors of a published network and the variables of a module: names and layouts.

Each entry pairs the path of one of our variables with one published name, or with several whose tensors our variable
holds side by side. The same table serves both directions.
"""

import fnmatch
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.foreign import one_line
from jdiff.core.trees import path_names

Path = tuple[str, ...]


class Layout(NamedTuple):
    """How the numbers of a variable lie in published tensors.

    Args:
        ours: (*tensors) -> array, from the published layout to ours.
        theirs: array -> array or tuple of arrays, its inverse.
    """

    ours: Callable[..., np.ndarray]
    theirs: Callable[[np.ndarray], Any]


class Entry(NamedTuple):
    """One variable of ours and its published tensors.

    Args:
        path: in the variables, ("params", ..., "kernel").
        names: the published name, or names.
        layout: how the numbers lie in the tensors of these names.
    """

    path: Path
    names: str | tuple[str, ...]
    layout: Layout


class Mismatch(ValueError):
    """A file's tensors are not those of the architecture; the message is one line, whatever names the file holds."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


AS_IS = Layout(lambda w: w, lambda w: w)
DENSE = Layout(lambda w: w.T, lambda k: k.T)  # theirs (out, in), ours (in, out)
CONV = Layout(lambda w: np.moveaxis(w, (0, 1), (-1, -2)), lambda k: np.moveaxis(k, (-1, -2), (0, 1)))  # OI... and ...IO

WIDTH_ONE = Layout(lambda w: w.reshape(w.shape[:2]).T, lambda k: k.T[..., None, None])  # a 1x1 Conv2d, and Dense


def fused(heads: int, order: str, widths: int = 0) -> Layout:
    """The layout of a layer of queries, keys and values; the order of our outputs is 3hd: which, head, channel.

    Args:
        heads: the number of attention heads.
        order: of the published outputs, a permutation of "3hd".
        widths: the dimensions of the published convolution of width 1, 0 for a bias.
    """
    to_theirs = tuple("3hd".index(axis) for axis in order)
    to_ours = tuple(order.index(axis) for axis in "3hd")

    def ours(w):
        sizes = {"3": 3, "h": heads, "d": w.shape[0] // (3 * heads)}
        out = w.reshape(*(sizes[axis] for axis in order), *w.shape[1 : w.ndim - widths])
        out = out.transpose(*to_ours, *range(3, out.ndim)).reshape(w.shape[: w.ndim - widths])
        return out.T

    def theirs(k):
        k = k.T
        out = k.reshape(3, heads, -1, *k.shape[1:])
        out = out.transpose(*to_theirs, *range(3, out.ndim)).reshape(k.shape)
        return out.reshape(*out.shape, *(1,) * widths)

    return Layout(ours, theirs)


def to_variables(
    table: Sequence[Entry],
    tensors: Mapping[str, np.ndarray],
    expected: Any,
    ignored: Iterable[str] = (),
    dtype: Any = np.float32,
) -> dict:
    """The variables of a module from named tensors.

    Args:
        table: the pairs of names.
        tensors: by their published names.
        expected: the shapes of the variables, `jax.eval_shape` of `module.init`.
        ignored: patterns of the names of tensors that may be there without a variable of ours.
        dtype: of all variables that are floating-point numbers.

    Returns:
        The variables, nested.

    Raises:
        Mismatch: with lists of the tensors that are missing, unexpected, mis-shaped, and of another kind of numbers.
    """
    leaves = {tuple(path_names(p)): leaf for p, leaf in jax.tree_util.tree_leaves_with_path(expected)}
    shapes = {path: leaf.shape for path, leaf in leaves.items()}
    if set(shapes) != {entry.path for entry in table}:
        odd = sorted("/".join(p) for p in set(shapes) ^ {entry.path for entry in table})
        raise AssertionError(f"the table and the module differ at {', '.join(odd[:8])}")
    asked = [name for entry in table for name in _names(entry)]
    missing = [name for name in asked if name not in tensors]
    known = set(asked)
    unexpected = [n for n in tensors if n not in known and not any(fnmatch.fnmatch(n, pattern) for pattern in ignored)]
    shaped, kinds, found = [], [], {}
    for path, names, layout in table:
        names = (names,) if isinstance(names, str) else names
        if any(name in missing for name in names):
            continue
        parts = [np.asarray(tensors[name]) for name in names]
        try:
            array = np.asarray(layout.ours(*parts))
        except ValueError:
            array = None  # the layout itself asks for another shape
        if array is None or array.shape != shapes[path]:
            theirs = ", ".join(f"{name} {part.shape}" for name, part in zip(names, parts, strict=True))
            shaped.append(f"{theirs} for {'/'.join(path)} {shapes[path]}")
        elif _floating(leaves[path]) != _floating(array):
            kinds.append(f"{', '.join(names)} {array.dtype} for {'/'.join(path)} {leaves[path].dtype}")
        else:
            found[path] = array
    if missing or unexpected or shaped or kinds:
        lists = _listed(missing, "missing") + _listed(unexpected, "unexpected") + _listed(shaped, "shape")
        raise Mismatch("; ".join(lists + _listed(kinds, "of other numbers")))
    return _nest({path: array.astype(dtype) if _floating(array) else array for path, array in found.items()})


def to_tensors(table: Sequence[Entry], variables: Mapping) -> dict[str, np.ndarray]:
    """The named tensors of a module's variables, the inverse of `to_variables`.

    Args:
        table: the pairs of names.
        variables: nested, with all of the table and no others.

    Returns:
        The tensors by their published names.

    Raises:
        ValueError: for variables that the table lacks, which would be lost, and for those that are missing.
    """
    arrays = {tuple(path_names(p)): np.asarray(leaf) for p, leaf in jax.tree_util.tree_leaves_with_path(variables)}
    placed = {entry.path for entry in table}
    missing, unexpected = (["/".join(p) for p in sorted(odd)] for odd in (placed - set(arrays), set(arrays) - placed))
    if missing or unexpected:
        lists = _listed(missing, "missing") + _listed(unexpected, "without a name in the architecture")
        raise ValueError(f"these variables cannot be written: {'; '.join(lists)}")
    tensors = {}
    for path, names, layout in table:
        parts = layout.theirs(arrays[path])
        for name, part in [(names, parts)] if isinstance(names, str) else zip(names, parts, strict=True):
            tensors[name] = np.asarray(part, order="C")  # keeps numbers of rank 0 so
    return tensors


def dense(path: Path, name: str, bias: bool = True) -> list[Entry]:
    """The entries of a dense layer."""
    return _layer(path, name, DENSE, bias)


def conv(path: Path, name: str, bias: bool = True) -> list[Entry]:
    """The entries of a convolution, in any number of dimensions."""
    return _layer(path, name, CONV, bias)


def norm(path: Path, name: str, bias: bool = True) -> list[Entry]:
    """The entries of a norm with a scale and perhaps a bias."""
    lines = [Entry(("params", *path, "scale"), f"{name}.weight", AS_IS)]
    return lines + ([Entry(("params", *path, "bias"), f"{name}.bias", AS_IS)] if bias else [])


def _layer(path, name, layout, bias):
    lines = [Entry(("params", *path, "kernel"), f"{name}.weight", layout)]
    return lines + ([Entry(("params", *path, "bias"), f"{name}.bias", AS_IS)] if bias else [])


def _names(entry: Entry) -> tuple[str, ...]:
    return (entry.names,) if isinstance(entry.names, str) else entry.names


def _floating(array) -> bool:
    return jnp.issubdtype(array.dtype, jnp.floating)  # bfloat16 too, which NumPy does not count


def _listed(items: list[str], title: str, most: int = 8) -> list[str]:
    if not items:
        return []
    more = f" and {len(items) - most} more" if len(items) > most else ""
    return [f"{len(items)} {title}: {', '.join(items[:most])}{more}"]


def _nest(flat: Mapping[Path, np.ndarray]) -> dict:
    tree: dict = {}
    for path, array in flat.items():
        node = tree
        for key in path[:-1]:
            node = node.setdefault(key, {})
        node[path[-1]] = array
    return tree
