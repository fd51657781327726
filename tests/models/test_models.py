"""What must hold of every network, of the UNet above all, and the registry."""

import types
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import compiled, random_variables

import jdiff
from jdiff.models import SelfAttention, UNet, create_model, list_models, register_model, registry
from jdiff.models.embed import ClassEmbedding, class_labels
from jdiff.models.unet import ResBlock

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, num_classes=3)
ONE_LEVEL = SMALL | dict(multipliers=(1,), attention=(), middle_attention=True)


@pytest.fixture(scope="module")
def small():
    """(model, variables, x, label, cond, the compiled network)."""
    model, draw = UNet(**SMALL), np.random.default_rng(1)
    x, label = jnp.asarray(draw.normal(size=(3, 8, 4, 2)), jnp.float32), jnp.array([-1.0, 0.0, 1.5])
    cond = jnp.array([0, 2, 3])
    return model, random_variables(model, x, label, cond), x, label, cond, jax.jit(model.apply)


def test_a_fresh_unet_returns_zero_and_a_fresh_attention_its_input(small):
    """The last layers start at zero, so the network starts as 0 and its residual blocks as identities."""
    model, params, x, label, cond, apply = small

    @jax.jit
    def last_layers(key):  # the others are not computed, and not compiled
        fresh = model.init(key, x, label, cond)["params"]
        return fresh["out"], [fresh[block]["conv_1"]["kernel"] for block in ("down_0_0", "middle_1", "up_0_1")]

    out, kernels = last_layers(jax.random.key(0))
    assert not any(np.any(kernel) for kernel in kernels)
    np.testing.assert_array_equal(apply({"params": params["params"] | {"out": out}}, x, label, cond), 0)
    attention, h = SelfAttention(heads=2), jnp.asarray(np.random.default_rng(1).normal(size=(2, 4, 4, 8)), jnp.float32)
    out, _ = jax.jit(attention.init_with_output)(jax.random.key(0), h)
    np.testing.assert_array_equal(out, h)


def test_rows_are_independent(small):
    _, params, x, label, cond, apply = small
    whole = apply(params, x, label, cond)
    others = apply(params, x.at[1:].add(1.0), label.at[1:].add(0.7), cond.at[1:].set(1))
    np.testing.assert_allclose(others[0], whole[0], rtol=1e-4, atol=1e-5)
    assert np.abs(others - whole)[1:].max() > 1e-2


def test_label_and_class_matter(small):
    _, params, x, label, cond, apply = small
    out = apply(params, x, label, cond)
    assert np.abs(apply(params, x, label + 0.5, cond) - out).max() > 1e-3
    other = apply(params, x, label, jnp.array([1, 2, 3]))
    assert np.abs(other - out)[0].max() > 1e-3
    np.testing.assert_allclose(other[1:], out[1:], atol=1e-5)


def test_no_class_is_the_null_class(small):
    """In the embedding that all networks with classes share; each takes None."""
    model, params, x, label, *_ = small
    classes = ClassEmbedding(3, 4)
    variables = {"params": {"table": {"embedding": jnp.arange(16.0).reshape(4, 4)}}}
    run = jax.jit(lambda cond: (classes.apply(variables, None, 2), classes.apply(variables, cond, 2)))
    none, null = run(jnp.full(2, 3))
    np.testing.assert_array_equal(none, null)
    assert np.abs(run(jnp.zeros(2, int))[1] - null).max() > 1e-3
    np.testing.assert_array_equal(class_labels(None, 3, 2), [3, 3])
    assert jax.eval_shape(model.apply, params, x, label, None).shape == x.shape


def test_attention_is_equivariant_to_the_order_of_pixels():
    attention, draw = SelfAttention(heads=2), np.random.default_rng(0)
    x = draw.normal(size=(2, 4, 4, 8)).astype("f")
    params, apply = random_variables(attention, x), jax.jit(attention.apply)
    order = draw.permutation(16)
    shuffle = lambda a: np.asarray(a).reshape(2, 16, 8)[:, order].reshape(2, 4, 4, 8)  # noqa: E731
    np.testing.assert_allclose(apply(params, shuffle(x)), shuffle(apply(params, x)), atol=1e-4)


@pytest.fixture(scope="module")
def one_level():
    """(variables, x, label, output) of a network whose blocks compile fast."""
    model, draw = UNet(**ONE_LEVEL), np.random.default_rng(1)
    x, label = draw.normal(size=(3, 4, 4, 2)).astype("f"), np.array([-1.0, 0.0, 1.5], "f")
    params = random_variables(model, x, label, None)
    return params, x, label, compiled(model)(params, x, label, None)


