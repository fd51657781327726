"""Networks of other makers: adapted, each is what the same network is by hand, in training and in sampling."""

import chex
import flax.linen
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from flax import nnx

import jdiff
from jdiff import adapt, losses, solvers, targets, train

eqx = pytest.importorskip("equinox")
KEY, FLOW = jax.random.key(0), jdiff.Flow()
X, LABEL, CLASSES = np.linspace(-1, 1, 8, dtype=np.float32).reshape(4, 2), np.linspace(0, 1, 4), np.arange(4) % 2


def joined(x, t):
    return jnp.concatenate([x, t[..., None]], -1)


class Linen(flax.linen.Module):
    """Of two arguments."""

    @flax.linen.compact
    def __call__(self, x, t):
        return flax.linen.Dense(2)(jax.nn.silu(flax.linen.Dense(8)(joined(x, t))))


class NNX(nnx.Module):
    def __init__(self, rngs):
        self.layers = nnx.List([nnx.Linear(3, 8, rngs=rngs), nnx.Linear(8, 2, rngs=rngs)])

    def __call__(self, x, t):
        return self.layers[1](jax.nn.silu(self.layers[0](joined(x, t))))


class Equinox(eqx.Module):
    """Of one sample; its activation and its count are no parameters."""

    mlp: eqx.nn.MLP
    count: jax.Array

    def __call__(self, x, t):
        return self.mlp(joined(x, t)) * self.count


def linen():
    module = Linen()
    variables = jax.jit(module.init)(KEY, X, LABEL)
    return adapt.linen(module, variables), lambda params, x, t, cond: module.apply(params, x, t)


def of_nnx():
    model = nnx.jit(lambda: NNX(nnx.Rngs(0)))()

    def by_hand(params, x, t, cond):
        first, second = params["layers"]["0"], params["layers"]["1"]
        hidden = jax.nn.silu(joined(x, t) @ first["kernel"] + first["bias"][None])
        return hidden @ second["kernel"] + second["bias"][None]

    return adapt.nnx(model), by_hand


def equinox_model():
    mlp = eqx.filter_jit(lambda key: eqx.nn.MLP(3, 2, 8, 1, activation=jax.nn.silu, key=key))(KEY)
    return Equinox(mlp, jnp.int32(2))


def equinox():
    def by_hand(params, x, t, cond):
        first, second = params["mlp"]["layers"]["0"], params["mlp"]["layers"]["1"]
        hidden = jax.nn.silu(joined(x, t) @ first["weight"].T + first["bias"][None])
        return 2 * (hidden @ second["weight"].T + second["bias"][None])

    return adapt.equinox(equinox_model()), by_hand


def function():
    def f(params, x, t):
        return jnp.tanh(joined(x, t) @ params["w"] + params["b"][None])

    return adapt.function(f, {"w": np.ones((3, 2), np.float32), "b": np.zeros(2)}), lambda p, x, t, cond: f(p, x, t)


@pytest.mark.parametrize("make", [linen, of_nnx, equinox, function])
def test_it_trains_and_samples_as_by_hand(make, tmp_path):
    """Losses, gradients and samples; optax trains it; one program for all parameters; its parameters go to a file."""
    (apply, params), by_hand = make()

    def loss(apply):
        def of(params, key, data, cond):
            return losses.denoising(apply, params, key, data, cond, schedule=FLOW, target=targets.Velocity())

        return of

    def run(apply, params):
        denoise = jdiff.denoiser(apply, params, FLOW, targets.Velocity())
        value, slope = jax.value_and_grad(lambda p: loss(apply)(p, KEY, X, None)[0])(params)
        return value, slope, jdiff.sample(solvers.DDIM(), denoise, FLOW, X, jdiff.grid.uniform(3))

    program = jax.jit(chex.assert_max_traces(lambda params: run(apply, params), n=1))
    step = train.make_train_step(loss(apply), optax.adam(3e-2), 0.9)
    loop = jax.jit(lambda state: jax.lax.scan(lambda s, _: (step(s, KEY, X, None)[0], None), state, None, 60)[0])
    trained = loop(train.init_state(params, optax.adam(3e-2))).params
    for p in (params, trained):
        chex.assert_trees_all_close(program(p), jax.jit(lambda p: run(by_hand, p))(p), rtol=1e-5, atol=1e-6)
    assert program(trained)[0] < 0.8 * program(params)[0]
    assert all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(params))
    train.write_params(tmp_path / "params.npz", trained)
    chex.assert_trees_all_equal(train.load_params(tmp_path / "params.npz", params), trained)


def test_one_sample_at_a_time_is_a_batch():
    """Equinox's own layers under vmap, and a call written for batches; with rows of cond, a number, and none."""
    model = equinox_model()
    embed = jnp.array([[1.0, -1.0], [0.5, 0.0]])

    def call(net, x, t, cond):
        return net(x, t) + (0 if cond is None else embed[cond["class"]] * cond["scale"])

    def call_batch(net, x, t, cond):
        return jax.vmap(net)(x, t) + (0 if cond is None else embed[cond["class"]] * cond["scale"])

    one, params = adapt.equinox(model, call=call)
    batch, _ = adapt.equinox(model, call=call_batch, batched=True)
    for cond in (None, {"class": CLASSES, "scale": 2.0}):
        np.testing.assert_allclose(one(params, X, LABEL, cond), batch(params, X, LABEL, cond), rtol=1e-6)
    np.testing.assert_allclose(one(params, X, LABEL)[1], model(X[1], LABEL[1]), rtol=1e-6)


