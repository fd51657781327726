"""The UNets from one core: published sizes, resampling, norms, dimensions, and what their settings mean."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax
from networks import random_variables

import jdiff
from jdiff.models import UNet, resample
from jdiff.models.inits import scaled_init
from jdiff.models.unet import InSigma
from jdiff.models.unet_presets import ADM, DDPM, NCSNPP, SONG

TINY = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(1,))
KINDS = {
    "ddpm": DDPM | TINY,
    "ddpm++": SONG | TINY | dict(num_classes=3, augment_dim=2),
    "ncsn++": SONG | NCSNPP | TINY,
    "skips": SONG | NCSNPP | TINY | dict(pyramid_in="skip", pyramid_out="skip"),
    "adm": ADM | TINY | dict(head_channels=4, num_classes=3, null_class=False, out_multiplier=2),
}


def count(module, size, channels=3):
    x, label = jax.ShapeDtypeStruct((1, size, size, channels), jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)
    cond = jax.ShapeDtypeStruct((1,), jnp.int32) if module.num_classes else None
    shapes = jax.eval_shape(module.init, jax.random.key(0), x, label, cond)
    return sum(leaf.size for leaf in jax.tree.leaves(shapes))


@pytest.mark.parametrize(
    "name,size,overrides,parameters",
    [
        ("ddpmpp_cifar10", 32, {}, 55_732_739),  # EDM's SongUNet
        ("ncsnpp_cifar10", 32, {}, 56_395_523 + 128),  # EDM's, whose frequencies are a buffer
        pytest.param("adm_imagenet64", 64, dict(null_class=False), 295_899_267, marks=pytest.mark.slow),  # EDM's
    ],
)
def test_parameter_counts_are_the_published_ones(name, size, overrides, parameters):
    assert count(jdiff.create_model(name, **overrides), size) == parameters


# ---------------------------------------------------------------- resampling

FILTERS = ((1, 1), (1, 3, 3, 1), (1, 2, 3, 3, 2, 1))


@pytest.mark.parametrize("shape", [(2, 6, 3), (2, 4, 6, 3), (1, 4, 2, 6, 2)])
def test_up_is_the_transpose_of_down(shape):
    """<down(x), y> 2^d = <x, up(y)>, and constants stay in the middle; all filters in one program."""
    draw, dims = np.random.default_rng(0), len(shape) - 2
    x = draw.normal(size=shape).astype("f")
    y = draw.normal(size=(shape[0], *(n // 2 for n in shape[1:-1]), shape[-1])).astype("f")
    ones = np.ones((1, 16, 1), "f")

    @jax.jit
    def run(x, y, ones):
        down, up = resample.downsample, resample.upsample
        return [(down(x, f), up(y, f), down(ones, f), up(ones, f)) for f in FILTERS]

    for down, up, *constants in run(x, y, ones):
        np.testing.assert_allclose(np.vdot(down, y) * 2**dims, np.vdot(x, up), rtol=2e-4, atol=1e-4)
        for constant in constants:
            np.testing.assert_allclose(constant[0, 3:-3], 1, atol=1e-6)


def test_filters_are_convolutions_the_shortest_the_mean_and_the_nearest():
    """Against a depthwise convolution with the outer product of the filter; and against Flax's mean, and repetition."""
    f = np.array([1, 3, 3, 1]) / 8
    x = np.random.default_rng(0).normal(size=(2, 8, 6, 3)).astype("f")
    kernel = np.broadcast_to(np.outer(f, f)[:, :, None, None], (4, 4, 1, 3)).astype("f")
    numbers = ("NHWC", "HWIO", "NHWC")

    @jax.jit
    def run(x):
        down = lax.conv_general_dilated(x, kernel, (2, 2), ((1, 1), (1, 1)), None, None, numbers, 3)
        up = lax.conv_general_dilated(x, 4 * kernel, (1, 1), ((2, 2), (2, 2)), (2, 2), None, numbers, 3)
        theirs = down, up, nn.avg_pool(x, (2, 2), (2, 2)), jnp.repeat(jnp.repeat(x, 2, 1), 2, 2)
        filtered = resample.downsample(x, (1, 3, 3, 1)), resample.upsample(x, (1, 3, 3, 1))
        return (*filtered, resample.downsample(x), resample.upsample(x)), theirs

    chex.assert_trees_all_close(*run(x), atol=1e-6, rtol=0)


