"""ResNets: published counts, what must hold of a classifier of noisy images, batch norm within a training step."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import parallel, train
from jdiff.models import ResNet, create_model

TINY = dict(depths=(1, 1), width=4, num_classes=3, stem="small", noise=True)
X = jax.random.normal(jax.random.key(0), (16, 9, 6, 2))
LABEL = jnp.linspace(-2.0, 2.0, 16)


@pytest.mark.parametrize("name,count", [("resnet18", 11_689_512), ("resnet34", 21_797_672), ("resnet50", 25_557_032)])
def test_parameter_counts_are_the_published_ones(name, count):
    variables = jax.eval_shape(create_model(name).init, jax.random.key(0), jnp.zeros((1, 64, 64, 3)), None, None)
    assert sum(leaf.size for leaf in jax.tree.leaves(variables["params"])) == count


@pytest.fixture(scope="module")
def tiny():
    model = ResNet(**TINY)
    return model, jax.jit(model.init)(jax.random.key(1), X, LABEL, None)


def test_features_are_what_the_last_layer_sees(tiny):
    model, variables = tiny
    features = model.apply(variables, X, LABEL, method="features")
    assert features.shape == (16, 8)
    out = variables["params"]["out"]
    np.testing.assert_allclose(
        model.apply(variables, X, LABEL), features @ out["kernel"] + out["bias"][None], rtol=1e-5, atol=1e-5
    )
    np.testing.assert_array_equal(model.apply(variables, X, LABEL, return_features=True), features)


def test_rows_are_independent_in_evaluation_only_and_the_label_matters(tiny):
    model, variables = tiny
    whole = model.apply(variables, X, LABEL)
    np.testing.assert_allclose(model.apply(variables, X[:3], LABEL[:3]), whole[:3], rtol=1e-4, atol=1e-5)
    assert np.abs(model.apply(variables, X, LABEL + 1) - whole).max() > 1e-3
    batch = lambda n: model.apply(variables, X[:n], LABEL[:n], train=True, mutable=["batch_stats"])[0][0]  # noqa: E731
    assert np.abs(batch(16) - batch(3)).max() > 1e-3


def test_stride_and_stem():
    """An image moved by the total stride moves the features of the last stage, seen by their mean, not at all."""
    model = ResNet(depths=(1, 1), width=4, num_classes=3)
    x = jnp.zeros((1, 96, 96, 1)).at[:, 40:48, 40:48].set(jax.random.normal(jax.random.key(1), (1, 8, 8, 1)))
    variables = model.init(jax.random.key(0), x)
    features = lambda shift: model.apply(variables, jnp.roll(x, shift, (1, 2)), method="features")  # noqa: E731
    np.testing.assert_allclose(features((8, 8)), features((0, 0)), rtol=1e-5)  # 2 (stem) x 2 (maximum) x 2 (stage)
    assert np.abs(features((4, 4)) - features((0, 0))).max() > 1e-6


@pytest.mark.slow
def test_it_learns_a_class_and_trains_on_eight_devices_as_on_one(tiny):
    """With jdiff.train, the running statistics as `extra`; eight devices by shard_map over the axis of the norms."""
    _, variables = tiny
    classes = jnp.arange(16) % 3
    data = X * 0.3 + jax.nn.one_hot(classes, 3)[:, None, None, :2]
    tx = optax.adam(1e-2)

    def step_of(axis_name):
        model = ResNet(**TINY, axis_name=axis_name)

        def loss(params, key, data, cond, extra):
            x, classes, label = data
            y, new = model.apply(params | extra, x, label, train=True, mutable=["batch_stats"])
            return optax.softmax_cross_entropy_with_integer_labels(y, classes).mean(), {"extra": dict(new)}

        return train.make_train_step(loss, tx, 0.9, axis_name=axis_name)

    fresh = lambda: train.init_state(  # noqa: E731
        {"params": variables["params"]}, tx, {"batch_stats": variables["batch_stats"]}
    )
    batch = (data, classes, LABEL)
    one, single = fresh(), jax.jit(step_of(None))
    P = jax.sharding.PartitionSpec
    many, split = fresh(), jax.jit(jax.shard_map(
        lambda s, d: step_of("data")(s, jax.random.key(0), d), mesh=parallel.mesh(),
        in_specs=(P(), P("data")), out_specs=P(),
    ))  # fmt: skip
    for i in range(40):
        one, aux = single(one, jax.random.key(0), batch)
        if i < 2:
            many, aux_many = split(many, batch)
            np.testing.assert_allclose(aux_many["loss"], aux["loss"], rtol=1e-5)
    assert aux["loss"] < 0.1
    for a, b in zip(jax.tree.leaves(many.extra), jax.tree.leaves(twice(single, fresh(), batch).extra), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


def twice(step, state, batch):
    for _ in range(2):
        state, _ = step(state, jax.random.key(0), batch)
    return state


def test_the_classifier_of_guidance_has_gradients_of_its_input(tiny):
    model, variables = tiny
    grad = jax.grad(lambda x: jax.nn.log_softmax(model.apply(variables, x, LABEL))[:, 1].sum())(X)
    assert np.isfinite(grad).all() and np.abs(grad).max() > 0


def test_bf16_keeps_float32_parameters(tiny):
    _, variables = tiny
    model = ResNet(**TINY, dtype=jnp.bfloat16)
    out, exact = model.apply(variables, X, LABEL), ResNet(**TINY).apply(variables, X, LABEL)
    assert out.dtype == jnp.float32
    assert 1e-5 < np.abs(out - exact).max() / np.abs(exact).max() < 0.1
    fresh = jax.eval_shape(model.init, jax.random.key(0), X, LABEL, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_remat_changes_nothing(tiny):
    model, variables = tiny

    def run(model):
        def loss(params):
            out, new = model.apply(variables | params, X, LABEL, train=True, mutable=["batch_stats"])
            return jnp.sin(out).sum(), new

        return jax.jit(jax.value_and_grad(loss, has_aux=True))({"params": variables["params"]})

    for a, b in zip(*(jax.tree.leaves(run(m)) for m in (model, model.copy(remat=True))), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-4)


def test_errors(tiny):
    model, variables = tiny
    with pytest.raises(ValueError, match="got None"):
        model.apply(variables, X)
    with pytest.raises(ValueError, match="takes none"):
        model.apply(variables, X, LABEL, jnp.zeros(16, int))
    with pytest.raises(ValueError, match="images"):
        model.apply(variables, X[..., 0], LABEL)
    with pytest.raises(ValueError, match="unknown stem 'large'"):
        create_model("resnet18", stem="large").init(jax.random.key(0), X)
    with pytest.raises(ValueError, match="of 3 channels"):
        create_model("resnet18", in_channels=3).init(jax.random.key(0), X)
