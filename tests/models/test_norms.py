"""Norms: the moments they leave, one device against eight, and precision."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import parallel
from jdiff.models.norms import AdaptiveGroupNorm, BatchNorm, GroupNorm, modulate, standardize

X = jnp.asarray(3 + 2 * np.random.default_rng(0).normal(size=(16, 3, 4, 5)) * np.arange(1.0, 6.0), jnp.float32)
TARGET = jnp.asarray(np.random.default_rng(1).normal(size=(16, 3, 4, 4)), jnp.float32)
P = PartitionSpec


class Net(nn.Module):
    """Two batch norms with a nonlinearity between: the statistics of one feed those of the other."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(BatchNorm(axis_name=self.axis_name)(x, train))
        return BatchNorm(axis_name=self.axis_name)(nn.Dense(4)(x), train)


def apply(norm, variables, x, *arguments):
    """The output and the new running statistics, in one compiled program."""
    return jax.jit(lambda v, x: norm.apply(v, x, *arguments, mutable=["batch_stats"]))(variables, x)


def everything(params, stats, x, target, axis_name=None):
    """Loss, output, running statistics, gradients with respect to parameters and input, for one device's samples."""

    def loss(params, x):
        y, new = Net(axis_name).apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return jnp.mean((y - target) ** 2 * (1 + y)), (y, new["batch_stats"])

    (value, (y, new)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return value, y, new, grads


def on_one_of_eight(params, stats, x, target):
    """`everything` of a whole batch of which this device has an eighth."""
    value, y, new, (grads, dx) = everything(params, stats, x, target, "data")
    return jax.lax.pmean(value, "data"), y, new, (jax.lax.pmean(grads, "data"), dx / 8)


@pytest.fixture(scope="module")
def one_device():
    shapes = jax.eval_shape(lambda key: Net().init(key, X, False), jax.random.key(2))
    draw = np.random.default_rng(3)
    v = jax.tree.map(lambda a: jnp.asarray(np.abs(1 + 0.2 * draw.normal(size=a.shape)), a.dtype), shapes)
    return v, jax.jit(everything)(v["params"], v["batch_stats"], X, TARGET)


def close(a, b):
    chex.assert_trees_all_close(a, b, rtol=1e-5, atol=1e-5)


def test_eight_devices_under_pmap_are_one(one_device):
    v, (value, y, new, (grads, dx)) = one_device
    split = lambda a: a.reshape(8, 2, *a.shape[1:])  # noqa: E731
    out = jax.pmap(on_one_of_eight, axis_name="data", in_axes=(None, None, 0, 0))(
        v["params"], v["batch_stats"], split(X), split(TARGET)
    )
    value_8, y_8, new_8, (grads_8, dx_8) = jax.tree.map(np.asarray, out)
    close((y_8.reshape(y.shape), dx_8.reshape(dx.shape)), (y, dx))
    for i in (0, 7):  # the same on every device
        close(jax.tree.map(lambda a, i=i: a[i], (value_8, new_8, grads_8)), (value, new, grads))


@pytest.mark.parametrize("check", [True, False])
def test_eight_devices_under_shard_map_are_one(one_device, check):
    v, expected = one_device

    def local(params, *rest):
        # else the gradients come back summed over devices
        return on_one_of_eight(jax.lax.pcast(params, "data", to="varying"), *rest)

    specs = (P(), P("data"), P(), (P(), P("data")))
    run = jax.shard_map(
        local, mesh=parallel.mesh(), in_specs=(P(), P(), P("data"), P("data")), out_specs=specs, check_vma=check
    )
    close(jax.jit(run)(v["params"], v["batch_stats"], X, TARGET), expected)


def test_eight_devices_under_jit_are_one(one_device):
    """With shardings the batch is one array: no axis name, no change."""
    v, expected = one_device
    rows = NamedSharding(parallel.mesh(), P("data"))
    out = jax.jit(everything)(v["params"], v["batch_stats"], jax.device_put(X, rows), jax.device_put(TARGET, rows))
    assert out[1].sharding.spec == P("data")
    close(out, expected)


def test_without_the_axis_each_device_has_statistics_of_its_own(one_device):
    """The tests above would not hold by themselves."""
    v, (_, y, *_) = one_device
    apart, _ = apply(Net(), v, X[:2], True)
    assert np.abs(apart - y[:2]).max() > 0.1


def test_batch_norm_leaves_mean_0_and_variance_1_and_its_averages_tend_to_the_batch():
    norm = BatchNorm(epsilon=0.0)
    fresh = {"params": {"scale": jnp.ones(5), "bias": jnp.zeros(5)}}
    fresh["batch_stats"] = {"mean": jnp.zeros(5), "var": jnp.ones(5)}
    step = jax.jit(lambda s: norm.apply(s, X, True, mutable=["batch_stats"]))
    state, (y, _) = fresh, step(fresh)
    y = np.asarray(y)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-5)
    for _ in range(200):
        state = state | step(state)[1]
    np.testing.assert_allclose(state["batch_stats"]["mean"], np.mean(X, (0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["var"], np.var(X, (0, 1, 2), ddof=1), rtol=1e-5)
    unbiased = np.sqrt(1 - 1 / (16 * 12))  # running variance is the unbiased one
    np.testing.assert_allclose(apply(norm, state, X)[0], y * unbiased, atol=1e-5)


def test_batch_norm_does_not_cancel_far_from_zero():
    """Mean 1000, deviation 0.1: E[x²] - E[x]² in float32 is noise."""
    x = (1000 + 0.1 * np.random.default_rng(0).normal(size=(64, 8))).astype(np.float32)
    norm = BatchNorm(axis_name="data")
    state = {"params": {"scale": jnp.ones(8), "bias": jnp.zeros(8)}}
    state["batch_stats"] = {"mean": jnp.zeros(8), "var": jnp.ones(8)}
    y, _ = jax.pmap(lambda x: norm.apply(state, x, True, mutable=["batch_stats"]), axis_name="data")(x.reshape(8, 8, 8))
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(64, 8), exact, atol=2e-3)  # the rounding of the mean itself


def test_batch_norm_needs_two_values_per_channel():
    x = jnp.ones((1, 4))
    state = jax.eval_shape(BatchNorm().init, jax.random.key(0), x)
    with pytest.raises(ValueError, match="one value per channel"):
        jax.eval_shape(lambda s: BatchNorm().apply(s, x, True, mutable=["batch_stats"]), state)


@pytest.mark.parametrize("norm", [BatchNorm(), GroupNorm(min_width=5)], ids=["batch", "group"])
def test_positions_may_lie_in_any_number_of_dimensions(norm):
    draw = np.random.default_rng(0)
    x = jnp.asarray(draw.normal(size=(3, 8, 5)), jnp.float32)
    shapes = jax.eval_shape(norm.init, jax.random.key(1), x)
    state = jax.tree.map(lambda a: jnp.asarray(1 + 0.1 * draw.normal(size=a.shape), a.dtype), shapes)
    expected, _ = apply(norm, state, x)
    for sizes in ((2, 4), (2, 2, 2)):
        np.testing.assert_allclose(apply(norm, state, x.reshape(3, *sizes, 5))[0].reshape(3, 8, 5), expected, atol=1e-6)


def test_group_norm_is_flaxs():
    """Also with a modulation after it, and far from zero, where nothing cancels."""
    draw = np.random.default_rng(0)
    x = jnp.asarray(3 + 2 * draw.normal(size=(3, 4, 5, 12)), jnp.float32)
    params = {"params": dict(scale=jnp.asarray(draw.normal(size=12), "f"), bias=jnp.asarray(draw.normal(size=12), "f"))}
    modulation = tuple(jnp.asarray(draw.normal(size=(2, 3, 12)), jnp.float32))

    @jax.jit
    def run(x, params, modulation):
        ours = GroupNorm(groups=32, min_width=4)  # 12 channels: three groups of four
        theirs = nn.GroupNorm(num_groups=3, epsilon=1e-5, use_fast_variance=False).apply(params, x)
        embedding = jnp.ones((3, 2))
        adaptive = {"norm": params["params"], "modulation": dict(kernel=jnp.zeros((2, 24)), bias=jnp.arange(24.0) / 24)}
        told = jnp.tile(jnp.arange(24.0)[None] / 24, (3, 1))
        pairs = {
            "plain": (ours.apply(params, x), theirs),
            "modulated": (ours.apply(params, x, modulation), modulate(theirs, *modulation)),
            "adaptive": (
                AdaptiveGroupNorm().apply({"params": adaptive}, x, embedding),
                modulate(theirs, *jnp.split(told, 2, -1)),
            ),
        }
        return pairs, ours.apply(params, x + 1e3)

    pairs, far = run(x, params, modulation)
    for ours, theirs in pairs.values():
        np.testing.assert_allclose(ours, theirs, atol=5e-5)
    scaled = (far - params["params"]["bias"][None, None, None]) / params["params"]["scale"][None, None, None]
    np.testing.assert_allclose(np.var(scaled.reshape(3, -1, 3, 4), (1, 3)), 1, atol=1e-2)


def test_standardize_and_modulate():
    """The moments of each position, then y (1 + scale) + shift of each sample and channel."""
    draw = np.random.default_rng(0)
    scale, shift = jnp.asarray(draw.normal(size=(2, 16, 5)), jnp.float32)
    y, out = jax.jit(lambda x: ((y := standardize(x, (-1,), 0.0)), modulate(y, scale, shift)))(X)
    np.testing.assert_allclose(np.mean(y, -1), 0, atol=1e-6)
    np.testing.assert_allclose(np.var(y, -1), 1, rtol=1e-4)
    row = np.asarray(y[3]) * (1 + np.asarray(scale[3])) + np.asarray(shift[3])
    np.testing.assert_allclose(out[3], row, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("norm", [BatchNorm(), GroupNorm()], ids=["batch", "group"])
def test_precision(norm):
    """bf16 is computed in float32 and returned so unless asked otherwise; float64 stays float64."""
    train = (True,) if isinstance(norm, BatchNorm) else ()
    x = X[:2].astype(jnp.bfloat16)
    state = jax.tree.map(lambda a: jnp.ones(a.shape, a.dtype), jax.eval_shape(norm.init, jax.random.key(0), x))
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    half, _ = apply(norm, state, x, *train)
    np.testing.assert_array_equal(half, apply(norm, state, x.astype(jnp.float32), *train)[0])
    assert half.dtype == jnp.float32
    narrow = norm.clone(dtype=jnp.bfloat16)
    assert jax.eval_shape(lambda x: narrow.apply(state, x, *train, mutable=["batch_stats"])[0], x).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide, _ = apply(norm, state, np.asarray(x, np.float64), *train)
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, half, atol=1e-5)