def test_pixels_are_shuffled_there_and_back():
    x = np.arange(2 * 4 * 6 * 3.0, dtype="f").reshape(2, 4, 6, 3)
    y, again = jax.jit(lambda x: ((y := resample.pixel_unshuffle(x)), resample.pixel_shuffle(y)))(x)
    assert y.shape == (2, 2, 3, 12)
    np.testing.assert_array_equal(again, x)
    np.testing.assert_array_equal(y[0, 0, 0, :4], [0, 3, 18, 21])  # the four neighbours of the first channel
    for bad, text in ((lambda: resample.pixel_shuffle(x), "3 channels"), (lambda: resample.resize(x, (2,)), "1 sizes")):
        with pytest.raises(ValueError, match=text):
            bad()
    with pytest.raises(ValueError, match=r"pixel_shuffle: x is an image \(B, H, W, C\), got \(2, 4, 6\)"):
        resample.pixel_shuffle(x[..., 0])
    for filter in ((1, 1), (1, 3, 3, 1)):
        with pytest.raises(ValueError, match="halves even sizes, got 3x6"):
            resample.downsample(x[:, :3], filter)
    with pytest.raises(ValueError, match="even number of taps"):
        resample.downsample(x, (1, 2, 1))


def test_resizing_keeps_constants_and_the_dtype():
    x, methods = jnp.full((1, 4, 4, 2), 0.5, jnp.bfloat16), ("nearest", "bilinear", "bicubic")
    for y in jax.jit(lambda x: [resample.resize(x, (8, 6), method) for method in methods])(x):
        assert y.shape == (1, 8, 6, 2) and y.dtype == jnp.bfloat16
        np.testing.assert_allclose(np.asarray(y, np.float32), 0.5)


def test_transposed_convolution_is_the_transpose():
    module, y = resample.ConvTranspose(3), np.random.default_rng(0).normal(size=(2, 3, 4, 5)).astype("f")
    x = np.random.default_rng(1).normal(size=(2, 6, 8, 3)).astype("f")
    params = random_variables(module, y)
    params["params"]["bias"] = jnp.zeros(3)

    @jax.jit
    def run(params, x, y):
        flipped = jnp.flip(params["params"]["kernel"], (0, 1)).transpose(0, 1, 3, 2)
        numbers = ("NHWC", "HWIO", "NHWC")
        down = lax.conv_general_dilated(x, flipped, (2, 2), ((1, 1), (1, 1)), dimension_numbers=numbers)
        return module.apply(params, y), down

    up, down = run(params, x, y)
    assert up.shape == x.shape
    np.testing.assert_allclose(np.vdot(up, x), np.vdot(y, down), rtol=1e-4)


# ---------------------------------------------------------------- the networks


def inputs(module, sizes=(4, 8), batch=2):
    draw = np.random.default_rng(0)
    cond = jnp.arange(batch) % module.num_classes if module.num_classes else None
    return draw.normal(size=(batch, *sizes, 3)).astype("f"), draw.uniform(size=batch).astype("f"), cond


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skips", "adm"])
def test_remat_changes_nothing_and_bf16_little(name):
    module = UNet(**KINDS[name])
    x, label, cond = inputs(module)
    variables = random_variables(module, x, label, cond)

    def f(module):
        def loss(v):
            y = module.apply(v, x, label, cond)
            return jnp.mean(y**2), y

        return jax.jit(jax.value_and_grad(loss, has_aux=True))(variables)

    ((_, plain), grads), ((_, again), grads_again) = f(module), f(module.copy(remat=True))
    np.testing.assert_allclose(plain, again, atol=1e-5)
    jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4), grads, grads_again)
    half = module.copy(dtype=jnp.bfloat16).apply(variables, x, label, cond)
    assert half.dtype == jnp.float32 and jnp.abs(half - plain).max() < 0.1 * jnp.abs(plain).max()
    assert plain.shape == (*x.shape[:-1], 3 * module.out_multiplier)
    frequencies = grads["params"]["noise"].get("fourier")
    assert frequencies is None or jnp.all(frequencies["frequencies"] == 0)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["ddpm++", "adm"])
def test_a_line_is_an_image_of_two_equal_rows(name):
    """A signal is an image of two equal rows, with kernels that look along the line only."""
    module = UNet(**KINDS[name] | dict(num_classes=0))
    x, label, _ = inputs(module, (6,))
    variables = random_variables(module, x, label, None)

    def thicken(path, p):  # a kernel in the plane that only looks along the line
        if path[-1].key != "kernel" or p.ndim != 3:
            return p
        width = p.shape[0]
        return jnp.zeros((width, *p.shape)).at[width // 2].set(p)

    flat = module.apply(variables, x, label)
    rows = jnp.stack([x, x], axis=1)
    image = module.apply(jax.tree_util.tree_map_with_path(thicken, variables), rows, label)
    np.testing.assert_allclose(image, jnp.stack([flat, flat], axis=1), atol=2e-5)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["skips"])
def test_a_volume_turned_with_its_kernels_is_the_output_turned(name):
    module = UNet(**KINDS[name] | dict(num_classes=0))
    x, label, _ = inputs(module, (2, 4, 6))
    variables = random_variables(module, x, label, None)
    run = jax.jit(module.apply)

    def turn(p):
        return p.transpose(1, 2, 0, 3, 4) if p.ndim == 5 else p

    out = run(variables, x, label)
    turned = run(jax.tree.map(turn, variables), x.transpose(0, 2, 3, 1, 4), label)
    assert out.shape == (*x.shape[:-1], 3 * module.out_multiplier) and jnp.abs(out).max() > 0.1
    np.testing.assert_allclose(turned, out.transpose(0, 2, 3, 1, 4), atol=3e-5)


