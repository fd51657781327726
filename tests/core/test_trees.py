"""Leaves of pytrees by name."""

import chex
import jax
import numpy as np
import optax
import pytest

import jdiff
from jdiff.core.trees import named_leaves, named_shapes, path_names, shape_difference

TREE = {"params": {"Dense_0": {"kernel": np.ones((2, 3))}}, "list": [np.ones(4), (np.ones(()),)]}
NAMES = ["list/0", "list/1/0", "params/Dense_0/kernel"]


def test_names_are_those_of_jax_in_the_order_of_its_leaves():
    leaves = named_leaves(TREE)
    assert list(leaves) == NAMES
    chex.assert_trees_all_equal(list(leaves.values()), jax.tree.leaves(TREE), strict=True)
    paths = jax.tree_util.tree_leaves_with_path(TREE)
    assert list(leaves) == [jax.tree_util.keystr(path, simple=True, separator="/") for path, _ in paths]
    assert list(named_leaves(TREE, ".")) == [name.replace("/", ".") for name in NAMES]


def test_attributes_are_named_like_keys():
    """Of named tuples, as in the states of optax, and of this library's nouns."""
    assert list(named_leaves(optax.adam(0.1).init({"w": np.ones(2)}))) == ["0/count", "0/mu/w", "0/nu/w"]
    assert list(named_leaves(jdiff.VP(0.1, 20.0))) == ["beta_min", "beta_max"]
    (path, _), *_ = jax.tree_util.tree_leaves_with_path({"a": [1]})
    assert path_names(path) == ["a", "0"]


@pytest.mark.parametrize(
    "changed,said",
    [
        ({}, None),
        ({"b": (2,)}, "b has shape (2,), expected (1,)"),
        ({"c": (1,)}, "unexpected c"),
        ({"c": (1,), "d": ()}, "unexpected c and 1 more"),
    ],
)
def test_differences(changed, said):
    expected = named_shapes({"a": np.ones((2, 3)), "b": np.ones(1)})
    assert expected == {"a": (2, 3), "b": (1,)}
    assert shape_difference(expected | changed, expected) == said
    if "c" in changed:
        assert shape_difference(expected, expected | changed) == said.replace("unexpected", "missing")
