"""Training: the step, the loop, averages, optimisers, devices, other people's networks."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdiff
from jdiff import ema, losses, optim, parallel, train
from jdiff.core.keys import BatchKey, normal, positions

KEY = jax.random.key(1)
PARAMS = {"w": jnp.array([[0.5, -0.2], [0.1, 0.8]]), "b": jnp.array([0.1, -0.1])}


def apply(params, x, label, cond):
    return jnp.tanh(x @ params["w"] + params["b"][None] + label[:, None])


def noisy_loss(params, key, data, cond):
    """The real loss of the library, which draws t and noise by position."""
    return losses.denoising(apply, params, key, data, cond, schedule=jdiff.VP(), target=jdiff.targets.Eps())


def batch(n=16):
    return jax.random.normal(jax.random.key(9), (n, 2))


def run(step, state, steps=3, data=None, key=None):
    step = jax.jit(step)
    for _ in range(steps):
        state, aux = step(state, jax.random.key(1) if key is None else key, batch() if data is None else data)
    return state, aux


def same(a, b, **tolerance):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        if tolerance:
            np.testing.assert_allclose(x, y, **tolerance)
        else:
            np.testing.assert_array_equal(x, y)


def test_step_is_the_plain_optax_loop():
    tx = optax.adam(1e-2)
    state, aux = run(train.make_train_step(noisy_loss, tx, 0.9), train.init_state(PARAMS, tx), 4)
    params, average, opt_state = PARAMS, PARAMS, tx.init(PARAMS)
    for i in range(4):
        key = jax.random.fold_in(jax.random.key(1), i)
        (loss, _), grads = jax.value_and_grad(noisy_loss, has_aux=True)(params, key, batch(), None)
        updates, opt_state = tx.update(grads, opt_state)
        params = optax.apply_updates(params, updates)
        average = jax.tree.map(lambda a, p: 0.9 * a + 0.1 * p, average, params)
    same(state.params, params, rtol=1e-5, atol=1e-6)
    same(state.ema, average, rtol=1e-5, atol=1e-6)
    assert int(state.step) == 4
    np.testing.assert_allclose(aux["loss"], loss, rtol=1e-4)
    np.testing.assert_allclose(aux["grad_norm"], optax.global_norm(grads), rtol=1e-4)


@pytest.mark.parametrize("accumulate", [2, 4, 16])
def test_accumulation_is_one_big_batch(accumulate):
    tx = optax.adam(1e-2)
    whole = run(train.make_train_step(noisy_loss, tx, 0.9), train.init_state(PARAMS, tx))
    parts = run(train.make_train_step(noisy_loss, tx, 0.9, accumulate=accumulate), train.init_state(PARAMS, tx))
    same(whole[0].params, parts[0].params, rtol=1e-5, atol=1e-6)
    same(whole[1], parts[1], rtol=1e-4, atol=1e-5)


def test_batch_must_divide():
    tx = optax.sgd(1e-2)
    with pytest.raises(ValueError, match="a batch of 16 does not divide into 3 slices"):
        run(train.make_train_step(noisy_loss, tx, 0.9, accumulate=3), train.init_state(PARAMS, tx))


@pytest.mark.parametrize("accumulate", [1, 2])
def test_eight_devices_equal_one(accumulate):
    """jit with NamedSharding, and pmap with an axis name, take the steps that one device takes."""
    tx = optax.adam(1e-2)
    one, aux_one = run(train.make_train_step(noisy_loss, tx, 0.9), train.init_state(PARAMS, tx), 5)

    mesh = parallel.mesh()
    state = parallel.replicate(mesh, train.init_state(PARAMS, tx))
    step = train.make_train_step(noisy_loss, tx, 0.9, accumulate=accumulate)
    sharded, aux = run(step, state, 5, parallel.shard_batch(mesh, batch()))
    same(one.params, sharded.params, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux["loss"], aux_one["loss"], rtol=1e-5)

    step = jax.pmap(
        train.make_train_step(noisy_loss, tx, 0.9, axis_name="data", accumulate=accumulate),
        axis_name="data", in_axes=(0, None, 0),
    )  # fmt: skip
    state = parallel.stack(train.init_state(PARAMS, tx))
    for _ in range(5):
        state, aux = step(state, jax.random.key(1), batch().reshape(8, 2, 2))
    same(one.params, parallel.unstack(state).params, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(aux["loss"], np.full(8, aux_one["loss"]), rtol=1e-5)


def test_extra_collections_and_projection():
    """`extra` goes in, the new one comes out; `project` acts on the parameters, before the average."""

    def loss(params, key, data, cond, extra):
        return (params["w"] ** 2).sum(), dict(extra={"seen": extra["seen"] + len(data)})

    tx = optax.sgd(0.1)
    project = lambda p: jax.tree.map(lambda a: a / jnp.linalg.norm(a), p)  # noqa: E731
    step = train.make_train_step(loss, tx, 0.0, project=project)
    state, aux = run(step, train.init_state(PARAMS, tx, {"seen": jnp.zeros((), jnp.int32)}), 3)
    assert int(state.extra["seen"]) == 48
    assert "extra" not in aux
    np.testing.assert_allclose(jnp.linalg.norm(state.params["w"]), 1, rtol=1e-6)
    same(state.ema, state.params)


def make_loop(tx):
    take = lambda arrays, rows: (arrays[rows], None)  # noqa: E731
    return jax.jit(train.make_train_loop(train.make_train_step(noisy_loss, tx, 0.9), take), donate_argnums=0)


def test_loop_is_the_steps_and_can_be_cut_anywhere():
    tx, data = optax.adam(1e-2), batch(64)
    loop, key = make_loop(tx), jax.random.key(1)
    index = np.arange(10 * 8).reshape(10, 8) % 64
    whole, metrics = loop(train.init_state(PARAMS, tx), key, data, index, 10)
    assert np.isfinite(metrics["loss"]).all()

    state = train.init_state(PARAMS, tx)
    for cut in ((0, 3), (3, 4), (4, 10)):
        part = np.zeros_like(index)
        part[: cut[1] - cut[0]] = index[slice(*cut)]
        state, metrics = loop(state, key, data, part, cut[1] - cut[0])
    same(state, whole)  # bit for bit
    assert np.isnan(metrics["loss"][6:]).all() and np.isfinite(metrics["loss"][:6]).all()
    assert loop._cache_size() == 1

    step = jax.jit(train.make_train_step(noisy_loss, tx, 0.9))
    state = train.init_state(PARAMS, tx)
    for rows in index:
        state, _ = step(state, key, data[rows])
    same(state.params, whole.params, rtol=1e-5, atol=1e-6)


def test_state_is_copied_and_donated():
    tx = optax.adam(1e-2)
    params = jax.tree.map(jnp.copy, PARAMS)
    state = train.init_state(params, tx)
    jax.jit(train.make_train_step(noisy_loss, tx, 0.9), donate_argnums=0)(state, jax.random.key(0), batch())
    assert not any(leaf.is_deleted() for leaf in jax.tree.leaves(params))


def test_no_recompilation():
    tx = optax.adam(1e-2)
    step = jax.jit(train.make_train_step(noisy_loss, tx, ema.half_life(1000, 16)))
    state = train.init_state(PARAMS, tx)
    for i in range(3):
        state, _ = step(state, jax.random.key(i), batch() + i)
    assert step._cache_size() == 1


def test_loss_of_the_exact_denoiser_is_the_bayes_risk():
    """With the oracle as network the loss is E |x0 - E[x0 | x_t]|^2, which for a Gaussian is a trace in closed form."""
    schedule, n = jdiff.VP(), 1 << 16
    data = jdiff.oracle.Gaussian(np.array([0.5, -1.0]), np.array([[1.0, 0.3], [0.3, 0.5]]))
    x0 = data.sample(jax.random.key(0), n)
    for t in (0.1, 0.4, 0.9):

        def network(params, x, label, cond, t=t):
            return data.denoise(schedule)(x, jnp.asarray(t))

        loss, aux = losses.denoising(
            network, (), jax.random.key(1), x0, schedule=schedule, target=jdiff.targets.X0(),
            conditioning=jdiff.conditioning.Continuous(1.0), levels=jdiff.levels.Uniform(t, t),
        )  # fmt: skip
        a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
        risk = np.trace(np.linalg.inv(np.linalg.inv(data.covariance) + a**2 / s**2 * np.eye(2))) / 2
        error = float(aux["each"].std()) / np.sqrt(n)
        assert abs(float(loss) - risk) < 5 * error, (loss, risk, error)


def test_loss_errors():
    with pytest.raises(ValueError, match="scale images"):
        noisy_loss(PARAMS, jax.random.key(0), jnp.ones((4, 2), jnp.uint8), None)
    with pytest.raises(ValueError, match="the network's output has shape"):
        losses.denoising(
            lambda p, x, label, c: x[:, :1], (), jax.random.key(0), jnp.ones((4, 2)),
            schedule=jdiff.VP(), target=jdiff.targets.Eps(),
        )  # fmt: skip


# ---------------------------------------------------------------- averages and optimisers


def test_ema_of_constant_params_is_constant():
    average = PARAMS
    for i in range(50):
        average = ema.update(average, PARAMS, ema.half_life(1000, 16)(jnp.asarray(i)))
    same(average, PARAMS)


def test_ema_half_life():
    """Once the ramp is past, `images` images halve what the old parameters count; the batch does not matter."""
    for size in (10, 50):
        decay, average = ema.half_life(1000, size, ramp=None), 1.0
        for i in range(1000 // size):
            average = ema.update(jnp.float32(average), jnp.float32(0.0), decay(jnp.asarray(i)))
        np.testing.assert_allclose(average, 0.5, rtol=1e-5)
    ramped = ema.half_life(1000, 10, ramp=0.05)
    np.testing.assert_allclose(ramped(jnp.asarray(0)), 0.5 ** (10 / 0.5), rtol=1e-5)  # 0.05 of 10 images seen
    np.testing.assert_allclose(ramped(jnp.asarray(10**6)), 0.5 ** (10 / 1000), rtol=1e-6)


def test_ema_warmup_and_errors():
    decay = ema.warmup(0.99, inv_gamma=1.0, power=1.0)  # the plain mean of all so far, until 0.99
    np.testing.assert_allclose([decay(jnp.asarray(i)) for i in (0, 1, 3, 10_000)], [0, 0.5, 0.75, 0.99], rtol=1e-6)
    for bad in (lambda: ema.constant(1.0), lambda: ema.half_life(0, 16)):
        with pytest.raises(ValueError, match="ema"):
            bad()


def test_optimizer_clips_and_warms_up():
    lr = optim.lr_schedule("cosine", 1.0, 110, 10)
    np.testing.assert_allclose([lr(0), lr(5), lr(10), lr(60), lr(110)], [0, 0.5, 1, 0.5, 0], atol=1e-6)
    tx = optim.optimizer("sgd", 1.0, clip=0.5)
    updates, _ = tx.update({"a": jnp.array([3.0, 4.0])}, tx.init({"a": jnp.zeros(2)}))
    np.testing.assert_allclose(updates["a"], [-0.3, -0.4], rtol=1e-6)
    for bad in (
        lambda: optim.optimizer("adma", 1.0),
        lambda: optim.lr_schedule("step", 1.0, 10),
        lambda: optim.lr_schedule("constant", -1.0, 10),
        lambda: optim.optimizer("adam", 1.0, clip=-1.0),
    ):
        with pytest.raises(ValueError, match="unknown|must be positive|positive"):
            bad()


# ---------------------------------------------------------------- the step and the loop, in detail


def probing(params, key, data, cond):
    """A loss that says what it was called with."""
    rows, size = positions(key, len(data))
    aux = {"rows": rows, "size": jnp.float32(size), "data": data, "label": cond["label"], "mean": data.mean()}
    return params["w"].sum() * data.mean(), aux


@pytest.mark.parametrize("accumulate", [1, 2, 8])
def test_slices_are_the_rows_in_order(accumulate):
    """Each slice is told its rows of the whole; arrays come back in the order of the batch, numbers as means."""
    tx, cond = optax.sgd(0.1), {"label": jnp.arange(16)}
    step = jax.jit(train.make_train_step(probing, tx, 0.9, accumulate=accumulate))
    _, aux = step(train.init_state(PARAMS, tx), jax.random.key(0), batch(), cond)
    np.testing.assert_array_equal(aux["rows"], np.arange(16))
    np.testing.assert_array_equal(aux["label"], np.arange(16))
    np.testing.assert_array_equal(aux["data"], batch())
    np.testing.assert_allclose(aux["mean"], batch().mean(), rtol=1e-5)
    assert aux["size"] == 16


def test_key_of_a_step():
    """One device, one batch: the key folded with the step, nothing around it. Slices: a BatchKey around the same."""
    seen = []

    def loss(params, key, data, cond):
        seen.append(type(key))
        key = key.key if isinstance(key, BatchKey) else key
        return params["w"].sum(), {"bits": jnp.float32(jax.random.bits(key) >> 8)}

    tx, key = optax.sgd(0.1), jax.random.key(3)
    for accumulate in (1, 2):
        state = train.init_state(PARAMS, tx).replace(step=jnp.int32(41))
        step = train.make_train_step(loss, tx, 0.9, accumulate=accumulate)
        state, aux = step(state, key, batch())
        assert aux["bits"] == jnp.float32(jax.random.bits(jax.random.fold_in(key, 41)) >> 8)
        assert int(state.step) == 42
    assert seen[0] is not BatchKey and seen[-1] is BatchKey


def test_slices_of_different_lengths_are_an_error():
    """A dynamic slice would clamp without a word."""
    tx = optax.sgd(0.1)
    step = train.make_train_step(probing, tx, 0.9, accumulate=2)
    for cond in ({"label": jnp.arange(15)}, {"label": jnp.arange(16), "scale": jnp.ones(())}):
        with pytest.raises(ValueError, match="data and cond must share one leading axis"):
            step(train.init_state(PARAMS, tx), jax.random.key(0), batch(), cond)


def test_other_errors_of_the_step():
    tx = optax.sgd(0.1)
    with pytest.raises(ValueError, match="accumulate is a number of slices"):
        train.make_train_step(noisy_loss, tx, 0.9, accumulate=0)
    with pytest.raises(ValueError, match=r'must return the new ones as aux\["extra"\]'):
        step = train.make_train_step(lambda p, k, d, c, extra: (p["w"].sum(), {}), tx, 0.9)
        step(train.init_state(PARAMS, tx, {"n": jnp.ones(())}), jax.random.key(0), batch())


@pytest.mark.parametrize("labels", [None, np.arange(40)])
def test_loop_takes_pairs_and_returns_all_numbers(labels):
    """By default the data is (data, cond), cond may be None; every number in aux comes back, step by step."""

    def loss(params, key, data, cond):
        seen = data.sum() if cond is None else cond.sum()
        return jnp.mean((data - params["b"][None]) ** 2), {"seen": seen, "rows": data}

    tx, data = optax.sgd(0.0), np.arange(80, dtype=np.float32).reshape(40, 2)
    loop = jax.jit(train.make_train_loop(train.make_train_step(loss, tx, 0.9)), donate_argnums=0)
    index = np.array([[3, 1], [39, 0], [7, 7]])
    state, metrics = loop(train.init_state(PARAMS, tx), jax.random.key(0), (data, labels), index, 2)
    assert set(metrics) == {"loss", "grad_norm", "seen"} and int(state.step) == 2
    want = [(data if labels is None else labels)[rows].sum() for rows in index[:2]]
    np.testing.assert_array_equal(metrics["seen"], [*want, np.nan])
    np.testing.assert_allclose(metrics["loss"][0], np.mean((data[[3, 1]] - [0.1, -0.1]) ** 2), rtol=1e-5)
    # more steps than rows of the index are not run: there is no data for them
    state, metrics = loop(train.init_state(PARAMS, tx), jax.random.key(0), (data, labels), index, 100)
    assert int(state.step) == 3 and np.isfinite(metrics["loss"]).all()
    assert loop._cache_size() == 1


@pytest.mark.parametrize("accumulate", [1, 2])
def test_a_step_that_is_not_finite_can_be_left_out(accumulate):
    """A batch with an infinity changes nothing but the step; the run is that of the other batches, bit for bit."""
    tx, params = optax.adam(0.1), {"w": jnp.ones((3, 2))}
    extra = {"seen": jnp.zeros(())}

    def loss(params, key, data, cond, extra):
        out = jnp.mean((data @ params["w"] - 1) ** 2)
        return out, {"each": data[:, 0], "extra": {"seen": extra["seen"] + data.sum()}}

    step = jax.jit(train.make_train_step(loss, tx, 0.5, accumulate=accumulate, skip_nonfinite=True))
    good = [jax.random.normal(jax.random.key(i), (4, 3)) for i in range(3)]
    bad = good[0].at[1, 1].set(jnp.inf)
    state, skipped = train.init_state(params, tx, extra), []
    for batch in (good[0], bad, good[1], bad, good[2]):
        state, aux = step(state, KEY, batch)
        skipped.append(float(aux["skipped"]))
    want = train.init_state(params, tx, extra)
    for batch in good:
        want, _ = step(want, KEY, batch)
    assert skipped == [0, 1, 0, 1, 0] and int(state.step) == 5
    for a, b in zip(jax.tree.leaves(state.replace(step=want.step)), jax.tree.leaves(want), strict=True):
        np.testing.assert_array_equal(a, b)


def test_several_averages_are_those_of_single_runs():
    laws = {"main": 0.5, "slow": lambda step: 1 - 1 / (step + 2)}
    tx, params = optax.sgd(0.1), {"w": jnp.arange(4.0)}

    def loss(params, key, data, cond):
        return jnp.sum((params["w"] - data.mean()) ** 2), {}

    def run(decay, averages=None):
        state = train.init_state(params, tx, averages=averages)
        step = jax.jit(train.make_train_step(loss, tx, decay))
        for i in range(4):
            state, _ = step(state, KEY, jnp.full((2, 1), float(i)))
        return state

    both = run(laws, averages=laws)
    for name, law in laws.items():
        np.testing.assert_array_equal(both.ema[name]["w"], run(law).ema["w"])
    with pytest.raises(ValueError, match=r"decay has laws for main, slow: make the state with init_state\(averages"):
        run(laws)


def test_the_loop_records_what_it_is_asked_to():
    tx, params = optax.sgd(0.1), {"w": jnp.ones(3)}

    def loss(params, key, data, cond):
        each = ((data - params["w"][None]) ** 2).sum(-1)
        return each.mean(), {"each": each}

    batches = jax.random.normal(KEY, (3, 4, 3))  # three batches of four, picked one by one
    loop = train.make_train_loop(
        train.make_train_step(loss, tx, 0.5), record=lambda aux: {"loss": aux["loss"], "each": aux["each"]}
    )
    state, metrics = jax.jit(loop)(train.init_state(params, tx), KEY, (batches, None), jnp.arange(3), 2)
    assert metrics["each"].shape == (3, 4) and np.isnan(metrics["each"][2]).all() and int(state.step) == 2
    np.testing.assert_allclose(metrics["each"][:2].mean(1), metrics["loss"][:2], rtol=1e-6)
    one = train.init_state(params, tx)
    for batch in batches[:2]:
        one, _ = jax.jit(train.make_train_step(loss, tx, 0.5))(one, KEY, batch)
    np.testing.assert_allclose(state.params["w"], one.params["w"], rtol=1e-6)


def test_a_loss_that_is_not_finite_shows_its_step():
    loss = lambda params, key, data, cond: (jnp.log(data).sum() * params["b"].sum(), {})  # noqa: E731
    tx, data = optax.sgd(0.1), jnp.ones((10, 1)).at[6].set(-1.0)
    loop = jax.jit(train.make_train_loop(train.make_train_step(loss, tx, 0.9)))
    _, metrics = loop(train.init_state(PARAMS, tx), jax.random.key(0), (data, None), np.arange(10).reshape(5, 2), 5)
    np.testing.assert_array_equal(np.isfinite(metrics["loss"]), [True, True, True, False, False])


# ---------------------------------------------------------------- other people's networks


def train_and_sample(apply, params):
    """100 steps on a Gaussian in the plane, then 2,000 samples; returns their mean and std."""
    schedule, target, tx = jdiff.Flow(), jdiff.targets.Velocity(), optax.adam(1e-2)
    mean, std = jnp.array([[1.0, -1.0]]), jnp.array([[0.5, 0.2]])

    def loss(params, key, data, cond):
        return losses.denoising(apply, params, key, data, cond, schedule=schedule, target=target)

    step = jax.jit(train.make_train_step(loss, tx, 0.98), donate_argnums=0)
    state = train.init_state(params, tx)
    for i in range(400):
        data = mean + std * normal(jax.random.key(i), (256, 2))
        state, _ = step(state, jax.random.key(0), data)
    denoise = jdiff.denoiser(apply, state.ema, schedule, target)
    x = jdiff.prior(schedule, jax.random.key(1), (2000, 2))
    out = jax.jit(jdiff.sample)(jdiff.solvers.Heun(), denoise, schedule, x, jdiff.grid.uniform(20))
    return out.mean(0), out.std(0)


def check_gaussian(mean, std):
    np.testing.assert_allclose(mean, [1, -1], atol=0.08)
    np.testing.assert_allclose(std, [0.5, 0.2], atol=0.08)


@pytest.mark.slow
def test_a_linen_network():
    model = jdiff.create_model("mlp", features=64, layers=2)
    params = model.init(jax.random.key(0), jnp.zeros((1, 2)), jnp.zeros(1))
    check_gaussian(*train_and_sample(model.apply, params))


def test_an_nnx_network():
    nnx = pytest.importorskip("flax.nnx")

    class Net(nnx.Module):
        def __init__(self, rngs):
            self.layers = nnx.List([nnx.Linear(a, b, rngs=rngs) for a, b in ((3, 64), (64, 64), (64, 2))])

        def __call__(self, x, label):
            h = jnp.concatenate([x, label[:, None]], -1)
            for layer in self.layers[:-1]:
                h = jax.nn.silu(layer(h))
            return self.layers[-1](h)

    graph, params = nnx.split(Net(nnx.Rngs(0)))

    def apply(params, x, label, cond):
        return nnx.merge(graph, params)(x, label)

    check_gaussian(*train_and_sample(apply, params))


def test_an_equinox_network():
    eqx = pytest.importorskip("equinox")
    net = eqx.nn.MLP(3, 2, 64, 2, activation=jax.nn.silu, key=jax.random.key(0))
    params, static = eqx.partition(net, eqx.is_array)

    def apply(params, x, label, cond):
        return jax.vmap(eqx.combine(params, static))(jnp.concatenate([x, label[:, None]], -1))

    check_gaussian(*train_and_sample(apply, params))
