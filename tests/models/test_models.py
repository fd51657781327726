"""Models: convolutions against JAX's own rules, networks against what must hold of them, the registry."""

import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

import jdiff
from jdiff.models import SelfAttention, UNet, conv, create_model, list_models, register_model, registry

LAYOUT = ("NHWC", "HWIO", "NHWC")


def plain(x, k, stride):
    return lax.conv_general_dilated(x, k, (stride, stride), ((1, 1), (1, 1)), dimension_numbers=LAYOUT)


def ours(x, k, stride):
    return conv(x, k, (stride, stride), ((1, 1), (1, 1)))


def arrays(seed=0, wide=False):
    keys = jax.random.split(jax.random.key(seed), 4)
    image, kernel = ((2, 3, 17, 3), (3, 3, 3, 18)) if wide else ((2, 6, 4, 3), (3, 3, 3, 5))
    shapes = (image, kernel) * 2
    return [jax.random.normal(k, s) for k, s in zip(keys, shapes, strict=True)]


@pytest.mark.parametrize("stride, wide", [(1, False), (2, False), (1, True), (2, True)])
def test_conv_has_the_derivatives_of_the_plain_one(stride, wide):
    """grad, jvp, Hessian-vector product, gradient of a jvp, vmap over either argument, and all of it in a scan.

    Wide images and many channels go another way on the CPU: by a convolution with one column more than is kept.
    """
    x, k, dx, dk = arrays(wide=wide)
    out = str(jax.make_jaxpr(lambda x, k: ours(x, k, stride))(x, k))
    assert ("3,18,18] = conv_general_dilated" in out) == (wide and stride == 1 and jax.default_backend() == "cpu")

    def everything(f):
        def loss(x, k):
            return jnp.sum(jnp.sin(f(x, k, stride)))

        grads = jax.grad(loss, (0, 1))
        yield f(x, k, stride)
        yield grads(x, k)
        yield jax.jvp(lambda x, k: f(x, k, stride), (x, k), (dx, dk))
        yield jax.jvp(lambda x: f(x, k, stride), (x,), (dx,))
        yield jax.jvp(grads, (x, k), (dx, dk))
        yield jax.grad(lambda x, k: jnp.sum(jax.jvp(lambda x, k: f(x, k, stride), (x, k), (dx, dk))[1] ** 2), (0, 1))(
            x, k
        )
        yield jax.vmap(lambda x: grads(x, k))(jnp.stack([x, dx]))
        yield jax.vmap(lambda k: grads(x, k))(jnp.stack([k, dk]))
        yield lax.scan(lambda c, k: (c, grads(c, k)), x, jnp.stack([k, dk]))[1]

    for a, b in zip(everything(ours), everything(plain), strict=True):
        for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
            np.testing.assert_allclose(p, q, rtol=2e-4, atol=2e-4)


def randomized(model, x, label, cond=None, seed=0):
    """Parameters drawn so that everything matters, also what starts at zero. In NumPy: nothing to compile."""
    rng = np.random.default_rng(seed)

    def draw(path, leaf):
        z = rng.normal(size=leaf.shape)
        if leaf.ndim > 1:
            return jnp.asarray(z / np.sqrt(np.prod(leaf.shape[:-1])), leaf.dtype)
        return jnp.asarray((path[-1].key == "scale") + 0.1 * z, leaf.dtype)

    return jax.tree_util.tree_map_with_path(draw, jax.eval_shape(model.init, jax.random.key(0), x, label, cond))


SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), heads=2, num_classes=3)


@pytest.fixture(scope="module")
def small():
    model = UNet(**SMALL)
    x, label = jax.random.normal(jax.random.key(1), (3, 8, 4, 2)), jnp.array([-1.0, 0.0, 1.5])
    cond = jnp.array([0, 2, 3])
    return model, randomized(model, x, label, cond), x, label, cond, jax.jit(model.apply)


def test_a_fresh_unet_returns_zero_and_a_fresh_attention_its_input():
    """The last layers start at zero, so the network starts as 0 and its residual blocks as identities."""
    x = jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    model = create_model("unet_digits")
    params = jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(2), None)
    np.testing.assert_array_equal(model.apply(params, x, jnp.ones(2), jnp.array([1, 2])), 0)
    attention = SelfAttention(heads=2)
    h = jax.random.normal(jax.random.key(1), (2, 4, 4, 8))
    np.testing.assert_array_equal(attention.apply(attention.init(jax.random.key(0), h), h), h)