def test_a_cond_is_the_third_argument():
    apply, params = adapt.function(lambda p, x, t, cond: p["w"] * x + cond[:, None], {"w": 2.0})
    np.testing.assert_allclose(apply(params, X, LABEL, CLASSES), 2 * X + CLASSES[:, None])
    one, _ = adapt.function(lambda p, x, t, cond: p["w"] * x + cond, params, batched=False)
    np.testing.assert_allclose(one(params, X, LABEL, CLASSES), 2 * X + CLASSES[:, None])


def test_the_network_comes_back():
    """`apply.network(params)` is the model, in its own library, with those parameters; the given one is not changed."""
    model = equinox_model()
    apply, params = adapt.equinox(model)
    assert eqx.tree_equal(apply.network(params), model) and repr(apply) == "adapt.equinox(Equinox)"
    doubled = apply.network(jax.tree.map(lambda a: 2 * a, params))
    np.testing.assert_array_equal(doubled.mlp.layers[0].weight, 2 * model.mlp.layers[0].weight)
    model = nnx.jit(lambda: NNX(nnx.Rngs(0)))()
    apply, params = adapt.nnx(model)
    doubled = apply.network(jax.tree.map(lambda a: 2 * a, params))
    assert isinstance(doubled, NNX)
    np.testing.assert_array_equal(doubled.layers[0].kernel[...], 2 * params["layers"]["0"]["kernel"])
    np.testing.assert_array_equal(model.layers[0].kernel[...], params["layers"]["0"]["kernel"])


# ---------------------------------------------------------------- state


class Stateful(nnx.Module):
    def __init__(self, kind):
        rngs = nnx.Rngs(0)
        self.layer = nnx.BatchNorm(2, rngs=rngs) if kind == "norm" else nnx.Dropout(0.5, rngs=rngs)
        self.scale = nnx.Param(jnp.ones(2))

    def __call__(self, x, t):
        return self.layer(x) * self.scale[None]


class WithNorm(flax.linen.Module):
    @flax.linen.compact
    def __call__(self, x, t, train):
        return flax.linen.BatchNorm()(x, use_running_average=not train)


def test_state_that_stays_is_kept_and_state_that_changes_is_refused():
    for kind, changed in (("norm", "layer.mean"), ("dropout", "layer.rngs.count")):
        model = Stateful(kind)
        for transform in (lambda f: f, jax.jit):
            apply, params = adapt.nnx(model)
            with pytest.raises(ValueError, match=f"^Stateful changes {changed} when it is called; give model.eval()"):
                transform(apply)(params, X, LABEL)
        model.eval()
        apply, params = adapt.nnx(model)
        assert list(jax.tree.leaves(params)[-1]) == [1.0, 1.0]
        np.testing.assert_allclose(jax.jit(apply)(params, X, LABEL), X, rtol=1e-4)  # a mean of 0, a variance of 1
    module = WithNorm()
    variables = module.init(KEY, X, LABEL, train=False)
    apply, params = adapt.linen(module, variables, call=lambda net, x, t, cond: net(x, t, train=False))
    assert list(params) == ["params"]
    np.testing.assert_allclose(apply(params, X, LABEL), X, rtol=1e-4)


REFUSED = [
    (lambda: adapt.equinox(eqx.nn.BatchNorm(2, "batch", mode="ema")), "BatchNorm has state, as batch statistics; use"),
    (lambda: adapt.equinox(eqx.nn.Dropout(0.5)), "Dropout draws dropout; give equinox.nn.inference_mode(model)"),
    (lambda: adapt.equinox(Equinox), "the network is the class Equinox; expected an Equinox module"),
    (lambda: adapt.equinox(Linen()), "the network is a Linen; expected an Equinox module"),
    (lambda: adapt.nnx(NNX), "the network is the class NNX; expected an object of a Flax NNX module"),
    (lambda: adapt.linen(Linen().apply, {}), "the network is a method; expected a Linen module; a function goes to"),
    (
        lambda: adapt.linen(Linen(), {"w": X}),
        'variables have no "params"; expected what module.init(key, ...)',
    ),
    (lambda: adapt.function({}, lambda p, x, t: x), "the network is a dict; expected a function f(params, x, label)"),
    (lambda: adapt.function(abs, {"a": [jax.nn.silu]}), "a/0 is a PjitFunction; params are arrays: keep the rest in"),
    (lambda: adapt.function(abs, {"a": np.arange(3)}), "a is int32; params are floating arrays: keep the rest in the"),
    (
        lambda: jdiff.denoiser(equinox_model(), {}, FLOW, targets.Eps()),
        "the network is a Equinox, which holds its parameters; jdiff.adapt.equinox(model) and jdiff.adapt.nnx(model)",
    ),
    (lambda: jdiff.denoiser(NNX(nnx.Rngs(0)), {}, FLOW, targets.Eps()), "the network is a NNX, which holds its param"),
]


@pytest.mark.parametrize("call,words", REFUSED, ids=[words[:40] for _, words in REFUSED])
def test_one_line_says_why_not(call, words):
    with pytest.raises((TypeError, ValueError)) as caught:
        call()
    assert str(caught.value).startswith(words) and len(str(caught.value).splitlines()) == 1
