"""The training state, the step and the loop; other people's networks train by them."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.sharding import PartitionSpec as P

import jdiff
from jdiff import ema, losses, parallel, train
from jdiff.core.keys import BatchKey, normal, positions

KEY = jax.random.key(1)
TX = optax.adam(1e-2)
PARAMS = {"w": np.float32([[0.5, -0.2], [0.1, 0.8]]), "b": np.float32([0.1, -0.1])}
RNG = np.random.default_rng(0)
BATCH = np.float32(RNG.normal(size=(16, 2)))


def apply(params, x, label, cond):
    return jnp.tanh(x @ params["w"] + params["b"][None] + label[:, None])


def noisy_loss(params, key, data, cond):
    """The real loss of the library, which draws t and noise by position."""
    return losses.denoising(apply, params, key, data, cond, schedule=jdiff.VP(), target=jdiff.targets.Eps())


def plain_loss(params, key, data, cond):
    """A loss without noise, which compiles in no time."""
    each = ((data - params["b"][None]) ** 2).sum(-1)
    return each.mean(), {"each": each}


def shifted_loss(params, key, data, cond):
    """`plain_loss` of data with noise by position."""
    return plain_loss(params, key, data + normal(key, data.shape), cond)


def waved_loss(params, key, data, cond):
    """`plain_loss` of data with a sine of the position in place of noise, which compiles faster."""
    return plain_loss(params, key, data + jnp.sin(7.0 * positions(key, len(data))[0])[:, None], cond)


def run(step, state, steps=3, data=BATCH):
    for _ in range(steps):
        state, aux = step(state, KEY, data)
    return state, aux


@functools.cache
def whole_batch(loss=noisy_loss):
    """(state, aux) after three steps on one device, the batch at once."""
    return run(jax.jit(train.make_train_step(loss, TX, 0.9)), train.init_state(PARAMS, TX))


# ---------------------------------------------------------------- the step


def test_step_is_the_plain_optax_loop():
    state, aux = whole_batch()

    @jax.jit
    def optax_step(params, average, opt_state, i):
        key = jax.random.fold_in(KEY, i)
        (loss, _), grads = jax.value_and_grad(noisy_loss, has_aux=True)(params, key, BATCH, None)
        updates, opt_state = TX.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
        return params, average, opt_state, {"loss": loss, "grad_norm": optax.tree.norm(grads)}

    params, average, opt_state = PARAMS, PARAMS, TX.init(PARAMS)
    for i in range(3):
        params, average, opt_state, numbers = optax_step(params, average, opt_state, i)
    want = train.TrainState(jnp.int32(3), params, None, average, opt_state)
    chex.assert_trees_all_close(state, want, rtol=1e-5, atol=1e-6, strict=True)
    chex.assert_trees_all_close({name: aux[name] for name in numbers}, numbers, rtol=1e-4)


def test_accumulation_is_one_big_batch():
    step = jax.jit(train.make_train_step(noisy_loss, TX, 0.9, accumulate=16))
    state, aux = run(step, train.init_state(PARAMS, TX))
    chex.assert_trees_all_close(state, whole_batch()[0], rtol=1e-5, atol=1e-6, strict=True)
    chex.assert_trees_all_close(aux, whole_batch()[1], rtol=1e-4, atol=1e-5, strict=True)


def test_eight_devices_equal_one():
    """jit with NamedSharding and pmap, both in slices, and chex's pmap by vmap take the steps of one device."""
    mesh = parallel.mesh()
    step = jax.jit(train.make_train_step(waved_loss, TX, 0.9, accumulate=2))
    state = parallel.replicate(mesh, train.init_state(PARAMS, TX))
    sharded, aux = run(step, state, data=parallel.shard_batch(mesh, BATCH))
    chex.assert_trees_all_close(sharded, whole_batch(waved_loss)[0], rtol=1e-5, atol=1e-5, strict=True)
    chex.assert_trees_all_close(aux["loss"], whole_batch(waved_loss)[1]["loss"], rtol=1e-5)

    local = train.make_train_step(waved_loss, TX, 0.9, axis_name="data", accumulate=2)
    stacked, parts = parallel.stack(train.init_state(PARAMS, TX)), BATCH.reshape(8, 2, 2)
    state, aux = run(jax.pmap(local, axis_name="data", in_axes=(0, None, 0)), stacked, data=parts)
    want, aux_want = parallel.stack(whole_batch(waved_loss))
    chex.assert_trees_all_close(state, want, rtol=1e-5, atol=1e-5, strict=True)
    chex.assert_trees_all_close(aux["loss"], aux_want["loss"], rtol=1e-5)
    with chex.fake_pmap():
        local = train.make_train_step(waved_loss, TX, 0.9, axis_name="data")
        fake, _ = run(jax.pmap(local, axis_name="data", in_axes=(0, None, 0)), stacked, data=parts)
    chex.assert_trees_all_close(fake, want, rtol=1e-5, atol=1e-5, strict=True)


