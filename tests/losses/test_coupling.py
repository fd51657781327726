"""Couplings of noise and data: SciPy's assignment, plain search, agreement over slices and devices."""

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from scipy.optimize import linear_sum_assignment

import jdiff
from jdiff import coupling, losses, parallel, train
from jdiff.core.keys import BatchKey, fold, normal

KEY = jax.random.key(4)


def batch(n=24, shape=(4, 3)):
    x0 = jnp.tanh(normal(jax.random.key(1), (n, *shape)))
    return x0, normal(jax.random.key(2), (n, *shape))


def squares(x0, eps):
    """|x_0 - eps|^2 of all pairs, (n, n), in float64."""
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (x0, eps))
    return ((a[:, None] - b[None]) ** 2).sum(-1)


@pytest.mark.parametrize("n,shape", [(1, (2,)), (7, (2,)), (64, (4, 3)), (128, (5, 5, 2))])
def test_assignment_is_scipys(n, shape):
    x0, eps = batch(n, shape)
    rows, columns = linear_sum_assignment(squares(x0, eps))
    got = jax.jit(coupling.Assignment())(KEY, x0, eps)
    np.testing.assert_array_equal(got, eps[columns[np.argsort(rows)]])
    if n > 1:
        assert np.trace(squares(x0, got)) < np.trace(squares(x0, eps))


def test_assignment_of_ties_and_of_what_is_not_finite():
    """Equal data: every assignment is best, and each noise is dealt out once; nan does not hang."""
    x0, eps = batch(8, (2,))
    got = jax.jit(coupling.Assignment())(KEY, jnp.zeros_like(x0), eps)
    np.testing.assert_array_equal(np.sort(got, axis=0), np.sort(eps, axis=0))
    got = jax.jit(coupling.Assignment())(KEY, x0.at[3].set(jnp.nan), eps)
    np.testing.assert_array_equal(np.sort(got, axis=0), np.sort(eps, axis=0))


@pytest.mark.slow
def test_nearest_is_the_nearest_of_its_candidates():
    x0, eps = batch()
    candidates = [eps] + [normal(fold(KEY, j), eps.shape) for j in range(1, 5)]
    distances = np.stack([((np.asarray(x0) - np.asarray(c)) ** 2).sum((1, 2)) for c in candidates])
    best = np.stack(candidates)[distances.argmin(0), np.arange(len(x0))]
    np.testing.assert_array_equal(jax.jit(coupling.Nearest(5))(KEY, x0, eps), best)
    np.testing.assert_array_equal(coupling.Nearest(1)(KEY, x0, eps), eps)
    np.testing.assert_array_equal(coupling.Independent()(KEY, x0, eps), eps)
    parts = [coupling.Nearest(5)(BatchKey(KEY, i, 24), x0[i : i + 8], eps[i : i + 8]) for i in (0, 8, 16)]
    np.testing.assert_array_equal(jnp.concatenate(parts), best)


def test_what_the_nearest_in_one_dimension_is_distributed_as():
    """The least of k distances to x_0 = 0: P(|eps| > a) = (2 - 2 Phi(a))^k."""
    from scipy.stats import kstest, norm

    eps = normal(jax.random.key(7), (4000, 1))
    near = np.abs(np.asarray(coupling.Nearest(3)(KEY, jnp.zeros_like(eps), eps)))[:, 0]
    assert kstest(near, lambda a: 1 - (2 - 2 * norm.cdf(a)) ** 3).pvalue > 1e-3


@pytest.mark.parametrize("candidates", [0, 2.5, True])
def test_errors(candidates):
    with pytest.raises(ValueError, match="Nearest: candidates must be a whole number"):
        coupling.Nearest(candidates)


def apply(params, x, label, cond):
    return jnp.tanh(x @ params["w"] + label[:, None])


def test_the_loss_regresses_the_noise_that_it_added():
    """A network that knows x_0 and returns (x_t - alpha x_0) / sigma has no error, whatever the coupling."""
    schedule, (x0, _) = jdiff.VP(), batch(16, (3,))
    for pairing in (coupling.Independent(), coupling.Nearest(3), coupling.Assignment()):

        def knows(params, x, label, cond):
            t = label
            return (x - schedule.alpha(t)[:, None] * x0) / schedule.sigma(t)[:, None]

        loss, _ = losses.denoising(
            knows, None, KEY, x0, schedule=schedule, target=jdiff.targets.Eps(),
            conditioning=jdiff.conditioning.Continuous(1.0), coupling=pairing,
            levels=jdiff.levels.Uniform(0.1, 0.9),
        )  # fmt: skip
        assert float(loss) < 1e-8


def run(step, data, steps=4):
    state = train.init_state({"w": 0.1 * jnp.eye(2)}, optax.adam(1e-2))
    step = jax.jit(step)
    for _ in range(steps):
        state, aux = step(state, KEY, data)
    return state.params["w"], aux["loss"]


@pytest.mark.parametrize("pairing", [coupling.Nearest(3), coupling.Assignment()])
def test_devices_and_slices(pairing):
    """`Nearest` agrees with one device everywhere; `Assignment` under sharded jit; both run in a pmap and in slices."""

    def loss(params, key, data, cond):
        how = dict(schedule=jdiff.Flow(), target=jdiff.targets.Velocity(), coupling=pairing)
        return losses.denoising(apply, params, key, data, cond, **how)

    tx, data = optax.adam(1e-2), batch(16, (2,))[0]
    one = run(train.make_train_step(loss, tx, 0.9), data)
    sharded = run(train.make_train_step(loss, tx, 0.9), parallel.shard_batch(parallel.mesh(), data))
    np.testing.assert_allclose(sharded[0], one[0], rtol=1e-5, atol=1e-5)

    slices = run(train.make_train_step(loss, tx, 0.9, accumulate=4), data)
    step = train.make_train_step(loss, tx, 0.9, axis_name="data")
    step = jax.pmap(step, axis_name="data", in_axes=(0, None, 0))
    state = parallel.stack(train.init_state({"w": 0.1 * jnp.eye(2)}, tx))
    for _ in range(4):
        state, aux = step(state, KEY, data.reshape(8, 2, 2))
    mapped = parallel.unstack(state).params["w"], aux["loss"][0]
    for w, value in (slices, mapped):
        assert np.isfinite(value)
        if isinstance(pairing, coupling.Nearest):
            np.testing.assert_allclose(w, one[0], rtol=1e-5, atol=1e-5)
            np.testing.assert_allclose(value, one[1], rtol=1e-5)


def test_couplings_are_pytrees_under_vmap_and_grad():
    x0, eps = batch(6, (2,))
    for pairing in (coupling.Independent(), coupling.Nearest(3), coupling.Assignment()):
        assert not jax.tree.leaves(pairing)
        both = jax.vmap(lambda x, e, p=pairing: p(KEY, x, e))(jnp.stack([x0, -x0]), jnp.stack([eps, eps]))
        np.testing.assert_array_equal(both[0], pairing(KEY, x0, eps))
        slope = jax.grad(lambda s, p=pairing: (p(KEY, s * x0, eps) * x0).sum())(1.0)
        assert float(slope) == 0.0  # a choice has no derivative
