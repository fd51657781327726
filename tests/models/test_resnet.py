"""ResNets: published counts, what must hold of a classifier of noisy images, batch norm within a training step."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from networks import checkpoints, random_variables

from jdiff import parallel, train
from jdiff.models import ResNet, create_model

TINY = dict(depths=(1, 1), width=4, num_classes=3, stem="small", noise=True)
X = jax.random.normal(jax.random.key(0), (16, 9, 6, 2))
LABEL = jnp.linspace(-2.0, 2.0, 16)


@pytest.fixture(scope="module")
def tiny():
    """(model, variables, both of its outputs compiled: logits and features)."""
    model = ResNet(**TINY)

    @jax.jit
    def both(variables, x, label):
        features = model.apply(variables, x, label, method="features")
        return model.apply(variables, x, label), (features, model.apply(variables, x, label, return_features=True))

    return model, random_variables(model, X, LABEL, None), both


def test_features_are_what_the_last_layer_sees(tiny):
    model, variables, run = tiny
    logits, (features, again) = run(variables, X, LABEL)
    assert features.shape == (16, 8)
    np.testing.assert_array_equal(again, features)
    out = jax.tree.map(np.asarray, variables["params"]["out"])
    np.testing.assert_allclose(logits, features @ out["kernel"] + out["bias"][None], rtol=1e-5, atol=1e-5)


def test_rows_are_independent_in_evaluation_only_and_the_label_matters(tiny):
    model, variables, run = tiny
    whole, _ = run(variables, X, LABEL)
    other = X.at[3:].set(0.5)
    np.testing.assert_allclose(run(variables, other, LABEL)[0][:3], whole[:3], rtol=1e-4, atol=1e-5)
    assert np.abs(run(variables, X, LABEL + 1)[0] - whole).max() > 1e-3
    batch = jax.jit(lambda x: model.apply(variables, x, LABEL, train=True, mutable=["batch_stats"])[0][0])
    assert np.abs(batch(X) - batch(other)).max() > 1e-3


def test_stride_and_stem():
    """An image moved by the total stride moves the features of the last stage, seen by their mean, not at all."""
    model = ResNet(depths=(1, 1), width=4, num_classes=3)
    x = jnp.zeros((1, 96, 96, 1)).at[:, 40:48, 40:48].set(jax.random.normal(jax.random.key(1), (1, 8, 8, 1)))
    variables = random_variables(model, x)
    features = jax.jit(lambda x: model.apply(variables, x, method="features"))
    here, there = features(x), features(jnp.roll(x, (8, 8), (1, 2)))
    np.testing.assert_allclose(there, here, rtol=1e-5)  # 2 (stem) x 2 (maximum) x 2 (stage)
    assert np.abs(features(jnp.roll(x, (4, 4), (1, 2))) - here).max() > 1e-6


@pytest.mark.slow
def test_it_learns_a_class_and_trains_on_eight_devices_as_on_one(tiny):
    """With jdiff.train, the running statistics as `extra`; eight devices by shard_map over the axis of the norms."""
    _, variables, _ = tiny
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


def test_the_classifier_of_guidance_has_gradients_of_its_input_and_remat_changes_nothing(tiny):
    """The gradient of a log-probability, with and without `remat`, which puts a checkpoint into each block."""
    model, variables, _ = tiny
    grad = lambda model: jax.grad(  # noqa: E731
        lambda x: jax.nn.log_softmax(model.apply(variables, x, LABEL))[:, 1].sum()
    )
    again = model.copy(remat=True)
    assert checkpoints(model, variables, X, LABEL) < checkpoints(again, variables, X, LABEL)
    plain, remat = jax.jit(grad(model))(X), jax.jit(grad(again))(X)
    assert np.isfinite(plain).all() and np.abs(plain).max() > 0
    np.testing.assert_allclose(remat, plain, rtol=1e-3, atol=1e-4)
    train = lambda model: jax.eval_shape(  # noqa: E731
        lambda v: model.apply(v, X, LABEL, train=True, mutable=["batch_stats"]), variables
    )
    chex.assert_trees_all_equal_shapes_and_dtypes(train(model), train(again))


def test_bf16_keeps_float32_parameters(tiny):
    _, variables, run = tiny
    model = ResNet(**TINY, dtype=jnp.bfloat16)
    out, exact = jax.jit(model.apply)(variables, X, LABEL), run(variables, X, LABEL)[0]
    assert out.dtype == jnp.float32
    assert 1e-5 < np.abs(out - exact).max() / np.abs(exact).max() < 0.1
    fresh = jax.eval_shape(model.init, jax.random.key(0), X, LABEL, None)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}


def test_errors(tiny):
    model, variables, _ = tiny
    run = lambda model, *arguments: jax.eval_shape(model.apply, *arguments)  # noqa: E731
    with pytest.raises(ValueError, match="got None"):
        run(model, variables, X)
    with pytest.raises(ValueError, match="takes none"):
        run(model, variables, X, LABEL, jnp.zeros(16, int))
    with pytest.raises(ValueError, match="images"):
        run(model, variables, X[..., 0], LABEL)
    for fields, text in ((dict(stem="large"), "unknown stem 'large'"), (dict(in_channels=3), "of 3 channels")):
        with pytest.raises(ValueError, match=text):
            jax.eval_shape(create_model("resnet18", **fields).init, jax.random.key(0), X)
