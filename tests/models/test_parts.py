"""Loops over parts of a batch: the values of the whole, and nothing sent between devices but the sums of gradients."""

import re

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

from jdiff import parallel
from jdiff.models.attention import SelfAttention
from jdiff.models.conv import Conv
from jdiff.models.parts import map_parts, part_size


@pytest.mark.parametrize("batch", [1, 6, 7, 8, 24, 32, 48, 100])
@pytest.mark.parametrize("most", [0, 1, 5, 12, 1000])
def test_parts_divide_the_batch_and_the_devices_divide_the_parts(batch, most):
    size, devices = part_size(batch, most), jax.device_count()
    assert devices == 8 and batch % size == 0 and size <= max(most, devices)
    assert size % 8 == 0 or batch % 8  # each device has its share of every part
    larger = [n for n in range(size + 1, most + 1) if batch % n == 0 and n % np.gcd(batch, 8) == 0]
    assert not larger


def test_map_parts_is_the_whole():
    x, y = np.arange(24.0).reshape(12, 2), np.arange(12.0)
    one = lambda x, y, mask: x * y[:, None] if mask is None else x  # noqa: E731
    for size in (1, 3, 4, 12):
        np.testing.assert_array_equal(map_parts(one, size, x, y, None), one(x, y, None))
    shapes = []
    map_parts(lambda x: shapes.append(x.shape) or x, 4, x)
    assert set(shapes) == {(4, 2)}


@pytest.mark.parametrize("module", [Conv(64), SelfAttention(heads=4, out_scale=1.0)], ids=["conv", "attention"])
def test_devices_loop_over_their_own_samples(module):
    """The gradient over a mesh is that of one device; loops wait for nobody and no sample leaves its device."""
    x, target = jnp.asarray(np.random.default_rng(0).normal(size=(2, 32, 16, 16, 64)), jnp.float32)
    variables = random_variables(module, x)

    def loss(variables, x, target):
        return jnp.mean((module.apply(variables, x) - target) ** 2)

    gradient = jax.jit(jax.value_and_grad(loss, argnums=(0, 1)))
    whole = gradient(variables, x, target)
    mesh = parallel.mesh()
    there = parallel.replicate(mesh, variables), *parallel.shard_batch(mesh, (x, target))
    divided = gradient.lower(*there).compile()
    chex.assert_trees_all_close(jax.device_get(divided(*there)), jax.device_get(whole), rtol=1e-4, atol=1e-6)

    computations, entry = divided.as_text().split("\nENTRY ")
    assert "while(" in entry and "all-reduce(" in entry
    assert not re.search(r"(all-reduce|all-gather|all-to-all|collective-permute|reduce-scatter)\(", computations)
    assert not re.search(r"(all-gather|all-to-all|collective-permute)\(", entry)
