"""Norms: the moments they leave, one device against eight, and precision."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from jdiff import parallel
from jdiff.models.norms import AdaptiveLayerNorm, BatchNorm, InstanceNorm, LayerNorm, RMSNorm, modulate

X = 3 + 2 * jax.random.normal(jax.random.key(0), (16, 3, 4, 5)) * jnp.arange(1.0, 6.0)[None, None, None]
TARGET = jax.random.normal(jax.random.key(1), X.shape)
P = PartitionSpec


class Net(nn.Module):
    """Two batch norms with a nonlinearity between: the statistics of one feed those of the other."""

    axis_name: str | None = None

    @nn.compact
    def __call__(self, x, train):
        x = jnp.tanh(BatchNorm(axis_name=self.axis_name)(x, train))
        return BatchNorm(axis_name=self.axis_name)(nn.Dense(4)(x), train)


def variables():
    fresh = Net().init(jax.random.key(2), X, False)
    leaves, tree = jax.tree.flatten(fresh)
    keys = jax.random.split(jax.random.key(3), len(leaves))
    return jax.tree.unflatten(
        tree, [jnp.abs(a + 0.2 * jax.random.normal(k, a.shape)) for a, k in zip(leaves, keys, strict=True)]
    )


def everything(params, stats, x, target, axis_name=None):
    """Output, loss, running statistics, gradients with respect to parameters and input, of one device's part."""

    def loss(params, x):
        y, new = Net(axis_name).apply({"params": params, "batch_stats": stats}, x, True, mutable=["batch_stats"])
        return jnp.mean((y - target) ** 2 * (1 + y)), (y, new["batch_stats"])

    (value, (y, new)), grads = jax.value_and_grad(loss, (0, 1), has_aux=True)(params, x)
    return value, y, new, grads


def close(a, b, tolerance=1e-6):
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_allclose(p, q, rtol=tolerance, atol=tolerance)


@pytest.fixture(scope="module")
def one_device():
    v, target = variables(), TARGET[..., :4]
    return v, target, jax.jit(everything)(v["params"], v["batch_stats"], X, target)


def test_eight_devices_under_pmap_are_one(one_device):
    v, target, (value, y, new, (grads, dx)) = one_device

    def local(params, stats, x, target):
        value, y, new, (grads, dx) = everything(params, stats, x, target, "data")
        return jax.lax.pmean(value, "data"), y, new, (jax.lax.pmean(grads, "data"), dx / 8)

    split = lambda a: a.reshape(8, 2, *a.shape[1:])  # noqa: E731
    out = jax.pmap(local, axis_name="data", in_axes=(None, None, 0, 0))(
        v["params"], v["batch_stats"], split(X), split(target)
    )
    join = lambda a: a.reshape(16, *a.shape[2:])  # noqa: E731
    close(join(out[1]), y)
    close(join(out[3][1]), dx)
    for i in (0, 7):  # the same on every device
        close(jax.tree.map(lambda a, i=i: a[i], (out[0], out[2], out[3][0])), (value, new, grads))


@pytest.mark.parametrize("check", [True, False])
def test_eight_devices_under_shard_map_are_one(one_device, check):
    v, target, (value, y, new, (grads, dx)) = one_device
    mesh = parallel.mesh()

    def local(params, stats, x, target):
        params = jax.lax.pcast(params, "data", to="varying")  # else the gradients come back summed over devices
        value, y, new, (grads, dx) = everything(params, stats, x, target, "data")
        return jax.lax.pmean(value, "data"), y, new, (jax.lax.pmean(grads, "data"), dx / 8)

    specs = (P(), P("data"), P(), (P(), P("data")))
    run = jax.shard_map(
        local, mesh=mesh, in_specs=(P(), P(), P("data"), P("data")), out_specs=specs, check_vma=check
    )  # fmt: skip
    close(jax.jit(run)(v["params"], v["batch_stats"], X, target), (value, y, new, (grads, dx)))


def test_eight_devices_under_jit_are_one(one_device):
    """With shardings the batch is one array: no axis name, no change."""
    v, target, expected = one_device
    rows = NamedSharding(parallel.mesh(), P("data"))
    out = jax.jit(everything)(v["params"], v["batch_stats"], jax.device_put(X, rows), jax.device_put(target, rows))
    assert out[1].sharding.spec == P("data")
    close(out, expected)


def test_without_the_axis_each_device_has_statistics_of_its_own(one_device):
    """The tests above would not hold by themselves."""
    v, target, (_, y, *_) = one_device
    apart = jax.vmap(lambda x, t: everything(v["params"], v["batch_stats"], x, t)[1])
    assert np.abs(apart(X.reshape(8, 2, 3, 4, 5), target.reshape(8, 2, 3, 4, 4)).reshape(y.shape) - y).max() > 0.1


def test_batch_norm_leaves_mean_0_and_variance_1_and_its_averages_tend_to_the_batch():
    norm = BatchNorm(epsilon=0.0)
    state = norm.init(jax.random.key(0), X)
    step = jax.jit(lambda s: norm.apply(s, X, True, mutable=["batch_stats"]))
    y, _ = step(state)
    np.testing.assert_allclose(y.mean((0, 1, 2)), 0, atol=1e-6)
    np.testing.assert_allclose(y.var((0, 1, 2)), 1, rtol=1e-5)
    for _ in range(200):
        state = state | step(state)[1]
    np.testing.assert_allclose(state["batch_stats"]["mean"], X.mean((0, 1, 2)), rtol=1e-5)
    np.testing.assert_allclose(state["batch_stats"]["var"], X.var((0, 1, 2), ddof=1), rtol=1e-5)
    unbiased = np.sqrt(1 - 1 / (16 * 12))  # running variance is the unbiased one
    np.testing.assert_allclose(norm.apply(state, X), y * unbiased, atol=1e-5)


