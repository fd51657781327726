"""EDM2: sizes of activations and of weights are kept, by the layers and by the projection."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import random_variables

from jdiff import convert, train
from jdiff.convert import edm2, files
from jdiff.convert.table import to_tensors
from jdiff.models import EDM2UNet, normalize_weights
from jdiff.models.edm2 import MPConv, MPFourier, mp_cat, mp_silu, mp_sum, normalize

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=8, num_classes=3)
X = jax.random.normal(jax.random.key(0), (4, 8, 4, 2))
LABEL, COND = jnp.linspace(-1.5, 1.0, 4), jnp.array([0, 1, 2, 3])


def ones(params):
    """All gains at 1 instead of 0."""
    return jax.tree_util.tree_map_with_path(lambda p, a: jnp.ones(()) if p[-1].key == "gain" else a, params)


@pytest.fixture(scope="module")
def small():
    """(model, parameters of unit variance with gains of 1, the compiled network with its uncertainty)."""
    model = EDM2UNet(**SMALL)
    shapes, draw = jax.eval_shape(model.init, jax.random.key(1), X, LABEL, COND), np.random.default_rng(1)
    params = ones(jax.tree.map(lambda s: jnp.asarray(draw.normal(size=s.shape), s.dtype), shapes))
    return model, params, jax.jit(functools.partial(model.apply, return_logvar=True))


def normal(seed, *shape):
    return np.random.default_rng(seed).normal(size=shape).astype(np.float32)


# ---------------------------------------------------------------- parts


def moment(x):
    return float(np.mean(np.square(np.asarray(x, np.float64))))


def test_parts_keep_the_second_moment():
    """Of N(0, 1) and of independent summands; expectations by 1e5 draws, in one program."""
    a, b, shares = normal(0, 32, 40, 48), normal(1, 32, 40, 96), (0.0, 0.3, 0.5, 1.0)
    layers = ((1, normal(2, 512, 64)), (3, normal(3, 8, 24, 24, 32)), (3, normal(4, 16, 99, 32)))
    kernels = [normal(5, 64, 128), normal(6, 3, 3, 32, 128), normal(7, 3, 32, 128)]

    @jax.jit
    def run(a, b, kernels):
        sums = [(mp_sum(a, b[..., :48], t), mp_cat(a, b, t)) for t in shares]
        outs = [
            MPConv(128, kernel).apply({"params": {"kernel": k}}, x)
            for (kernel, x), k in zip(layers, kernels, strict=True)
        ]
        features, _ = MPFourier(4096).init_with_output(jax.random.key(0), jnp.linspace(-2, 2, 64))
        return mp_silu(a), sums, outs, jnp.square(features).mean(1)

    silu, sums, outs, squares = run(a, b, kernels)
    for x in (silu, *jax.tree.leaves(sums)):
        assert moment(x) == pytest.approx(1, rel=0.02)
    for y in outs:
        inside = y[(slice(None),) + (slice(1, -1),) * (y.ndim - 2)]  # zeros beyond the edges take from it
        assert moment(inside) == pytest.approx(1, rel=0.05)
    np.testing.assert_allclose(squares, 1, rtol=0.1)  # at every label


def test_the_share_of_a_concatenation_does_not_depend_on_the_widths():
    """As much of either by t = 1/2, where a plain concatenation follows the widths.  Section B.5."""
    y = np.asarray(jax.jit(mp_cat, static_argnums=2)(normal(0, 100, 16), normal(1, 100, 256), 0.5))
    assert float(np.sum(y[:, :16] ** 2) / np.sum(y[:, 16:] ** 2)) == pytest.approx(1, rel=0.1)


def test_normalize_has_unit_size_and_a_derivative_at_zero():
    size, slope = jax.jit(lambda x: (normalize(x, (1, 2)), jax.grad(lambda x: normalize(x, (0,)).sum())(0 * x[0, 0])))(
        30 * normal(0, 5, 7, 3)
    )
    np.testing.assert_allclose(np.square(size).mean((1, 2)), 1, rtol=1e-4)
    np.testing.assert_array_equal(slope, 1e4)


# ---------------------------------------------------------------- the network


def test_a_fresh_network_returns_zero(small):
    model, params, apply = small
    fresh = jax.eval_shape(model.init, jax.random.key(0), X, LABEL, COND)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    params = {"params": params["params"] | {"gain": jnp.zeros(())}}  # as it starts
    out, logvar = apply(params, X, LABEL, COND)
    np.testing.assert_array_equal(out, 0)
    assert logvar.shape == (4,) and np.abs(logvar).max() > 0


@pytest.mark.slow
def test_unit_variance_in_unit_variance_out():
    """With the last gain at 1, and the others 0 as at the start; and at every noise level alike."""
    model = EDM2UNet(channels=32, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=16)
    x, label = normal(0, 8, 16, 16, 3), jnp.linspace(-2.0, 1.0, 8)
    params = jax.jit(model.init)(jax.random.key(1), x, label)
    assert not any(leaf.any() for path, leaf in jax.tree_util.tree_leaves_with_path(params) if path[-1].key == "gain")
    params["params"]["gain"] = jnp.ones(())
    out, state = jax.jit(
        lambda x: model.apply(params, x, label, capture_intermediates=True, mutable=["intermediates"])
    )(x)
    sizes = {name: moment(value["__call__"][0]) for name, value in state["intermediates"].items() if name[0] in "deu"}
    assert len(sizes) == 8  # of two levels: a halving, a doubling, two and four blocks
    for name, size in sizes.items():
        assert 0.6 < size < 1.3, name  # the embedding of one label, and zeros at the edges
    assert 0.5 < moment(out) < 1.5


def test_the_function_does_not_see_the_size_of_its_weights(small):
    model, params, apply = small
    scaled = jax.tree_util.tree_map_with_path(
        lambda p, a: a * np.arange(5.0, 5 + a.shape[-1], dtype="f") if p[-1].key == "kernel" else a,
        jax.tree.map(np.asarray, params),
    )
    out, _ = apply(params, X, LABEL, COND)
    for same in (scaled, jax.jit(normalize_weights)(scaled)):
        np.testing.assert_allclose(apply(same, X, LABEL, COND)[0], out, atol=2e-3 * np.abs(out).max())


@pytest.mark.slow
def test_gradients_are_orthogonal_to_the_weights_of_each_output(small):
    """Section 2.3."""
    model, params, _ = small
    grads = jax.jit(jax.grad(lambda p: jnp.sum(jnp.sin(model.apply(p, X, LABEL, COND)))))(params)
    for (path, g), w in zip(jax.tree_util.tree_leaves_with_path(grads), jax.tree.leaves(params), strict=True):
        if path[-1].key == "kernel" and float(jnp.abs(g).max()) > 0:
            axes = tuple(range(w.ndim - 1))
            along = jnp.sum(g * w, axes) / jnp.sqrt(jnp.sum(g * g, axes) * jnp.sum(w * w, axes))
            np.testing.assert_allclose(along, 0, atol=2e-3, err_msg=str(path))
        if path[-1].key in ("frequencies", "phases"):
            np.testing.assert_array_equal(g, 0)


def test_the_projection_normalises_and_does_nothing_twice(small):
    _, params, _ = small
    twice = jax.jit(lambda p: ((once := normalize_weights(p)), normalize_weights(once)))
    once, again = jax.device_get(twice(jax.tree.map(lambda a: np.asarray(a) * 7, params)))
    chex.assert_trees_all_close(again, once, rtol=1e-6)
    for path, a in jax.tree_util.tree_leaves_with_path(once):
        if path[-1].key == "kernel":
            np.testing.assert_allclose(np.square(a).mean(tuple(range(a.ndim - 1))), 1, rtol=1e-5)
    np.testing.assert_array_equal(once["params"]["gain"], 7)  # gains are free


@pytest.mark.slow
def test_training_with_forced_normalisation_and_the_uncertainty_head(small):
    """The EDM2 loss falls, the stored weights stay of unit size, and u tends to the log of the error."""
    model, params, _ = small

    def loss(params, key, data, cond):
        out, logvar = model.apply(params, data, LABEL, COND, return_logvar=True)
        error = jnp.square(out - 0.3 * data).mean((1, 2, 3))
        return jnp.mean(error / jnp.exp(logvar) + logvar), {"error": error, "logvar": logvar}

    tx = optax.adam(3e-2)
    state = train.init_state(params, tx)
    step = jax.jit(train.make_train_step(loss, tx, 0.9, project=normalize_weights))
    errors = []
    for _ in range(60):
        state, aux = step(state, jax.random.key(0), X)
        errors.append(float(aux["error"].mean()))
    assert errors[-1] < 0.2 * errors[0]
    kernel = state.params["params"]["encoder_0_0"]["conv_0"]["kernel"]
    np.testing.assert_allclose(jnp.square(kernel).mean((0, 1, 2)), 1, rtol=1e-5)
    frequencies = state.params["params"]["fourier"]["frequencies"]
    np.testing.assert_array_equal(frequencies, params["params"]["fourier"]["frequencies"])


def test_rows_are_independent_and_label_and_class_matter(small):
    _, params, apply = small
    run = lambda *a: np.asarray(apply(params, *a)[0])  # noqa: E731
    whole = run(X, LABEL, COND)
    np.testing.assert_allclose(run(X.at[:2].add(1.0), LABEL, COND)[2:], whole[2:], rtol=1e-4, atol=1e-5)
    assert np.abs(run(X, LABEL + 0.5, COND) - whole).min(0).max() > 1e-3
    other = run(X, LABEL, jnp.array([1, 1, 2, 3]))
    assert np.abs(other - whole)[0].max() > 1e-3
    np.testing.assert_allclose(other[1:], whole[1:], atol=1e-5)


@pytest.mark.slow
def test_a_line_is_an_image_of_two_equal_rows():
    """One dimension and two agree where kernels of the image have the line's numbers in each row that it can see.

    At the finest level each of two rows sees rows 0 and 1, at the coarser one a row alone, between zeros.
    """
    line = EDM2UNet(channels=8, multipliers=(1,), blocks=1, attention=(0,), head_channels=8, logvar_channels=0)
    x, label = normal(0, 3, 12, 2), jnp.array([-1.0, 0.0, 1.0])
    params = ones(jax.jit(line.init)(jax.random.key(1), x, label))
    # only the middle row of the image's kernels is not 0, and the norm of a kernel, by its mean, is that of the line's
    wide = lambda a: jnp.stack([0 * a, a, 0 * a]) if a.ndim > 2 else a  # noqa: E731
    image = jnp.stack([x, x], axis=1)
    out = jax.jit(line.apply)(jax.tree.map(wide, params), image, label)
    expected = jax.jit(line.apply)(params, x, label)
    np.testing.assert_allclose(out[:, 0], expected, atol=1e-3 * np.abs(expected).max())  # epsilon beside the norms
    np.testing.assert_allclose(out[:, 1], out[:, 0], atol=1e-5)


@pytest.mark.slow
def test_a_volume():
    """Three dimensions: rows of the batch are independent, and axes are alike where kernels are symmetric."""
    model = EDM2UNet(channels=8, multipliers=(1, 1), blocks=1, attention=(), head_channels=8, logvar_channels=0)
    x, label = normal(0, 2, 4, 2, 2, 1), jnp.zeros(2)
    params, apply = ones(jax.jit(model.init)(jax.random.key(1), x, label)), jax.jit(model.apply)
    even = jax.tree.map(lambda a: a + a.swapaxes(0, 1) if a.ndim > 2 else a, params)
    out = apply(even, x, label)
    np.testing.assert_allclose(apply(even, x.swapaxes(1, 2), label), out.swapaxes(1, 2), atol=1e-5)
    np.testing.assert_allclose(apply(even, x[::-1], label), out[::-1], atol=1e-5)


@pytest.mark.slow
def test_remat_and_bf16_are_the_same_network(small):
    _, params, apply = small
    out, _ = apply(params, X, LABEL, COND)

    def both(**fields):
        model = EDM2UNet(**SMALL, **fields)
        loss = lambda x: (lambda y: (jnp.sum(y**2), y))(model.apply(params, x, LABEL, COND))  # noqa: E731
        return jax.jit(jax.grad(loss, has_aux=True))(X)

    (dx, plain), (dx_again, again), (_, half) = both(), both(remat=True), both(dtype=jnp.bfloat16)
    np.testing.assert_allclose(again, plain, atol=1e-5)
    np.testing.assert_allclose(dx_again, dx, atol=1e-4)
    assert half.dtype == jnp.float32
    assert 1e-5 < np.abs(half - out).max() / np.abs(out).max() < 0.1


@pytest.mark.slow
def test_dropout_needs_training(small):
    _, params, apply = small
    noisy = EDM2UNet(**SMALL, dropout=0.5)
    out, _ = apply(params, X, LABEL, COND)
    np.testing.assert_allclose(jax.jit(noisy.apply)(params, X, LABEL, COND), out, atol=1e-5)
    draw = jax.jit(lambda i: noisy.apply(params, X, LABEL, COND, train=True, rngs={"dropout": jax.random.key(i)}))
    assert np.abs(draw(0) - draw(1)).max() > 1e-3


def test_errors(small):
    model, params, _ = small
    with pytest.raises(ValueError, match=r"multiples of 2, got \(4, 7, 4, 2\)"):
        jax.eval_shape(model.apply, params, X[:, :7], LABEL, COND)
    with pytest.raises(ValueError, match="class labels are"):
        jax.eval_shape(model.apply, params, X, LABEL, LABEL)
    with pytest.raises(ValueError, match="no classes"):
        jax.eval_shape(EDM2UNet(**SMALL | dict(num_classes=0)).init, jax.random.key(0), X, LABEL, COND)
    with pytest.raises(ValueError, match="8 channels do not divide into heads of 64"):
        wide = EDM2UNet(**SMALL | dict(head_channels=64, attention=(0,)))
        jax.eval_shape(wide.init, jax.random.key(0), X, LABEL, COND)
    with pytest.raises(ValueError, match="no uncertainty head"):
        bare = EDM2UNet(**SMALL, logvar_channels=0)
        jax.eval_shape(lambda key: bare.init(key, X, LABEL, COND, return_logvar=True), jax.random.key(0))


# ---------------------------------------------------------------- published names


@pytest.mark.parametrize("bare", [False, True])
def test_names_there_and_back(bare, tmp_path):
    """To the published names and back: the same module, from names, shapes and the config, and the same numbers."""
    pytest.importorskip("safetensors")
    fields = dict(in_channels=2, resolution=32, noise_channels=24, logvar_channels=0 if bare else 16, dropout=0.2)
    fields |= dict(label_balance=0.2, concat_balance=0.6, residual_balance=0.5, attention_balance=0.7)
    model = EDM2UNet(**SMALL | dict(multipliers=(2, 3), channels=8, attention=(0, 1)), **fields)
    variables = random_variables(model, X, LABEL, COND)
    tensors = to_tensors(edm2.table(model), variables)
    assert tensors["unet.enc.32x32_block0.attn_qkv.weight"].shape == (48, 16, 1, 1)
    assert tensors["unet.dec.16x16_in0.emb_gain"].shape == ()
    convert.save(tmp_path / "out", "edm2", model, variables)
    if bare:
        tensors = {name.removeprefix("unet."): tensor for name, tensor in tensors.items()}
        files.write(tmp_path / "out/diffusion_pytorch_model.safetensors", tensors)
    module, loaded = convert.load(tmp_path / "out", "edm2")
    assert module == model
    assert convert.load(tmp_path / "out", "edm2", residual_balance=0.3)[0] == model.clone(residual_balance=0.3)
    chex.assert_trees_all_equal(loaded, jax.device_get(variables), strict=True)