def test_extra_collections_and_projection():
    """`extra` goes in, the new one comes out; `project` acts on the parameters, before the average."""

    def loss(params, key, data, cond, extra):
        return (params["w"] ** 2).sum(), dict(extra={"rows": extra["rows"] + len(data)})

    tx = optax.sgd(0.1)
    step = train.make_train_step(loss, tx, 0.0, project=lambda p: jax.tree.map(lambda a: a / jnp.linalg.norm(a), p))
    state, aux = run(jax.jit(step), train.init_state(PARAMS, tx, {"rows": jnp.zeros((), jnp.int32)}))
    assert state.extra["rows"] == 48 and "extra" not in aux
    chex.assert_trees_all_close(jax.tree.map(jnp.linalg.norm, state.params), {"w": 1.0, "b": 1.0}, rtol=1e-6)
    chex.assert_trees_all_equal(state.ema, state.params, strict=True)


def test_the_state_is_copied_and_donated():
    params = jax.tree.map(jnp.copy, PARAMS)
    state = train.init_state(params, TX)
    jax.jit(train.make_train_step(plain_loss, TX, 0.9), donate_argnums=0)(state, KEY, BATCH)
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))
    assert all(leaf.is_deleted() for leaf in jax.tree.leaves(state.params))


def test_no_recompilation_and_no_other_shapes():
    step = chex.assert_max_traces(train.make_train_step(plain_loss, TX, ema.half_life(1000, 16)), n=1)
    step, first = jax.jit(step), train.init_state(PARAMS, TX)
    state = first
    for i in range(3):
        state, _ = step(state, jax.random.key(i), BATCH + i)
    chex.assert_trees_all_equal_shapes_and_dtypes(state, first)
    assert state.step == 3


def probing(params, key, data, cond):
    """A loss that says what it was called with."""
    rows, size = positions(key, len(data))
    aux = {"rows": rows, "size": jnp.float32(size), "data": data, "label": cond["label"], "mean": data.mean()}
    return params["w"].sum() * data.mean(), aux


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_slices_are_the_rows_in_order(accumulate):
    """Each slice is told its rows of the whole; arrays come back in the order of the batch, numbers as means."""
    tx, cond = optax.sgd(0.1), {"label": np.arange(16)}
    step = train.make_train_step(probing, tx, 0.9, accumulate=accumulate)
    _, aux = jax.jit(step)(train.init_state(PARAMS, tx), KEY, BATCH, cond)
    rows = np.arange(16, dtype=np.int32)
    want = {"rows": rows, "label": rows, "data": BATCH, "size": np.float32(16)}
    chex.assert_trees_all_equal({name: aux[name] for name in want}, want, strict=True)
    chex.assert_trees_all_close(aux["mean"], BATCH.mean(), rtol=1e-5)


