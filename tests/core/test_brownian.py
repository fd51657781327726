"""The Brownian tree: its increments, one path at every step count, transformations."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULES, Diagonal
from scipy import stats

import jdiff
from jdiff import grid, solvers
from jdiff.core import keys as core_keys
from jdiff.core.keys import BatchKey, fold, noise_of_step, normal, rows_of

ROWS, COLUMNS = 4, 2500


@functools.partial(jax.jit, static_argnames=("shape",))
def draws(key, t, s, shape=(ROWS, COLUMNS)):
    """The noise of steps i = 0, 1, ... from t to s (N,): (N, *shape)."""
    tree = rows_of(jdiff.BrownianTree(key), shape[0])
    return jax.lax.map(lambda step: normal(noise_of_step(tree, *step), shape), (jnp.arange(len(t)), t, s))


def steps(*times):
    times = np.float32(times)
    return times[:-1], times[1:]


@pytest.mark.parametrize("times", [[1.0, 0.6, 0.25, 0.1, 0.0], np.linspace(0.50002, 0.49998, 5)], ids=["wide", "1e-5"])
def test_increments_are_standard_normal_and_independent(times):
    """Of steps, of rows and of neighbouring columns."""
    z = np.asarray(draws(jax.random.key(0), *steps(*times)))
    for row in z.reshape(4, -1):
        assert stats.kstest(row, "norm").pvalue > 1e-3
    columns = np.stack([z[..., :-1].ravel(), z[..., 1:].ravel()])
    for independent in (z.reshape(4, -1), z.transpose(1, 0, 2).reshape(ROWS, -1), columns):
        np.testing.assert_allclose(np.corrcoef(independent), np.eye(len(independent)), atol=0.05)


def test_beyond_the_path_noise_is_fresh():
    """Past t = 1, and in steps that go up, steps draw as plain keys do: independent and standard."""
    z = draws(jax.random.key(5), np.float32([1.5, 1.5, 0.3, 0.8]), np.float32([0.9, 0.9, 0.8, 0.3])).reshape(4, -1)
    np.testing.assert_allclose(np.corrcoef(z), np.eye(4), atol=0.05)
    np.testing.assert_allclose(np.std(z, axis=1), 1, atol=0.03)


def test_increments_add_up():
    """The coarse increments are sums of the fine ones, down to the rounding of W itself."""

    def increments(times):
        t, s = steps(*times)
        copies = 160 // len(t)  # the same steps several times: one program
        z = draws(jax.random.key(2), np.tile(t, copies), np.tile(s, copies), shape=(3, 5))[: len(t)]
        return np.asarray(z) * np.sqrt(t - s)[:, None, None]

    fine = np.linspace(1.0, 0.0, 161)
    parts = increments(fine)
    for n in (40, 20):
        np.testing.assert_allclose(increments(fine[:: 160 // n]), parts.reshape(n, -1, 3, 5).sum(1), atol=3e-6)


def test_rows_draw_by_their_position_in_the_global_batch():
    key = jax.random.key(1)
    t, s = steps(0.9, 0.5, 0.2)
    whole = np.asarray(draws(key, t, s, shape=(8, 3)))
    slices = [draws(BatchKey(key, start, 8), t, s, shape=(4, 3)) for start in (0, 4)]
    np.testing.assert_allclose(np.concatenate(slices, 1), whole, atol=1e-6)


def test_a_part_is_a_stretch_of_the_step():
    @jax.jit
    def noises(key):
        step = noise_of_step(rows_of(jdiff.BrownianTree(key), 4), 0, 0.8, 0.4)
        plain = fold(step, 1)
        ends = jnp.array([[0.8, 0.5], [0.5, 0.4]])
        parts = jax.lax.map(lambda ends: normal(core_keys.part(step, *ends, 0), (4, 3000)), ends)
        return normal(step, (4, 3000)), parts, plain, normal(plain, (4, 3000))

    whole, parts, plain, fresh = noises(jax.random.key(3))
    total = np.sqrt(0.3) * parts[0] + np.sqrt(0.1) * parts[1]
    np.testing.assert_allclose(np.sqrt(0.4) * whole, total, atol=1e-6)
    keys = jax.random.split(jax.random.key(4), 4)
    assert (core_keys.part(keys, 0.8, 0.5, 1) == fold(keys, 1)).all()
    assert plain.shape == (4,) and jnp.issubdtype(plain.dtype, jax.dtypes.prng_key)
    assert abs(np.corrcoef(np.ravel(fresh), np.ravel(whole))[0, 1]) < 0.05


VP, EDM = SCHEDULES["vp"], SCHEDULES["edm"]


@pytest.mark.parametrize(
    "schedule,solver",
    [(VP, solvers.DDIM(1.0)), (EDM, solvers.DDPM()), (VP, solvers.DPMppSDE())],  # the last has a noise in mid-step
    ids=["ddim", "ddpm", "sde"],
)
def test_one_path_at_every_step_count(schedule, solver):
    """Strong convergence: with a tree the difference of successive step counts shrinks; with a key it does not."""
    x = jdiff.prior(schedule, jax.random.key(0), (64, 2))

    @jax.jit
    def run(key, n):
        times = grid.uniform(n + 1, schedule.t_min, size=161)
        return jdiff.sample(solver, Diagonal(schedule), schedule, x, times, key, n=n + 1)

    def differences(key):
        ends = [np.asarray(run(key, n)) for n in (20, 40, 80, 160)]
        return [np.sqrt(np.mean((a - b) ** 2)) for a, b in itertools.pairwise(ends)]

    tree = differences(jdiff.BrownianTree(jax.random.key(1)))
    assert tree[2] < 0.75 * tree[1] < 0.75**2 * tree[0]
    if isinstance(solver, solvers.DDIM):
        key = differences(jax.random.key(1))
        assert tree[2] < 0.2 * key[2] and key[2] > 0.75 * key[0]


def test_sample_i_depends_on_its_key_alone():
    """One program for all keys, without a call back to Python."""
    x, times = jdiff.prior(VP, jax.random.key(0), (8, 2)), grid.log_snr(VP, 6)

    def sample(x, keys):
        return jdiff.sample(solvers.DDPM(), Diagonal(VP), VP, x, times, jdiff.BrownianTree(keys))

    run = jax.jit(chex.assert_max_traces(sample, n=2))  # one trace for each size of the batch
    keys = jax.random.split(jax.random.key(1), 8)
    whole = run(x, keys)
    np.testing.assert_allclose(run(x[:3], keys[:3]), whole[:3], atol=1e-5)
    other = run(x, jax.random.split(jax.random.key(2), 8))
    assert (np.abs(whole - other).max(1) > 1e-3).all()
    one_by_one = jax.jit(jax.vmap(lambda x, key: sample(x[None], key[None])[0]))
    assert "callback" not in one_by_one.lower(x, keys).as_text()
    many = one_by_one(x, keys)
    np.testing.assert_allclose(many, whole, atol=1e-5)


def test_gradients_treat_noise_as_drawn():
    """With respect to times, the normalised increments are constants: as with a key."""
    schedule = jdiff.Flow()
    x, times = jdiff.prior(schedule, jax.random.key(0), (2, 2)), grid.log_snr(schedule, 6)

    @jax.jit
    @functools.partial(jax.value_and_grad, argnums=(0, 1, 2))
    def total(x, times, eta):
        tree = jdiff.BrownianTree(jax.random.key(1))
        return jdiff.sample(solvers.DDIM(eta), Diagonal(schedule), schedule, x, times, tree).sum()

    _, gradients = total(x, times, 0.5)
    chex.assert_tree_all_finite(gradients)
    h = 1e-2
    numeric = (total(x, times, 0.5 + h)[0] - total(x, times, 0.5 - h)[0]) / (2 * h)
    np.testing.assert_allclose(gradients[2], numeric, rtol=1e-2)


def test_dtypes_and_errors():
    tree = rows_of(jdiff.BrownianTree(jax.random.key(0)), 2)

    def dtype_of(dtype):
        return jax.eval_shape(lambda: normal(noise_of_step(tree, 0, 0.5, 0.2), (2, 3), dtype)).dtype

    assert dtype_of(jnp.bfloat16) == jnp.bfloat16 and dtype_of(jnp.float32) == jnp.float32
    with jax.enable_x64(True):
        assert dtype_of(jnp.float64) == jnp.float64
    with pytest.raises(ValueError, match="one key per sample"):
        normal(noise_of_step(tree, 0, 0.5, 0.2), (3, 3))
    with pytest.raises(ValueError, match="tol must be in"):
        jdiff.BrownianTree(jax.random.key(0), 1e-12)
