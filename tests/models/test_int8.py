"""Weights in 8 bits: how far each moves, how large the file is, and that all that follows takes them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

import jdiff
from jdiff.convert import files
from jdiff.core.trees import named_leaves
from jdiff.models import DiT, EDM2UNet, Int8, UNet, quantize
from jdiff.models.int8 import floating

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), num_classes=3)
X, LABEL, COND = jnp.full((2, 8, 8, 1), 0.3), jnp.array([-1.0, 1.0]), jnp.array([0, 2])
NETWORKS = {
    "unet": UNet(heads=2, **SMALL),
    "dit": DiT(width=16, depth=1, heads=2, num_classes=3),
    "edm2": EDM2UNet(head_channels=8, **SMALL),
}


@pytest.mark.parametrize("name", NETWORKS)
def test_no_weight_moves_by_more_than_half_a_scale(name):
    """In every layer, and the largest weight of each channel not at all; what is kept is the same array."""
    network = NETWORKS[name]
    params = random_variables(network, X, LABEL, COND)
    _, small = quantize(network.apply, params)
    kernels = {name: leaf for name, leaf in named_leaves(params).items() if name.endswith("/kernel")}
    found = named_leaves(small)
    changed = [name for name in kernels if f"{name}/values" in found]
    assert set(kernels) - set(changed) <= {f"params/{layer}/kernel" for layer in ("in", "patches", "out")}
    for name in changed:
        values, scale = np.asarray(found[f"{name}/values"]), np.asarray(found[f"{name}/scale"], np.float64)
        w = np.asarray(kernels[name], np.float64)
        assert values.dtype == np.int8 and scale.shape == w.shape[-1:] and np.abs(values).min() >= 0
        axes = tuple(range(w.ndim - 1))
        moved = np.abs(values * scale - w).max(axes)
        assert (moved <= scale / 2 * (1 + 1e-5)).all() and moved.max() > scale[moved.argmax()] / 100
        np.testing.assert_array_equal(np.abs(values).max(axes), 127)
    for name in named_leaves(params).keys() - set(changed):
        assert found[name] is named_leaves(params)[name]


def test_the_network_is_that_of_the_floating_kernels(tmp_path):
    """The same bits as with the kernels made floating before, under jit, in a solver, and in an export."""
    network = NETWORKS["dit"]
    params = random_variables(network, X, LABEL, COND)
    apply, small = quantize(network.apply, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(floating(small), params)
    run = jax.jit(network.apply)
    out = jax.jit(apply)(small, X, LABEL, COND)
    chex.assert_trees_all_close(out, run(floating(small), X, LABEL, COND), rtol=1e-5, atol=1e-6)
    exact = run(params, X, LABEL, COND)
    assert 1e-4 < jnp.linalg.norm(out - exact) / jnp.linalg.norm(exact) < 0.05

    pytest.importorskip("flatbuffers")
    denoise = jdiff.denoiser(apply, small, jdiff.VP(), jdiff.targets.V(), COND)
    jdiff.export.save(tmp_path / "it", denoise, X.shape[1:], platforms=["cpu"])
    loaded = jdiff.export.load(tmp_path / "it").given(cond=COND)
    assert sum(a.dtype == jnp.int8 for a in loaded.numbers.values()) == sum(
        isinstance(leaf, Int8) for leaf in jax.tree.leaves(small, is_leaf=lambda leaf: isinstance(leaf, Int8))
    )
    t = jnp.array([0.2, 0.8])
    np.testing.assert_array_equal(*(jax.jit(lambda d: d(X, t))(one) for one in (loaded, denoise)))


@pytest.mark.parametrize("name,shape", [("unet_digits", (8, 8, 1)), ("dit_small", (32, 32, 3))])
def test_a_file_has_at_most_0_27_of_the_bytes(name, shape, tmp_path):
    """Of registered networks, as safetensors."""
    network = jdiff.create_model(name, num_classes=10)
    params = random_variables(network, jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    _, small = quantize(network.apply, params)
    for file, tree in (("float", params), ("small", small)):
        files.write(tmp_path / f"{file}.safetensors", named_leaves(tree))
    sizes = [(tmp_path / f"{file}.safetensors").stat().st_size for file in ("small", "float")]
    assert 0.25 < sizes[0] / sizes[1] <= 0.27


def test_a_channel_of_zeros_stays_zero_and_wrong_calls_are_one_line():
    params = {"params": {"a": {"kernel": jnp.zeros((3, 2)), "bias": jnp.ones(2)}}}
    apply, small = quantize(lambda p, x: x @ p["params"]["a"]["kernel"], params)
    np.testing.assert_array_equal(apply(small, jnp.ones((1, 3))), 0)
    broken = {"params": {"a": {"kernel": jnp.full((3, 2), jnp.nan)}}}
    for wrong, keep, message in (
        (
            params,
            ["params/b/*"],
            r"keep='params/b/\*' is the name of no kernel; there is params/a/kernel",
        ),
        (params, ["params/*"], "there is no kernel to bring to 8 bits"),
        (small, (), "there is no kernel to bring to 8 bits"),
        (broken, (), "params/a/kernel is not finite"),
    ):
        with pytest.raises(ValueError, match=message):
            quantize(apply, wrong, keep=keep)
    with pytest.raises(TypeError, match="apply is"):
        quantize(None, params)