def test_key_of_a_step():
    """One device, one batch: the key folded with the step, nothing around it. Slices: a BatchKey around the same."""
    kinds = []

    def loss(params, key, data, cond):
        kinds.append(type(key))
        key = key.key if isinstance(key, BatchKey) else key
        return params["w"].sum(), {"bits": jnp.float32(jax.random.bits(key) >> 8)}

    tx = optax.sgd(0.1)
    for accumulate in (1, 2):
        state = train.init_state(PARAMS, tx).replace(step=jnp.int32(41))
        state, aux = jax.jit(train.make_train_step(loss, tx, 0.9, accumulate=accumulate))(state, KEY, BATCH)
        assert aux["bits"] == jnp.float32(jax.random.bits(jax.random.fold_in(KEY, 41)) >> 8)
        assert state.step == 42
    assert kinds[0] is not BatchKey and kinds[-1] is BatchKey


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_can_be_left_out(accumulate):
    """A batch with an infinity changes nothing but the step; the run is that of the other batches, bit for bit."""
    tx, params = optax.adam(0.1), {"w": jnp.ones((3, 2))}
    extra = {"sum": jnp.zeros(())}

    def loss(params, key, data, cond, extra):
        out = jnp.mean((data @ params["w"] - 1) ** 2)
        return out, {"each": data[:, 0], "extra": {"sum": extra["sum"] + data.sum()}}

    step = jax.jit(train.make_train_step(loss, tx, 0.5, accumulate=accumulate, skip_nonfinite=True))
    good = list(np.float32(RNG.normal(size=(3, 4, 3))))
    bad = good[0].copy()
    bad[1, 1] = np.inf
    state, skipped = train.init_state(params, tx, extra), []
    for batch in (good[0], bad, good[1], bad, good[2]):
        state, aux = step(state, KEY, batch)
        skipped.append(float(aux["skipped"]))
    want = train.init_state(params, tx, extra)
    for batch in good:
        want, _ = step(want, KEY, batch)
    assert skipped == [0, 1, 0, 1, 0] and state.step == 5
    chex.assert_trees_all_equal(state.replace(step=want.step), want, strict=True)


def test_several_averages_are_those_of_single_runs():
    laws = {"main": 0.5, "slow": lambda step: 1 - 1 / (step + 2)}
    tx = optax.sgd(0.1)

    def averages_of(decay, names=None):
        step = jax.jit(train.make_train_step(plain_loss, tx, decay))
        return run(step, train.init_state(PARAMS, tx, averages=names))[0].ema

    single = {name: averages_of(law) for name, law in laws.items()}
    chex.assert_trees_all_equal(averages_of(laws, names=laws), single, strict=True)
    with pytest.raises(ValueError, match=r"decay has laws for main, slow: make the state with init_state\(averages"):
        averages_of(laws)


def test_errors_of_the_step():
    """A dynamic slice, for one, would clamp without a word."""
    tx = optax.sgd(1e-2)
    state = train.init_state(PARAMS, tx)
    with pytest.raises(ValueError, match="accumulate is a number of slices, at least 1; got 0"):
        train.make_train_step(plain_loss, tx, 0.9, accumulate=0)
    with pytest.raises(ValueError, match="ema: decay must be in"):
        train.make_train_step(plain_loss, tx, {"main": 1.5})
    with pytest.raises(ValueError, match="a batch of 16 does not divide into 3 slices"):
        train.make_train_step(plain_loss, tx, 0.9, accumulate=3)(state, KEY, BATCH)
    for cond in ({"label": np.arange(15)}, {"label": np.arange(16), "scale": np.ones(())}):
        with pytest.raises(ValueError, match="data and cond must share one leading axis"):
            train.make_train_step(probing, tx, 0.9, accumulate=2)(state, KEY, BATCH, cond)
    with pytest.raises(ValueError, match=r'must return the new ones as aux\["extra"\]'):
        step = train.make_train_step(lambda p, k, d, c, extra: (p["w"].sum(), {}), tx, 0.9)
        step(train.init_state(PARAMS, tx, {"n": jnp.ones(())}), KEY, BATCH)


# ---------------------------------------------------------------- the loop


def test_loop_is_the_steps_and_can_be_cut_anywhere():
    data = np.float32(RNG.normal(size=(64, 2)))
    step = train.make_train_step(shifted_loss, TX, 0.9)
    loop = chex.assert_max_traces(train.make_train_loop(step, lambda arrays, rows: (arrays[rows], None)), n=1)
    loop = jax.jit(loop, donate_argnums=0)
    index = np.arange(10 * 8).reshape(10, 8) % 64
    whole, metrics = loop(train.init_state(PARAMS, TX), KEY, data, index, 10)
    chex.assert_tree_all_finite(metrics)

    state = train.init_state(PARAMS, TX)
    for first, last in ((0, 3), (3, 4), (4, 10)):
        part = np.zeros_like(index)
        part[: last - first] = index[first:last]
        state, metrics = loop(state, KEY, data, part, last - first)
    chex.assert_trees_all_equal(state, whole, strict=True)
    assert np.isnan(metrics["loss"][6:]).all() and np.isfinite(metrics["loss"][:6]).all()

    step, state = jax.jit(step), train.init_state(PARAMS, TX)
    for rows in index:
        state, _ = step(state, KEY, data[rows])
    chex.assert_trees_all_close(state, whole, rtol=1e-5, atol=1e-6, strict=True)