def test_bf16_computes_in_bf16_and_keeps_float32_parameters(one_level):
    params, x, label, exact = one_level
    model = UNet(**ONE_LEVEL, dtype=jnp.bfloat16)
    out = compiled(model)(params, x, label, None)
    assert out.dtype == jnp.float32
    relative = np.abs(out - exact).max() / np.abs(exact).max()
    assert 1e-6 < relative < 0.1  # rounded, but the same network
    fresh = jax.eval_shape(model.init, jax.random.key(0), x, label, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_dropout_needs_training(one_level):
    """In a block by its values, in the network by the random bits that its program asks for."""
    block, draw = ResBlock(8, dropout=0.5, out_scale=1.0), np.random.default_rng(0)
    h, embedding = draw.normal(size=(2, 4, 4, 8)).astype("f"), draw.normal(size=(2, 16)).astype("f")
    fresh = types.SimpleNamespace(init=lambda key, h, embedding: block.init(key, h, embedding, False))
    variables = random_variables(fresh, h, embedding)

    @jax.jit
    def run(key):
        trained = block.apply(variables, h, embedding, True, rngs={"dropout": key})
        plain = block.clone(dropout=0.0).apply(variables, h, embedding, False)
        return trained, block.apply(variables, h, embedding, False), plain

    (one, evaluated, plain), (two, *_) = run(jax.random.key(0)), run(jax.random.key(1))
    assert np.abs(one - two).max() > 1e-3
    np.testing.assert_allclose(evaluated, plain, atol=1e-5)

    params, x, label, _ = one_level
    network = lambda train: jax.make_jaxpr(  # noqa: E731
        lambda key: UNet(**ONE_LEVEL, dropout=0.5).apply(params, x, label, None, train=train, rngs={"dropout": key})
    )(jax.random.key(0))
    assert "random_bits" in str(network(True)) and "random_bits" not in str(network(False))


@pytest.mark.parametrize("name", ["mlp", "mlp_step"])
def test_mlps(name):
    """Integer and float labels agree; rows are independent; the label matters."""
    model = create_model(name)
    x = jnp.asarray(np.random.default_rng(0).normal(size=(4, 2)), jnp.float32)
    k = jnp.array([0, 3, 50, 99])
    params, apply = random_variables(model, x, k.astype(jnp.float32)), jax.jit(model.apply)
    out = apply(params, x, k.astype(jnp.float32))
    np.testing.assert_allclose(apply(params, x, k), out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(apply(params, x.at[:2].set(0), k)[2:], out[2:], rtol=1e-4, atol=1e-4)
    assert np.abs(apply(params, x, k[::-1]) - out).max() > 1e-3
    with pytest.raises(ValueError, match="points"):
        jax.eval_shape(model.apply, params, x[..., None, None], k)
    with pytest.raises(ValueError, match="no classes"):
        jax.eval_shape(model.apply, params, x, k, jnp.zeros(4, int))


def test_errors(small):
    model, params, x, label, cond, _ = small
    shapes = lambda model, *arguments: jax.eval_shape(model.apply, params, *arguments)  # noqa: E731
    with pytest.raises(ValueError, match="multiples of 2, got 7x4"):
        shapes(model, x[:, :7], label, cond)
    with pytest.raises(ValueError, match="takes signals"):
        shapes(model, x[:, 0, 0], label, cond)
    with pytest.raises(ValueError, match="resample is one of 'mean', 'conv', 'block', got 'avg'"):
        shapes(model.copy(resample="avg"), x, label, cond)
    with pytest.raises(ValueError, match="class labels"):
        shapes(model, x, label, jnp.ones(3))
    edm2 = jdiff.models.EDM2UNet(channels=8, multipliers=(1, 2), attention=(2,), head_channels=8)
    with pytest.raises(ValueError, match=r"to 1 for 2 multipliers, not resolutions; got \(2,\)"):
        jax.eval_shape(edm2.init, jax.random.key(0), x, label)


@pytest.mark.parametrize("name", ["mlp", "mlp_step", "unet_digits", "edm2_img64_s", "dit_small", "vit_small"])
@pytest.mark.parametrize("label", [None, 0.5, (2, 1), (1,)], ids=str)
def test_the_noise_label_is_one_number_a_sample(name, label):
    x = jnp.zeros((2, 2) if name.startswith("mlp") else (2, 32, 32, 3))
    label = jnp.zeros(label) if isinstance(label, tuple) else label
    with pytest.raises(ValueError, match=r"one number for each sample, \(2,\); got"):
        jax.eval_shape(create_model(name).init, jax.random.key(0), x, label, None)


def test_labels_may_be_numpys_integers():
    model, x = create_model("mlp"), jnp.zeros((2, 2))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, np.arange(2), None), x)


def test_registry(monkeypatch):
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    with pytest.raises(
        ValueError, match=r"unknown model 'unet_digit' \(did you mean 'unet_digits'\?\); one of .*mlp, "
    ):
        create_model("unet_digit")
    with pytest.raises(ValueError, match=r"no field 'chanels' \(did you mean 'channels'\?\)"):
        create_model("unet", chanels=3)
    assert create_model("unet_digits", channels=8).channels == 8
    assert create_model("unet_digits", channels=8).num_classes == 10

    @register_model
    def my_own(**overrides):
        return UNet(**dict(channels=4) | overrides)

    assert "my_own" in jdiff.list_models("my*") and create_model("my_own").channels == 4
    assert list_models("mlp*") == ["mlp", "mlp_step"]
