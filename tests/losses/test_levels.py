"""Laws of t that are not in test_targets: plain uniform, and the law that learns where the loss is."""

from collections import deque

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdiff
from jdiff import levels, losses, parallel, train
from jdiff.core.keys import BatchKey

KEY = jax.random.key(5)


def test_independent_uniform():
    from scipy.stats import kstest

    t = np.asarray(levels.Independent(0.2, 0.7)(KEY, 4000, jdiff.VP()))
    assert kstest((t - 0.2) / 0.5, "uniform").pvalue > 1e-3
    assert np.bincount(((t - 0.2) * 2 * 400).astype(int)).max() > 15  # no strata: Poisson of mean 10
    whole = levels.Independent()(KEY, 12, jdiff.Flow())
    parts = [levels.Independent()(BatchKey(KEY, i, 12), 4, jdiff.Flow()) for i in (0, 4, 8)]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)
    assert (whole >= jdiff.Flow().t_min).all() and (whole <= 1).all()


class Sequential:
    """Nichol & Dhariwal's resampler row by row, in NumPy: the last losses of each bin in a queue."""

    def __init__(self, bins, history, uniform=0.001):
        self.queues, self.history, self.uniform = [deque(maxlen=history) for _ in range(bins)], history, uniform

    def update(self, bins, values):
        for b, value in zip(bins, values, strict=True):
            self.queues[b].append(value)

    def shares(self):
        n = len(self.queues)
        if any(len(q) < self.history for q in self.queues):
            return np.full(n, 1 / n)
        size = np.array([np.sqrt(np.mean(np.square(q))) for q in self.queues])
        return (1 - self.uniform) * size / size.sum() + self.uniform / n


