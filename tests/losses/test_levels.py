"""Laws of t that are not in test_targets: plain uniform, and the law that learns where the loss is."""

from collections import deque

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdiff
from jdiff import levels, losses, parallel, train
from jdiff.core.keys import BatchKey

KEY = jax.random.key(5)


draws = jax.jit(lambda law, key, n, schedule: law(key, n, schedule), static_argnums=2)


def test_independent_uniform():
    from scipy.stats import kstest

    t = np.asarray(draws(levels.Independent(0.2, 0.7), KEY, 4000, jdiff.VP()))
    assert kstest((t - 0.2) / 0.5, "uniform").pvalue > 1e-3
    assert np.bincount(((t - 0.2) * 2 * 400).astype(int)).max() > 15  # no strata: Poisson of mean 10
    whole = np.asarray(draws(levels.Independent(), KEY, 12, jdiff.Flow()))
    parts = [draws(levels.Independent(), BatchKey(KEY, i, 12), 4, jdiff.Flow()) for i in (0, 4, 8)]
    np.testing.assert_array_equal(np.concatenate(parts), whole)
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
    state, update, shares = law.init(), jax.jit(law.update), jax.jit(law.shares)
    informed = False
    for size in (1, 40, 16, 40, 1, 40) + (16,) * 12:
        knots = rng.choice(28, size, p=rng.dirichlet(np.ones(28)))
        t = (knots + 1) / 28 if law.T else schedule.t_min + (1 - schedule.t_min) * (knots + 0.5) / 28
        values = rng.exponential(size=size).astype(np.float32)
        state = update(state, np.asarray(t, np.float32), values, schedule)
        reference.update(knots // 4, values)
        np.testing.assert_allclose(shares(state), reference.shares(), rtol=1e-5)
        informed |= reference.shares().std() > 0
        assert (np.asarray(state["count"]) < 6).all()
    assert informed


def trained(law, schedule, seed=0):
    """A state whose bins are full of losses of very different size."""
    rng = np.random.default_rng(seed)
    size = np.exp(rng.normal(0, 1.5, law.bins)).astype(np.float32)
    losses = size[:, None] * np.ones((1, law.history), np.float32)
    return dict(losses=losses, count=np.full(law.bins, law.history, np.float32))


LAWS = {"continuous": levels.LossAware(bins=20), "table": levels.LossAware(T=60, bins=20)}


@pytest.mark.parametrize("name", LAWS)
def test_draws_follow_the_shares_and_importance_undoes_them(name):
    law, schedule, n = LAWS[name], jdiff.VP(), 40_000
    state, plain = trained(law, schedule), levels.Knots(60) if law.T else levels.Uniform()

    @jax.jit
    def drawn(state, key):
        informed = law.at(state)
        t = informed(key, n, schedule)
        return law.draw(state, key, n, schedule), (t, informed.importance(t, schedule)), plain(key, n, schedule)

    (t, weight), informed, uniform = jax.device_get(drawn(state, KEY))
    p = np.asarray(law.shares(state))
    place = (t - schedule.t_min) / (1 - schedule.t_min) * 20 if name == "continuous" else (t * 60 - 1) / 3
    bins = np.clip(np.floor(place + (1e-3 if law.T else 0)), 0, 19).astype(int)
    np.testing.assert_allclose(np.bincount(bins, minlength=20) / n, p, atol=3 / n)  # strata: all but exact
    np.testing.assert_allclose(weight, 1 / (20 * p[bins]), rtol=1e-3)
    chex.assert_trees_all_close(informed, (t, weight), rtol=1e-5)
    for f in (np.sin, np.square, np.log):
        np.testing.assert_allclose((weight * f(t)).mean(), f(uniform).mean(), rtol=3e-3)
    parts = [draws(law.at(state), BatchKey(KEY, i, 60), 20, schedule) for i in (0, 20, 40)]
    np.testing.assert_allclose(np.concatenate(parts), draws(law.at(state), KEY, 60, schedule), rtol=1e-5)


@pytest.mark.parametrize("T", [None, 64])
def test_uniform_until_every_bin_is_full(T):
    law, plain = levels.LossAware(T=T, bins=16), levels.Knots(T) if T else levels.Uniform()

    @jax.jit
    def drawn(state):
        return law.draw(state, KEY, 500, jdiff.Cosine()), plain(KEY, 500, jdiff.Cosine())

    (t, weight), uniform = drawn(law.init())
    np.testing.assert_allclose(t, uniform, rtol=1e-5)
    np.testing.assert_array_equal(weight, 1)
    state = trained(law, None) | dict(count=np.array([10.0] * 3 + [9.0] + [10.0] * 12, np.float32))
    np.testing.assert_array_equal(law.shares(state), 1 / 16)


def test_every_knot_of_a_long_table_has_its_bin():
    law = levels.LossAware(T=4000, bins=4000, history=1)
    knots = np.arange(1, 4001, dtype=np.float32) / 4000

    @jax.jit
    def update_and_draw(state):
        state = law.update(state, knots, 4000 * knots, jdiff.VP())
        t, weight = law.draw(state, KEY, 4000, jdiff.VP())
        return state["losses"], t, weight, law.at(state).importance(t, jdiff.VP())

    remembered, t, weight, importance = update_and_draw(law.init())
    np.testing.assert_allclose(remembered[:, 0], np.arange(4000) + 1, rtol=1e-6)
    np.testing.assert_allclose(t * 4000, np.round(t * 4000), atol=1e-3)
    np.testing.assert_allclose(importance, weight, rtol=1e-5)


def test_losses_that_are_not_finite_or_zero():
    """nan is not remembered; losses that are all zero leave the law uniform."""
    law = levels.LossAware(bins=4, history=1)
    t, update = np.array([0.1, 0.4, 0.6, 0.9], np.float32), jax.jit(law.update)
    state = update(law.init(), t, np.array([1.0, np.nan, np.inf, 2.0], np.float32), jdiff.Flow())
    np.testing.assert_array_equal(state["count"], [1, 0, 0, 1])
    zero = update(law.init(), t, np.zeros(4, np.float32), jdiff.Flow())
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
        jax.eval_shape(step, train.init_state(PARAMS, tx), KEY, DATA)


# ---------------------------------------------------------------- in training

PARAMS = {"w": np.array([[0.5, -0.2], [0.1, 0.8]], np.float32), "b": np.array([0.1, -0.1], np.float32)}
DATA = np.random.default_rng(9).normal(size=(32, 2)).astype(np.float32)
SCHEDULE, LAW = jdiff.VP(), levels.LossAware(bins=4, history=2)


def loss(params, key, data, cond, levels):
    def apply(params, x, label, cond):
        return jnp.tanh(x @ params["w"] + params["b"][None] + label[:, None])

    return losses.denoising(
        apply, params, key, data, cond, schedule=SCHEDULE, target=jdiff.targets.Eps(), levels=levels
    )


TX = optax.sgd(1e-1)


def begin():
    return train.init_state(PARAMS, TX, dict(levels=LAW.init(), seen=np.zeros((), np.int32)))


def run(step, data=DATA, state=None, steps=6):
    """All states and the last numbers of a few steps."""
    states = [begin() if state is None else state]
    for _ in range(steps):
        state, aux = step(states[-1], KEY, data)
        states.append(state)
    return states, aux


def test_training_learns_the_same_law_on_any_number_of_devices():
    step = jax.jit(train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE), TX, 0.9))
    states, aux = run(step)
    one = states[-1]
    p = LAW.shares(one.extra["levels"])
    assert p.std() > 0.01 and int(one.extra["seen"]) == 0
    chex.assert_shape([aux["t"], aux["each"]], (32,))
    # the loss is weighted, what is remembered is not
    weight = LAW.at(states[-2].extra["levels"]).importance(aux["t"], SCHEDULE)
    np.testing.assert_allclose(aux["loss"], (weight * aux["each"]).mean(), rtol=1e-5)

    mesh = parallel.mesh()
    sharded, _ = run(step, parallel.shard_batch(mesh, DATA), parallel.replicate(mesh, begin()))
    step = train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE, axis_name="data"), TX, 0.9, axis_name="data")
    step = jax.pmap(step, axis_name="data", in_axes=(0, None, 0))
    mapped, _ = run(step, DATA.reshape(8, 4, 2), parallel.stack(begin()))
    for leaf in jax.tree.leaves(jax.device_get(mapped[-1].extra)):
        np.testing.assert_array_equal(leaf, np.broadcast_to(leaf[:1], leaf.shape))
    for state in (sharded[-1], parallel.unstack(mapped[-1])):
        got, expected = (jax.device_get((s.params, s.extra)) for s in (state, one))
        chex.assert_trees_all_close(got, expected, rtol=1e-4, atol=1e-5)


def test_slices_pass_the_law_on():
    """As many losses are remembered as in one batch; the parameters stay finite."""
    step = jax.jit(train.make_train_step(losses.loss_aware(loss, LAW, SCHEDULE), TX, 0.9, accumulate=4))
    states, _ = run(step)
    assert (states[-1].extra["levels"]["count"] >= 2).all()
    chex.assert_tree_all_finite(states[-1])
