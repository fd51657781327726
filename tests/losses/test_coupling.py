"""Couplings of noise and data: SciPy's assignment, plain search, agreement over slices and devices."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.optimize import linear_sum_assignment

import jdiff
from jdiff import coupling, losses, parallel
from jdiff.core.keys import BatchKey, fold, normal

KEY = jax.random.key(4)


def batch(n=24, shape=(4, 3)):
    """(data, noise) in NumPy: nothing is compiled."""
    z = np.random.default_rng(0).normal(size=(2, n, *shape)).astype(np.float32)
    return np.tanh(z[0]), z[1]


@jax.jit
def paired(pairing, key, x0, eps):
    return pairing(key, x0, eps)


def squares(x0, eps):
    """|x_0 - eps|^2 of all pairs, (n, n), in float64."""
    a, b = (np.asarray(v, np.float64).reshape(len(v), -1) for v in (x0, eps))
    return ((a[:, None] - b[None]) ** 2).sum(-1)


@pytest.mark.parametrize("n,shape", [(1, (2,)), (7, (2,)), (64, (4, 3)), (128, (5, 5, 2))])
def test_assignment_is_scipys(n, shape):
    x0, eps = batch(n, shape)
    rows, columns = linear_sum_assignment(squares(x0, eps))
    got = paired(coupling.Assignment(), KEY, x0, eps)
    chex.assert_trees_all_equal(np.asarray(got), eps[columns[np.argsort(rows)]], strict=True)
    if n > 1:
        assert np.trace(squares(x0, got)) < np.trace(squares(x0, eps))


def test_assignment_of_ties_and_of_what_is_not_finite():
    """Equal data: every assignment is best, and each noise is dealt out once; nan does not hang."""
    x0, eps = batch(7, (2,))
    unknown = x0.copy()
    unknown[3] = np.nan
    for data in (np.zeros_like(x0), unknown):
        got = paired(coupling.Assignment(), KEY, data, eps)
        np.testing.assert_array_equal(np.sort(got, axis=0), np.sort(eps, axis=0))


def test_nearest_is_the_nearest_of_its_candidates():
    x0, eps = batch()

    @jax.jit
    def fresh(key):
        return jnp.stack([normal(fold(key, j), eps.shape) for j in range(1, 5)])

    candidates = np.concatenate([eps[None], fresh(KEY)])
    distances = ((x0[None] - candidates) ** 2).sum((2, 3))
    best = candidates[distances.argmin(0), np.arange(len(x0))]
    chex.assert_trees_all_equal(np.asarray(paired(coupling.Nearest(5), KEY, x0, eps)), best, strict=True)
    parts = [paired(coupling.Nearest(5), BatchKey(KEY, i, 24), x0[i : i + 8], eps[i : i + 8]) for i in (0, 8, 16)]
    chex.assert_trees_all_equal(np.concatenate(parts), best, strict=True)
    for plain in (coupling.Nearest(1), coupling.Independent()):
        chex.assert_trees_all_equal(np.asarray(plain(KEY, x0, eps)), eps, strict=True)


def test_what_the_nearest_in_one_dimension_is_distributed_as():
    """The least of k distances to x_0 = 0: P(|eps| > a) = (2 - 2 Phi(a))^k."""
    from scipy.stats import kstest, norm

    _, eps = batch(4000, (1,))
    near = np.abs(paired(coupling.Nearest(3), KEY, np.zeros_like(eps), eps))[:, 0]
    assert kstest(near, lambda a: 1 - (2 - 2 * norm.cdf(a)) ** 3).pvalue > 1e-3


@pytest.mark.parametrize("candidates", [0, 2.5, True])
def test_errors(candidates):
    with pytest.raises(ValueError, match="Nearest: candidates must be a whole number"):
        coupling.Nearest(candidates)


def apply(params, x, label, cond):
    return jnp.tanh(x @ params + label[:, None])


PAIRINGS = [coupling.Independent(), coupling.Nearest(3), coupling.Assignment()]


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_the_loss_regresses_the_noise_that_it_added(pairing):
    """A network that knows x_0 and returns (x_t - alpha x_0) / sigma has no error, whatever the coupling."""
    schedule, (x0, _) = jdiff.VP(), batch(16, (3,))

    def knows(params, x, t, cond):
        return (x - schedule.alpha(t)[:, None] * x0) / schedule.sigma(t)[:, None]

    loss, _ = jax.jit(
        lambda x0: losses.denoising(
            knows, None, KEY, x0, schedule=schedule, target=jdiff.targets.Eps(), coupling=pairing,
            conditioning=jdiff.conditioning.Continuous(1.0), levels=jdiff.levels.Uniform(0.1, 0.9),
        )
    )(x0)  # fmt: skip
    assert float(loss) < 1e-8


@pytest.mark.parametrize("pairing", PAIRINGS[1:])
def test_devices_and_slices(pairing):
    """`Nearest` agrees with one device everywhere; `Assignment` under sharded jit; both run in a pmap and in slices."""

    @jax.value_and_grad
    def loss(params, key, data):
        return losses.denoising(
            apply, params, key, data, schedule=jdiff.Flow(), target=jdiff.targets.Velocity(), coupling=pairing
        )[0]

    def mean(parts):
        return jax.tree.map(lambda *a: np.mean(np.stack(a), 0), *parts)

    params, data, compiled = 0.1 * np.eye(2, dtype=np.float32), batch(16, (2,))[0], jax.jit(loss)
    one = jax.device_get(compiled(params, KEY, data))
    sharded = compiled(params, KEY, parallel.shard_batch(parallel.mesh(), data))
    chex.assert_trees_all_close(jax.device_get(sharded), one, rtol=1e-5, atol=1e-5)

    slices = mean([compiled(params, BatchKey(KEY, i, 16), data[i : i + 2]) for i in range(0, 16, 2)])
    rows = BatchKey(KEY, np.arange(0, 16, 2), 16)
    axes = (None, rows.replace(key=None, start=0), 0)
    mapped = jax.pmap(loss, in_axes=axes)(params, rows, data.reshape(8, 2, 2))
    mapped = jax.tree.map(lambda a: np.mean(a, 0), jax.device_get(mapped))
    chex.assert_trees_all_close(mapped, slices, rtol=1e-5, atol=1e-5)
    chex.assert_tree_all_finite(slices)
    if isinstance(pairing, coupling.Nearest):
        chex.assert_trees_all_close(slices, one, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("pairing", PAIRINGS)
def test_couplings_are_pytrees_under_vmap_and_grad(pairing):
    x0, eps = batch(7, (2,))
    assert not jax.tree.leaves(pairing)

    @jax.jit
    def both(x0, eps):
        many = jax.vmap(functools.partial(pairing, KEY))(jnp.stack([x0, -x0]), jnp.stack([eps, eps]))
        return many[0], jax.grad(lambda scale: (pairing(KEY, scale * x0, eps) * x0).sum())(1.0)

    got, slope = both(x0, eps)
    chex.assert_trees_all_equal(got, paired(pairing, KEY, x0, eps), strict=True)
    assert float(slope) == 0.0  # a choice has no derivative