def test_rows_are_independent(small):
    model, params, x, label, cond, apply = small
    whole = apply(params, x, label, cond)
    for i in range(3):
        row = slice(i, i + 1)
        np.testing.assert_allclose(apply(params, x[row], label[row], cond[row]), whole[row], rtol=1e-4, atol=1e-5)


def test_label_and_class_matter_and_no_class_is_the_null_class(small):
    _, params, x, label, cond, apply = small
    out = apply(params, x, label, cond)
    assert np.abs(apply(params, x, label + 0.5, cond) - out).max() > 1e-3
    other = apply(params, x, label, jnp.array([1, 2, 3]))
    assert np.abs(other - out)[0].max() > 1e-3
    np.testing.assert_allclose(other[1:], out[1:], atol=1e-5)
    null = apply(params, x, label, jnp.full(3, 3))
    np.testing.assert_allclose(apply(params, x, label, None), null, atol=1e-6)


@pytest.mark.slow
def test_attention_is_equivariant_to_the_order_of_pixels():
    attention = SelfAttention(heads=2)
    x = jax.random.normal(jax.random.key(0), (2, 4, 4, 8))
    params = attention.init(jax.random.key(0), x)
    params = jax.tree.map(lambda a: a + 0.3 * jax.random.normal(jax.random.key(a.size), a.shape), params)
    order = np.random.default_rng(0).permutation(16)
    shuffle = lambda a: a.reshape(2, 16, 8)[:, order].reshape(2, 4, 4, 8)  # noqa: E731
    np.testing.assert_allclose(attention.apply(params, shuffle(x)), shuffle(attention.apply(params, x)), atol=1e-4)


@pytest.mark.slow
def test_bf16_computes_in_bf16_and_keeps_float32_parameters(small):
    _, params, x, label, cond, apply = small
    model = UNet(**SMALL, dtype=jnp.bfloat16)
    out = model.apply(params, x, label, cond)
    exact = apply(params, x, label, cond)
    assert out.dtype == jnp.float32
    relative = np.abs(out - exact).max() / np.abs(exact).max()
    assert 1e-6 < relative < 0.1  # rounded, but the same network
    fresh = jax.eval_shape(model.init, jax.random.key(0), x, label, cond)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_dropout_needs_training(small):
    _, params, x, label, cond, apply = small
    model = UNet(**SMALL, dropout=0.5)
    np.testing.assert_allclose(model.apply(params, x, label, cond), apply(params, x, label, cond), atol=1e-5)
    one, two = (model.apply(params, x, label, cond, train=True, rngs={"dropout": jax.random.key(i)}) for i in (0, 1))
    assert np.abs(one - two).max() > 1e-3


@pytest.mark.parametrize("name", ["mlp", "mlp_step"])
def test_mlps(name):
    """Integer and float labels agree; rows are independent; the label matters."""
    model = create_model(name)
    x, k = jax.random.normal(jax.random.key(0), (4, 2)), jnp.array([0, 3, 50, 99])
    params = randomized(model, x, k.astype(jnp.float32))
    out = model.apply(params, x, k)
    np.testing.assert_allclose(model.apply(params, x, k.astype(jnp.float32)), out, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(model.apply(params, x[2:3], k[2:3]), out[2:3], rtol=1e-4, atol=1e-4)
    assert np.abs(model.apply(params, x, k[::-1]) - out).max() > 1e-3
    with pytest.raises(ValueError, match="points"):
        model.apply(params, x[..., None, None], k)
    with pytest.raises(ValueError, match="no classes"):
        model.apply(params, x, k, jnp.zeros(4, int))


def test_errors(small):
    model, params, x, label, cond, _ = small
    with pytest.raises(ValueError, match="multiples of 2, got 7x4"):
        model.apply(params, x[:, :7], label, cond)
    with pytest.raises(ValueError, match="takes signals"):
        model.apply(params, x[:, 0, 0], label, cond)
    with pytest.raises(ValueError, match="resample is one of 'mean', 'conv', 'block', got 'avg'"):
        model.copy(resample="avg").apply(params, x, label, cond)
    with pytest.raises(ValueError, match="class labels"):
        model.apply(params, x, label, jnp.ones(3))
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
    monkeypatch.setattr(registry, "_MODELS", dict(registry._MODELS))
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


def test_no_recompilation(small):
    model, params, x, label, cond, _ = small
    apply = jax.jit(lambda *a: model.apply(*a))
    for i in range(3):
        apply(jax.tree.map(lambda a, i=i: a + i, params), x + i, label + i, cond * 0 + i)
    assert apply._cache_size() == 1