@pytest.mark.parametrize("labels", [None, np.arange(40)])
def test_loop_takes_pairs_and_returns_all_numbers(labels):
    """By default the data is (data, cond), cond may be None; every number in aux comes back, step by step."""

    def loss(params, key, data, cond):
        total = data.sum() if cond is None else cond.sum()
        return jnp.mean((data - params["b"][None]) ** 2), {"total": total, "rows": data}

    tx, data = optax.sgd(0.0), np.arange(80, dtype=np.float32).reshape(40, 2)
    loop = chex.assert_max_traces(train.make_train_loop(train.make_train_step(loss, tx, 0.9)), n=1)
    loop, index = jax.jit(loop, donate_argnums=0), np.array([[3, 1], [39, 0], [7, 7]])
    state, metrics = loop(train.init_state(PARAMS, tx), KEY, (data, labels), index, 2)
    assert set(metrics) == {"loss", "grad_norm", "total"} and state.step == 2
    totals = [(data if labels is None else labels)[rows].sum() for rows in index[:2]]
    np.testing.assert_array_equal(metrics["total"], [*totals, np.nan])
    np.testing.assert_allclose(metrics["loss"][0], np.mean((data[[3, 1]] - [0.1, -0.1]) ** 2), rtol=1e-5)
    # more steps than rows of the index are not run: there is no data for them
    state, metrics = loop(train.init_state(PARAMS, tx), KEY, (data, labels), index, 100)
    assert state.step == 3
    chex.assert_tree_all_finite(metrics)


def test_the_loop_records_what_it_is_asked_to():
    tx = optax.sgd(0.1)
    step = train.make_train_step(plain_loss, tx, 0.5)
    batches = np.float32(RNG.normal(size=(3, 16, 2)))  # three batches, picked one by one
    loop = train.make_train_loop(step, record=lambda aux: {"loss": aux["loss"], "each": aux["each"]})
    state, metrics = jax.jit(loop)(train.init_state(PARAMS, tx), KEY, (batches, None), np.arange(3), 2)
    chex.assert_shape(metrics["each"], (3, 16))
    assert np.isnan(metrics["each"][2]).all()
    np.testing.assert_allclose(metrics["each"][:2].mean(1), metrics["loss"][:2], rtol=1e-6)
    step, want = jax.jit(step), train.init_state(PARAMS, tx)
    for batch in batches[:2]:
        want, _ = step(want, KEY, batch)
    chex.assert_trees_all_close(state, want, rtol=1e-6, strict=True)


def test_a_loss_that_is_not_finite_shows_its_step():
    loss = lambda params, key, data, cond: (jnp.log(data).sum() * params["b"].sum(), {})  # noqa: E731
    tx, data = optax.sgd(0.1), np.ones((10, 1), np.float32)
    data[6] = -1
    loop = jax.jit(train.make_train_loop(train.make_train_step(loss, tx, 0.9)))
    _, metrics = loop(train.init_state(PARAMS, tx), KEY, (data, None), np.arange(10).reshape(5, 2), 5)
    np.testing.assert_array_equal(np.isfinite(metrics["loss"]), [True, True, True, False, False])


# ---------------------------------------------------------------- the pieces of the step


