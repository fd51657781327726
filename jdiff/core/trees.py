"""Leaves of pytrees by name: how a leaf is called in files and messages, and how the shapes of two trees differ."""

from typing import Any

import jax


def path_names(path: tuple) -> list[str]:
    """The names along the path of a leaf: keys of dicts, names of attributes, and places in lists and tuples.

    >>> [path_names(path) for path, _ in jax.tree_util.tree_leaves_with_path({"params": {"bias": [0.0, 1.0]}})]
    [['params', 'bias', '0'], ['params', 'bias', '1']]
    """
    return [jax.tree_util.keystr((key,), simple=True) for key in path]


def named_leaves(tree: Any, separator: str = "/") -> dict[str, Any]:
    """{name: leaf}, in the order of `jax.tree.leaves`; a name is the names along the path, joined by `separator`.

    >>> named_leaves({"params": {"bias": [0.0, 1.0]}})
    {'params/bias/0': 0.0, 'params/bias/1': 1.0}
    """
    return {separator.join(path_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(tree)}


def named_shapes(tree: Any, separator: str = "/") -> dict[str, tuple[int, ...]]:
    """{name: shape} of a tree of arrays, or of what has their shapes."""
    return {name: tuple(leaf.shape) for name, leaf in named_leaves(tree, separator).items()}


def shape_difference(found: dict[str, tuple], expected: dict[str, tuple]) -> str | None:
    """The first difference between two dicts of `named_shapes`, in a few words; None if there is none.

    >>> shape_difference({"w": (2, 3)}, {"w": (2, 2)})
    'w has shape (2, 3), expected (2, 2)'
    """
    for problem, names in (("missing", expected.keys() - found.keys()), ("unexpected", found.keys() - expected.keys())):
        if names:
            return f"{problem} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for name, shape in expected.items():
        if shape != found[name]:
            return f"{name} has shape {found[name]}, expected {shape}"
    return None