@pytest.mark.parametrize("law", [levels.LossAware(bins=7, history=3), levels.LossAware(T=28, bins=7, history=3)])
def test_history_is_the_sequential_one(law):
    """Batches of any size, many rows in one bin, some bins seldom: the shares are those of the queues."""
    rng, reference, schedule = np.random.default_rng(1), Sequential(7, 3), jdiff.discrete(jdiff.betas.linear(28))
    state, update = law.init(), jax.jit(law.update)
    informed = False
    for size in (1, 5, 40, 16, 40, 2, 40) + (16,) * 12:
        knots = rng.choice(28, size, p=rng.dirichlet(np.ones(28)))
        t = (knots + 1) / 28 if law.T else schedule.t_min + (1 - schedule.t_min) * (knots + 0.5) / 28
        values = rng.exponential(size=size).astype(np.float32)
        state = update(state, jnp.asarray(t, jnp.float32), jnp.asarray(values), schedule)
        reference.update(knots // 4, values)
        np.testing.assert_allclose(law.shares(state), reference.shares(), rtol=1e-5)
        informed |= reference.shares().std() > 0
        assert (np.asarray(state["count"]) < 6).all()
    assert informed


def trained(law, schedule, seed=0):
    """A state whose bins are full of losses of very different size."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 1.5, law.bins)).astype(np.float32)
    losses = size[:, None] * np.ones((1, law.history), np.float32)
    return dict(losses=jnp.asarray(losses), count=jnp.full(law.bins, law.history, jnp.float32))


LAWS = {"continuous": levels.LossAware(bins=20), "table": levels.LossAware(T=60, bins=20)}


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_the_shares_and_importance_undoes_them(name):
    law, schedule, n = LAWS[name], jdiff.VP(), 40_000
    state = trained(law, schedule)
    t, weight = jax.jit(law.draw, static_argnums=2)(state, KEY, n, schedule)
    p = np.asarray(law.shares(state))
    place = (np.asarray(t) - schedule.t_min) / (1 - schedule.t_min) * 20 if name == "continuous" else (t * 60 - 1) / 3
    bins = np.clip(np.floor(np.asarray(place) + (1e-3 if law.T else 0)), 0, 19).astype(int)
    np.testing.assert_allclose(np.bincount(bins, minlength=20) / n, p, atol=3 / n)  # strata: all but exact
    np.testing.assert_allclose(weight, 1 / (20 * p[bins]), rtol=1e-3)
    informed = law.at(state)
    np.testing.assert_allclose(informed(KEY, n, schedule), t, atol=1e-5)  # compiled or not
    np.testing.assert_allclose(informed.importance(t, schedule), weight, rtol=1e-5)
    uniform = (levels.Knots(60) if law.T else levels.Uniform())(KEY, n, schedule)
    for f in (jnp.sin, jnp.square, jnp.log):
        np.testing.assert_allclose((weight * f(t)).mean(), f(uniform).mean(), rtol=3e-3)
    parts = [informed(BatchKey(KEY, i, 60), 20, schedule) for i in (0, 20, 40)]
    np.testing.assert_array_equal(jnp.concatenate(parts), informed(KEY, 60, schedule))


@pytest.mark.slow
def test_uniform_until_every_bin_is_full():
    for law, plain in (
        (levels.LossAware(bins=16), levels.Uniform()),
        (levels.LossAware(T=64, bins=16), levels.Knots(64)),
    ):
        state = law.init()
        t, weight = law.draw(state, KEY, 500, jdiff.Cosine())
        np.testing.assert_allclose(t, plain(KEY, 500, jdiff.Cosine()), rtol=1e-5)
        np.testing.assert_array_equal(weight, 1)
        state = trained(law, None) | dict(count=jnp.full(16, 10.0).at[3].set(9.0))
        np.testing.assert_array_equal(law.shares(state), 1 / 16)


@pytest.mark.slow
def test_every_knot_of_a_long_table_has_its_bin():
    law = levels.LossAware(T=4000, bins=4000, history=1)
    knots = jnp.arange(1, 4001) / 4000
    state = law.update(law.init(), knots, jnp.arange(4000.0) + 1, jdiff.VP())
    np.testing.assert_array_equal(state["losses"][:, 0], np.arange(4000) + 1)
    t, weight = law.draw(state, KEY, 4000, jdiff.VP())
    np.testing.assert_allclose(t * 4000, np.round(t * 4000), atol=1e-3)
    np.testing.assert_allclose(law.at(state).importance(t, jdiff.VP()), weight, rtol=1e-5)


def test_losses_that_are_not_finite_or_zero():
    """nan is not remembered; losses that are all zero leave the law uniform."""
    law = levels.LossAware(bins=4, history=1)
    t = jnp.array([0.1, 0.4, 0.6, 0.9])
    state = law.update(law.init(), t, jnp.array([1.0, jnp.nan, jnp.inf, 2.0]), jdiff.Flow())
    np.testing.assert_array_equal(state["count"], [1, 0, 0, 1])
    zero = law.update(law.init(), t, jnp.zeros(4), jdiff.Flow())
    np.testing.assert_array_equal(law.shares(zero), 0.25)


def test_errors():
    for wrong in (dict(bins=0), dict(history=0), dict(bins=2.5)):
        with pytest.raises(ValueError, match="must be a whole number"):
            levels.LossAware(**wrong)
    with pytest.raises(ValueError, match="7 bins do not divide a table of 100 steps"):
        levels.LossAware(T=100, bins=7)
    tx = optax.sgd(0.1)
    step = train.make_train_step(losses.loss_aware(loss, law=LAW, schedule=SCHEDULE), tx, 0.9)
    with pytest.raises(ValueError, match="loss_aware: the training state needs extra"):
        step(train.init_state(PARAMS, tx), KEY, DATA)


# ---------------------------------------------------------------- in training

PARAMS = {"w": jnp.array([[0.5, -0.2], [0.1, 0.8]]), "b": jnp.array([0.1, -0.1])}
DATA = jax.random.normal(jax.random.key(9), (32, 2))
SCHEDULE, LAW = jdiff.VP(), levels.LossAware(bins=4, history=2)


def loss(params, key, data, cond, levels):
    def apply(params, x, label, cond):
        return jnp.tanh(x @ params["w"] + params["b"][None] + label[:, None])

    return losses.denoising(
        apply, params, key, data, cond, schedule=SCHEDULE, target=jdiff.targets.Eps(), levels=levels
    )


def begin(tx):
    return train.init_state(PARAMS, tx, dict(levels=LAW.init(), seen=jnp.zeros((), jnp.int32)))


def run(step, state, data=DATA, steps=6):
    step = jax.jit(step)
    for _ in range(steps):
        state, aux = step(state, KEY, data)
    return state, aux


def test_training_learns_the_same_law_on_any_number_of_devices():
    tx = optax.adam(1e-2)
    one, aux = run(train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE), tx, 0.9), begin(tx))
    p = LAW.shares(one.extra["levels"])
    assert p.std() > 0.01 and int(one.extra["seen"]) == 0
    assert aux["t"].shape == aux["each"].shape == (32,)
    # the loss is weighted, what is remembered is not
    weight = LAW.at(
        run(train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE), tx, 0.9), begin(tx), steps=5)[0].extra[
            "levels"
        ]
    )
    np.testing.assert_allclose(aux["loss"], (weight.importance(aux["t"], SCHEDULE) * aux["each"]).mean(), rtol=1e-5)

    def close(state):
        for a, b in zip(
            jax.tree.leaves((state.params, state.extra)), jax.tree.leaves((one.params, one.extra)), strict=True
        ):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)

    mesh = parallel.mesh()
    step = train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE), tx, 0.9)
    close(run(step, parallel.replicate(mesh, begin(tx)), parallel.shard_batch(mesh, DATA))[0])

    step = train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE, axis_name="data"), tx, 0.9, axis_name="data")
    step = jax.pmap(step, axis_name="data", in_axes=(0, None, 0))
    state = parallel.stack(begin(tx))
    for _ in range(6):
        state, _ = step(state, KEY, DATA.reshape(8, 4, 2))
    close(parallel.unstack(state))
    for leaf in jax.tree.leaves(state.extra):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))


def test_slices_pass_the_law_on():
    """As many losses are remembered as in one batch; the parameters stay finite."""
    tx = optax.adam(1e-2)
    state, _ = run(train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE), tx, 0.9, accumulate=4), begin(tx))
    assert (state.extra["levels"]["count"] >= 2).all()
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(state))