def test_batch_norm_does_not_cancel_far_from_zero():
    """Mean 1000, deviation 0.1: E[x²] - E[x]² in float32 is noise."""
    noise = np.asarray(jax.random.normal(jax.random.key(0), (64, 8)))
    x = jnp.asarray((1000 + 0.1 * noise).astype(np.float32))
    norm = BatchNorm(axis_name="data")
    state = BatchNorm().init(jax.random.key(0), x)
    y, _ = jax.pmap(lambda x: norm.apply(state, x, True, mutable=["batch_stats"]), axis_name="data")(x.reshape(8, 8, 8))
    exact = np.asarray(x, np.float64)
    exact = (exact - exact.mean(0)) / np.sqrt(exact.var(0) + 1e-5)
    np.testing.assert_allclose(y.reshape(64, 8), exact, atol=2e-3)  # the rounding of the mean itself


def test_batch_norm_errors():
    norm, x = BatchNorm(), jnp.ones((1, 4))
    with pytest.raises(ValueError, match="one value per channel"):
        norm.apply(norm.init(jax.random.key(0), x), x, True, mutable=["batch_stats"])
    with pytest.raises(ValueError, match="more than one position"):
        InstanceNorm().init(jax.random.key(0), x)


# axes of one population, and whether the mean is taken out
POPULATIONS = {LayerNorm: (-1,), InstanceNorm: (1, 2), RMSNorm: (-1,)}


@pytest.mark.parametrize("kind", list(POPULATIONS))
def test_moments(kind):
    axes = POPULATIONS[kind]
    norm = kind(epsilon=0.0)
    y, state = norm.init_with_output(jax.random.key(0), X)
    np.testing.assert_allclose(jnp.square(y).mean(axes), 1, rtol=1e-4)
    if kind is not RMSNorm:
        np.testing.assert_allclose(y.mean(axes), 0, atol=1e-6)
        np.testing.assert_allclose(norm.apply(state, X + 7), y, atol=2e-5)  # blind to a shift
    np.testing.assert_allclose(norm.apply(state, 7 * X), y, atol=1e-5)  # blind to a scale
    assert "params" not in kind(affine=False).init(jax.random.key(0), X)


@pytest.mark.parametrize("shape", [(3, 5), (3, 7, 5), (3, 2, 2, 2, 5)])
def test_any_number_of_dimensions(shape):
    x = jax.random.normal(jax.random.key(0), shape)
    for norm in (BatchNorm(), LayerNorm(), RMSNorm()) + ((InstanceNorm(),) if len(shape) > 2 else ()):
        flat = x.reshape(3, -1, 5)
        if len(shape) == 2:
            flat = x
        state = norm.init(jax.random.key(1), x)
        np.testing.assert_allclose(norm.apply(state, x).reshape(flat.shape), norm.apply(state, flat), atol=1e-6)


def test_adaptive_layer_norm_starts_as_layer_norm_and_listens():
    norm, e = AdaptiveLayerNorm(), jax.random.normal(jax.random.key(1), (16, 6))
    state = norm.init(jax.random.key(0), X, e)
    plain = LayerNorm(epsilon=1e-6, affine=False).apply({}, X)
    np.testing.assert_allclose(norm.apply(state, X, e), plain, atol=1e-6)
    state["params"]["modulation"]["kernel"] = jax.random.normal(jax.random.key(2), (6, 10))
    scale, shift = jnp.split(nn.silu(e) @ state["params"]["modulation"]["kernel"], 2, axis=1)
    np.testing.assert_allclose(norm.apply(state, X, e), modulate(plain, scale, shift), rtol=1e-5, atol=1e-5)
    row = np.asarray(plain[3]) * (1 + np.asarray(scale[3])) + np.asarray(shift[3])
    np.testing.assert_allclose(norm.apply(state, X, e)[3], row, rtol=1e-5, atol=1e-4)


@pytest.mark.parametrize("norm", [BatchNorm(), LayerNorm(), InstanceNorm(), RMSNorm()], ids=lambda n: type(n).__name__)
def test_precision(norm):
    """bf16 is computed in float32 and returned so unless asked otherwise; float64 stays float64."""
    train = (True,) if isinstance(norm, BatchNorm) else ()
    x = X.astype(jnp.bfloat16)
    state = norm.init(jax.random.key(0), x)
    assert {leaf.dtype for leaf in jax.tree.leaves(state)} == {jnp.dtype("float32")}
    run = lambda norm, x: norm.apply(state, x, *train, mutable=["batch_stats"])[0]  # noqa: E731
    np.testing.assert_array_equal(run(norm, x), run(norm, x.astype(jnp.float32)))
    assert run(norm, x).dtype == jnp.float32
    assert run(norm.clone(dtype=jnp.bfloat16), x).dtype == jnp.bfloat16
    with jax.enable_x64(True):
        wide = run(norm, np.asarray(X, np.float64))
        assert wide.dtype == jnp.float64
        np.testing.assert_allclose(wide, run(norm, X), atol=1e-5)