def test_the_pieces_of_the_step():
    """`value_and_grad` of slices, added up by `accumulate`, is `gradients`; `average` is `ema.update` by name."""
    state = train.init_state(PARAMS, TX)

    @jax.jit
    def pieces(state):
        def slice_gradients(state, j):
            rows = jax.lax.dynamic_slice_in_dim(BATCH, 8 * j, 8)
            return train.value_and_grad(shifted_loss, state, BatchKey(KEY, 8 * j, 16), rows, None)

        return (
            train.accumulate(slice_gradients, state, 2),
            train.gradients(shifted_loss, state, KEY, BATCH, None, slices=2),
            train.gradients(shifted_loss, state, KEY, BATCH, None),
            train.average({"main": PARAMS}, state.params, 3, {"main": lambda step: 1 / step}),
        )

    added, sliced, at_once, averages = pieces(state.replace(params=jax.tree.map(lambda a: a + 3, PARAMS)))
    chex.assert_trees_all_equal(added, sliced, strict=True)
    chex.assert_trees_all_close(sliced, at_once, rtol=1e-5, atol=1e-6, strict=True)
    want = jax.tree.map(lambda a: a + 2, {"main": PARAMS})  # a third of the old ones and two of the new
    chex.assert_trees_all_close(averages, want, rtol=1e-6)


def test_means_over_devices():
    """Numbers and floating collections are averaged; arrays of rows and counts stay."""

    def each(number):
        aux = {"number": number, "rows": jnp.full(2, number)}
        return train.mean_over_devices({"w": number}, aux, {"mean": number, "count": jnp.int32(3)}, "data")

    spec = ({"w": P()}, {"number": P(), "rows": P("data")}, {"mean": P(), "count": P()})
    over_devices = jax.shard_map(lambda a: each(a[0]), mesh=parallel.mesh(), in_specs=P("data"), out_specs=spec)
    grads, aux, extra = jax.jit(over_devices)(np.arange(8, dtype=np.float32))
    chex.assert_trees_all_equal((grads, aux["number"], extra), ({"w": 3.5}, 3.5, {"mean": 3.5, "count": 3}))
    np.testing.assert_array_equal(aux["rows"], np.repeat(np.arange(8), 2))


# ---------------------------------------------------------------- other people's networks


def linen_network():
    model = jdiff.create_model("mlp", features=32, layers=2)
    return model.apply, jax.jit(model.init)(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))


def nnx_network():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((3, 32), (32, 32), (32, 2))])

        def __call__(self, x, label):
            h = jnp.concatenate([x, label[:, None]], -1)
            for layer in self.layers[:-1]:
                h = jax.nn.silu(layer(h))
            return self.layers[-1](h)

    return jdiff.adapt.nnx(nnx.jit(lambda: Net(nnx.Rngs(0)))())


def equinox_network():
    eqx = pytest.importorskip("equinox")
    make = eqx.filter_jit(lambda key: eqx.nn.MLP(3, 2, 32, 2, activation=jax.nn.silu, key=key))
    return jdiff.adapt.equinox(make(jax.random.key(0)), call=lambda net, x, t, cond: net(jnp.append(x, t)))


@pytest.mark.parametrize("network", [pytest.param(linen_network, marks=pytest.mark.slow), nnx_network, equinox_network])
def test_any_network_learns_a_gaussian(network):
    """400 steps on a Gaussian in the plane, then 2,000 samples: their mean and deviation are the data's."""
    apply, params = network()
    schedule, target, tx = jdiff.Flow(), jdiff.targets.Velocity(), optax.adam(1e-2)
    rng, mean, std = np.random.default_rng(0), np.array([1.0, -1.0]), np.array([0.5, 0.2])
    data = (mean + std * rng.normal(size=(400, 256, 2))).astype(np.float32)

    def loss(params, key, data, cond):
        return losses.denoising(apply, params, key, data, cond, schedule=schedule, target=target)

    @jax.jit
    def train_and_sample(state, data, x):
        loop = train.make_train_loop(train.make_train_step(loss, tx, 0.98))
        state, _ = loop(state, KEY, (data, None), jnp.arange(len(data)), len(data))
        denoise = jdiff.denoiser(apply, state.ema, schedule, target)
        return jdiff.sample(jdiff.solvers.Euler(), denoise, schedule, x, jdiff.grid.uniform(40))

    x = rng.normal(size=(2000, 2)).astype(np.float32)  # the prior: Flow has no signal at t = 1
    samples = train_and_sample(train.init_state(params, tx), data, x)
    np.testing.assert_allclose(samples.mean(0), mean, atol=0.08)
    np.testing.assert_allclose(samples.std(0), std, atol=0.08)
