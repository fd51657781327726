"""Counts against closed forms, and receptive fields against the formula for plain stacks."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

from jdiff.models import (
    EDM2UNet,
    ResNet,
    SelfAttention,
    UNet,
    create_model,
    receptive_field,
    receptive_field_of,
    summary,
    transformer,
)
from jdiff.models.conv import Conv


class Wrapped(nn.Module):
    """A layer of x alone as a network of (x, label, cond)."""

    inner: nn.Module

    @nn.compact
    def __call__(self, x, label=None, cond=None):
        return self.inner(x)


def counted(layer, shape):
    found = summary(Wrapped(layer), shape)
    return found.layers[1].flops, found.layers[1].parameters


def test_closed_forms():
    B, H, W, C, D = 2, 6, 8, 4, 12
    assert counted(nn.Dense(D), (B, C)) == (2 * B * C * D, C * D + D)
    assert counted(Conv(D), (B, H, W, C)) == (2 * B * H * W * 9 * C * D, 9 * C * D + D)
    assert counted(Conv(D, stride=2), (B, H, W, C))[0] == 2 * B * (H // 2) * (W // 2) * 9 * C * D
    assert counted(Conv(D, kernel=1), (B, H, W, C))[0] == 2 * B * H * W * C * D
    assert counted(nn.Conv(D, (3, 3), feature_group_count=4), (B, H, W, C))[0] == 2 * B * H * W * 9 * D
    doubled = 2 * B * (2 * H) * (2 * W) * 4 * C * D  # a kernel of 4x4, of which 2x2 meet values
    assert counted(nn.ConvTranspose(D, (4, 4), (2, 2)), (B, H, W, C))[0] == doubled
    N, flops = H * W, 2 * B * H * W * C * (3 * C + C)
    for heads in (1, 2):
        assert counted(SelfAttention(heads=heads), (B, H, W, C))[0] == flops + 2 * 2 * B * N * N * C


class Loop(nn.Module):
    """A dense layer in a scan of five steps, and one of two branches."""

    @nn.compact
    def __call__(self, x, label=None, cond=None):
        w = self.param("w", nn.initializers.ones_init(), (4, 4))
        x, _ = jax.lax.scan(lambda x, _: (x @ w, None), x, length=5)
        return jax.lax.cond(x.sum() > 0, lambda x: x @ w @ w, lambda x: x, x)


def test_loops_and_branches():
    """A scan counts as often as it runs, of branches the dearest."""
    assert summary(Loop(), (3, 4)).flops == 2 * 3 * 4 * 4 * (5 + 2)


@pytest.mark.parametrize("model,shape", [
    (UNet(channels=8, multipliers=(1, 2), blocks=1, num_classes=3), (2, 8, 4, 3)),
    (EDM2UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=8, remat=True), (2, 8, 4, 3)),
    (ResNet(depths=(1, 1), width=4, num_classes=3, stem="small"), (2, 9, 7, 1)),
], ids=lambda v: type(v).__name__)  # fmt: skip
def test_networks(model, shape):
    """The whole is the sum of its parts, the parameters are those that init makes; no layer is forgotten."""
    found = summary(model, shape)
    variables = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros(shape), jnp.zeros(shape[0]), None)
    assert found.parameters == sum(leaf.size for leaf in jax.tree.leaves(variables["params"]))
    assert found.flops == sum(layer.flops for layer in found.layers if len(layer.path) == 1) > 0
    for parent in found.layers:
        inside = [a for a in found.layers if len(a.path) == len(parent.path) + 1 and a.path[:-1] == parent.path]
        assert sum(a.flops for a in inside) <= parent.flops and sum(a.parameters for a in inside) <= parent.parameters
    assert {layer.path[0] for layer in found.layers[1:]} == set(variables["params"]) - {"gain"}
    assert summary(model, (2 * shape[0], *shape[1:])).flops == 2 * found.flops
    assert list(summary(model, shape, depth=1).layers) == [a for a in found.layers if len(a.path) <= 1]


def test_resnet_50_has_its_published_cost():
    """4.09 GMACs at 224x224, as torchvision states; at 23.5M parameters no memory is spent."""
    assert summary(create_model("resnet50"), (1, 224, 224, 3)).flops / 2e9 == pytest.approx(4.09, abs=0.005)


def test_cudnns_attention_counts_as_the_plain_one(monkeypatch):
    model, shape = create_model("dit_small", depth=1, dtype=jnp.bfloat16), (2, 32, 32, 3)
    plain = summary(model, shape).flops
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(transformer, "_has_kernel", lambda: True)
    for name, value in (("check_cudnn_version", lambda: 91000), ("check_compute_capability", lambda _: True)):
        monkeypatch.setattr(f"jax._src.cudnn.fused_attention_stablehlo.{name}", value)
    assert summary(model, shape).flops == plain


def test_the_table():
    text = str(summary(UNet(channels=8, multipliers=(1, 2), blocks=1), (2, 8, 4, 3), depth=1)).splitlines()
    assert text[0].split() == ["layer", "output", "parameters", "FLOPs"]
    assert text[2].split()[:2] == ["UNet", "2x8x4x3"] and text[-1].startswith("  out (Conv)")
    assert len({len(line) for line in text}) <= 2


# ---------------------------------------------------------------- receptive fields


class Stack(nn.Module):
    """Convolutions, a norm of each position and a nonlinearity after each."""

    kernels: tuple[int, ...]
    strides: tuple[int, ...]

    @nn.compact
    def __call__(self, x, label=None, cond=None):
        for k, s in zip(self.kernels, self.strides, strict=True):
            x = nn.silu(nn.LayerNorm()(Conv(4, kernel=k, stride=s)(x)))
        return x


@pytest.mark.parametrize("kernels,strides", [
    ((3,), (1,)), ((3, 3, 3), (1, 1, 1)), ((1, 5), (1, 1)), ((3, 3, 3), (2, 2, 1)), ((5, 1, 3, 3), (2, 1, 2, 1)),
])  # fmt: skip
def test_the_measured_field_is_that_of_the_formula(kernels, strides):
    expected = receptive_field_of(kernels, strides)
    stack, shape = Stack(kernels, strides), (1, 24, 20, 2)
    field = receptive_field(stack, shape, random_variables(stack, jnp.zeros(shape)))
    assert field.size == (expected, expected)
    assert (field.influence > 0).sum() == expected**2 and field.influence.max() == 1


class Logarithm(nn.Module):
    """Has no value at the label 0, which is taken where none is given."""

    @nn.compact
    def __call__(self, x, label=None, cond=None):
        return nn.Dense(1)(x) * jnp.log(label)[:, None, None, None]


def test_a_field_that_cannot_be_measured_is_an_error():
    with pytest.raises(ValueError, match="not finite; give noise labels"):
        receptive_field(Logarithm(), (1, 4, 4, 1), random_variables(Logarithm(), jnp.zeros((1, 4, 4, 1)), jnp.ones(1)))
    with pytest.raises(ValueError, match=r"a shape is \(B, \*sizes, C\), got \(3, 2\)"):
        receptive_field(create_model("mlp"), (3, 2))


def test_dilations():
    assert receptive_field_of([3, 3], dilations=[1, 4]) == 11  # 1 + 2 + 8
    field = receptive_field(Wrapped(nn.Conv(3, (3, 3), kernel_dilation=4)), (1, 20, 20, 2))  # of initial variables
    assert field.size == (receptive_field_of([3], dilations=[4]),) * 2 and (field.influence > 0).sum() == 9


@pytest.mark.slow
def test_attention_and_norms_over_positions_see_everything():
    assert receptive_field(Wrapped(SelfAttention()), (1, 12, 10, 8)).size == (12, 10)
    unet = UNet(channels=8, multipliers=(1,), blocks=1, attention=())
    assert receptive_field(unet, (1, 32, 20, 1)).size == (32, 20)  # by its group norms


@pytest.mark.slow
def test_a_network_without_norms_of_positions_sees_what_its_convolutions_do():
    """EDM2 at one level: in, an encoder block, the middle's second (the first attends), two decoder blocks, out."""
    model = EDM2UNet(channels=8, multipliers=(1,), blocks=1, attention=(), head_channels=8)
    assert receptive_field(model, (1, 30, 30, 1)).size == (30, 30)  # the middle always attends
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 30, 30, 1)), jnp.zeros(1))
    variables = jax.tree_util.tree_map_with_path(
        lambda p, a: 0 * a if "attend" in str(p) else jnp.ones(()) if p[-1].key == "gain" else a, variables
    )
    expected = receptive_field_of([3] * (1 + 2 * (1 + 2 + 2) + 1))
    assert receptive_field(model, (1, 30, 30, 1), variables).size == (expected, expected)


@pytest.mark.slow
def test_a_fresh_network_that_returns_zero_sees_nothing_yet():
    model = create_model("unet_digits")
    variables = jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), None)
    field = receptive_field(model, (1, 8, 8, 1), variables)
    assert field.size == (0, 0)
    np.testing.assert_array_equal(field.influence, 0)