def test_augmentation_labels_matter_and_none_is_zero():
    module = UNet(**KINDS["ddpm++"] | dict(multipliers=(1,), attention=()))
    x, label, cond = inputs(module)
    variables = random_variables(module, x, label, cond)
    apply = lambda augment: module.apply(variables, x, label, cond, augment=augment)  # noqa: E731
    run = jax.jit(apply)
    zeros = run(jnp.zeros((2, 2)))
    assert jnp.abs(zeros - run(jnp.ones((2, 2)))).max() > 1e-3
    np.testing.assert_allclose(run(None), zeros, atol=1e-6)
    with pytest.raises(ValueError, match=r"labels are \(2, augment_dim=2\), got \(2, 9\)"):
        jax.eval_shape(apply, jnp.ones((2, 9)))
    with pytest.raises(ValueError, match="needs the augment_dim of its labels"):
        plain = UNet(**TINY)
        jax.eval_shape(lambda key: plain.init(key, x, label, None, augment=jnp.ones((2, 2))), jax.random.key(0))


@pytest.mark.parametrize(
    "name,law",
    [("xavier", 1 / 60), ("kaiming", 2 / 40), ("kaiming_out", 2 / 80), ("lecun", 1 / 40), ("torch", 1 / 120)],
)
def test_initial_values_have_the_variance_of_the_papers(name, law):
    """From 40 to 80 channels: 2 / (40 + 80), 2 / 40, 2 / 80, 1 / 40, 1 / (3 40); a layer of 0 starts at zero."""
    draw = np.asarray(scaled_init(0.5, name)(jax.random.key(0), (40, 80), jnp.float32))
    assert np.abs(draw.mean()) < 0.01 and draw.var() == pytest.approx(0.5 * law, rel=0.05)
    assert not scaled_init(0, name)(jax.random.key(0), (40, 80), jnp.float32).any()


@pytest.mark.slow
def test_initial_values_of_attention_and_classes_are_those_of_the_published_code():
    """DDPM: queries, keys and values xavier each; DDPM++: 0.2 of xavier's together, classes sqrt(2 n / (n + waves))."""
    x, label, cond = jnp.zeros((1, 4, 4, 3)), jnp.zeros(1), jnp.zeros(1, int)

    def start(**settings):
        return UNet(**settings | dict(channels=64)).init(jax.random.key(0), x, label, cond)["params"]

    one = dict(multipliers=(1,), blocks=1, attention=(0,), num_classes=40)
    ddpm, song = start(**DDPM | one), start(**SONG | one)
    assert ddpm["down_0_0_attention"]["qkv"]["kernel"].var() == pytest.approx(1 / 64, rel=0.05)
    assert song["down_0_0_attention"]["qkv"]["kernel"].var() == pytest.approx(0.2 / 128, rel=0.05)
    assert song["class"]["table"]["embedding"].var() == pytest.approx(2 * 40 / (40 + 64), rel=0.1)
    assert start(**ADM | one)["class"]["table"]["embedding"].var() == pytest.approx(1, rel=0.1)


def test_networks_without_a_null_class_need_labels():
    module = UNet(**KINDS["adm"])
    x, label, _ = inputs(module)
    with pytest.raises(ValueError, match="3 classes and none for no class"):
        jax.eval_shape(module.init, jax.random.key(0), x, label, None)


def test_in_sigma():
    """net(2x - 1, log sigma) / sigma, and the score it gives is that of the data."""

    class Probe(nn.Module):
        @nn.compact
        def __call__(self, x, label, cond, train, augment):
            return x * jnp.exp(label)[:, None, None, None] ** 2

    x, sigma = np.random.default_rng(0).normal(size=(2, 4, 4, 1)).astype("f"), np.array([0.5, 20.0], "f")
    got = jax.jit(InSigma(Probe(), centered=False).apply)({}, x, sigma)
    np.testing.assert_allclose(got, (2 * x - 1) * sigma[:, None, None, None], rtol=1e-5)


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(pyramid_in="sum"), "pyramid_in is one of '', 'skip', 'residual', got 'sum'"),
        (dict(class_at="here"), "class_at is one of"),
        (dict(kernel_init="orthogonal"), "unknown initialisation 'orthogonal'"),
        (dict(attention=(16,)), r"levels, 0 \(full resolution\) to 1 for 2 multipliers, not resolutions; got \(16,\)"),
        (dict(attention=(-1,)), "lists levels"),
        (dict(head_channels=64), "16 channels do not divide into heads of 64"),
    ],
)
def test_settings_are_checked(change, text):
    with pytest.raises(ValueError, match=text):
        jax.eval_shape(UNet(**TINY | change).init, jax.random.key(0), jnp.zeros((1, 4, 4, 3)), jnp.zeros(1))
