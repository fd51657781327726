"""The Brownian tree: its increments, one path at every step count, transformations."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULES, Diagonal, jitted_sample, mixture
from scipy import stats

import jdiff
from jdiff import grid, solvers
from jdiff.core import keys as core_keys
from jdiff.core.keys import BatchKey, fold, noise_of_step, normal, rows_of


@functools.partial(jax.jit, static_argnames=("shape", "tol"))
def increments(key, times, shape, tol=2.0**-24):
    """W(t_i) - W(t_{i+1}) for each i, (N - 1, *shape)."""
    tree = rows_of(jdiff.BrownianTree(key, tol), shape[0])

    def one(i, t, s):
        return normal(noise_of_step(tree, i, t, s), shape, jnp.float32) * jnp.sqrt(t - s)

    return jax.vmap(one)(jnp.arange(len(times) - 1), times[:-1], times[1:])


@pytest.mark.parametrize("times", [[1.0, 0.6, 0.25, 0.1, 0.0], [0.500011, 0.500001, 0.499991]], ids=["wide", "1e-5"])
def test_increments_are_standard_normal_and_independent(times):
    times = jnp.array(times)
    z = np.asarray(increments(jax.random.key(0), times, (200, 50))) / np.sqrt(-np.diff(times))[:, None, None]
    z = z.reshape(len(z), -1)
    for row in z:
        assert stats.kstest(row, "norm").pvalue > 1e-3
    np.testing.assert_allclose(np.corrcoef(z), np.eye(len(z)), atol=0.05)


def test_neighbours_and_components_are_independent():
    z = np.asarray(increments(jax.random.key(1), jnp.array([0.7, 0.3]), (4, 20_000)))[0]
    np.testing.assert_allclose(np.corrcoef(z), np.eye(4), atol=0.03)


@pytest.mark.slow
def test_increments_add_up():
    """The coarse increments are sums of the fine ones, down to the rounding of W itself."""
    fine = jnp.linspace(1.0, 0.0, 161)
    parts = np.asarray(increments(jax.random.key(2), fine, (3, 5)))
    for n in (40, 20):
        whole = np.asarray(increments(jax.random.key(2), fine[:: 160 // n], (3, 5)))
        np.testing.assert_allclose(whole, parts.reshape(n, -1, 3, 5).sum(1), atol=3e-6)


@pytest.mark.slow
def test_a_part_is_a_stretch_of_the_step():
    tree = rows_of(jdiff.BrownianTree(jax.random.key(3)), 4)
    step = noise_of_step(tree, 0, 0.8, 0.4)
    halves = [normal(core_keys.part(step, *ends, j), (4, 3)) for j, ends in enumerate([(0.8, 0.5), (0.5, 0.4)])]
    whole = normal(step, (4, 3))
    total = np.sqrt(0.3) * halves[0] + np.sqrt(0.1) * halves[1]
    np.testing.assert_allclose(np.sqrt(0.4) * whole, total, atol=1e-6)
    keys = jax.random.split(jax.random.key(4), 4)
    assert (core_keys.part(keys, 0.8, 0.5, 1) == fold(keys, 1)).all()
    plain = fold(step, 1)
    assert plain.shape == (4,) and jnp.issubdtype(plain.dtype, jax.dtypes.prng_key)
    assert abs(np.corrcoef(normal(plain, (4, 3000)).ravel(), normal(step, (4, 3000)).ravel())[0, 1]) < 0.05


def test_beyond_the_path_noise_is_fresh():
    """Past t = 1, and in steps that go up, steps draw as plain keys do: independent and standard."""
    tree = rows_of(jdiff.BrownianTree(jax.random.key(5)), 8)
    draws = []
    for i, (t, s) in enumerate([(1.5, 0.9), (1.5, 0.9), (0.3, 0.8), (0.8, 0.3)]):
        draws.append(np.asarray(normal(noise_of_step(tree, i, t, s), (8, 2000))).ravel())
    np.testing.assert_allclose(np.corrcoef(draws), np.eye(4), atol=0.04)
    np.testing.assert_allclose(np.std(draws, axis=1), 1, atol=0.03)


@pytest.mark.parametrize(
    "name,solver",
    [
        ("vp", solvers.DDIM(1.0)),
        pytest.param("edm", solvers.DDPM(), marks=pytest.mark.slow),
        ("vp", solvers.DPMppSDE()),
    ],  # the last has a noise in mid-step
    ids=["ddim", "ddpm", "sde"],
)
def test_one_path_at_every_step_count(name, solver):
    """Strong convergence: with a tree the difference of successive step counts shrinks; with a key it does not."""
    schedule = SCHEDULES[name]
    denoise = mixture().denoise(schedule)
    x = jdiff.prior(schedule, jax.random.key(0), (64, 2))
    ends = {}
    for kind, key in dict(tree=jdiff.BrownianTree(jax.random.key(1)), key=jax.random.key(1)).items():
        run = lambda n, key=key: jitted_sample()(  # noqa: E731
            solver, denoise, schedule, x, grid.uniform(n + 1, schedule.t_min, size=161), key, n=n + 1
        )
        xs = [np.asarray(run(n)) for n in (20, 40, 80, 160)]
        ends[kind] = [np.sqrt(np.mean((a - b) ** 2)) for a, b in zip(xs, xs[1:], strict=False)]
    assert ends["tree"][2] < 0.75 * ends["tree"][1] < 0.75**2 * ends["tree"][0]
    assert ends["tree"][2] < 0.2 * ends["key"][2]
    assert ends["key"][2] > 0.75 * ends["key"][0]


@pytest.mark.slow
def test_sample_i_depends_on_its_key_alone():
    schedule = jdiff.VP()
    denoise, times = Diagonal(schedule), grid.log_snr(schedule, 6)
    x = jdiff.prior(schedule, jax.random.key(0), (8, 2))
    run = functools.partial(jitted_sample(), solvers.DDPM(), denoise, schedule)
    for key, part in (
        (jax.random.split(jax.random.key(1), 8), jax.random.split(jax.random.key(1), 8)[:3]),
        (BatchKey(jax.random.key(1), jnp.array(0), 8), BatchKey(jax.random.key(1), jnp.array(0), 8)),
    ):
        whole = run(x, times, jdiff.BrownianTree(key))
        np.testing.assert_allclose(run(x[:3], times, jdiff.BrownianTree(part)), whole[:3], atol=1e-5)
        other = run(x, times, jdiff.BrownianTree(fold(key, 1)))
        assert (np.abs(whole - other).max(1) > 1e-3).all()


def test_one_program_for_all_keys_and_no_callback():
    schedule = jdiff.VP()
    denoise, times = Diagonal(schedule), grid.log_snr(schedule, 5)
    x = jnp.ones((2, 2))
    run = jax.jit(chex.assert_max_traces(jdiff.sample, n=1))
    outs = [run(solvers.DDPM(), denoise, schedule, x, times, jdiff.BrownianTree(jax.random.key(i))) for i in range(3)]
    assert np.abs(outs[0] - outs[1]).max() > 1e-2
    program = jax.make_jaxpr(jdiff.sample)(
        solvers.DDPM(), denoise, schedule, x, times, jdiff.BrownianTree(jax.random.key(0))
    )
    assert "callback" not in str(program)
    keys = jax.random.split(jax.random.key(7), 3)
    many = jax.vmap(lambda k: run(solvers.DDPM(), denoise, schedule, x, times, jdiff.BrownianTree(k)))(keys)
    one = run(solvers.DDPM(), denoise, schedule, x, times, jdiff.BrownianTree(keys[1]))
    np.testing.assert_allclose(many[1], one, atol=1e-5)


@pytest.mark.slow
def test_gradients_treat_noise_as_drawn():
    """With respect to times, the normalised increments are constants: as with a key."""
    schedule = jdiff.Flow()
    x = jdiff.prior(schedule, jax.random.key(0), (2, 2))

    @jax.jit
    def f(x, times, eta):
        tree = jdiff.BrownianTree(jax.random.key(1))
        return jdiff.sample(solvers.DDIM(eta), Diagonal(schedule), schedule, x, times, tree).sum()

    grads = jax.grad(f, (0, 1, 2))(x, grid.log_snr(schedule, 6), 0.5)
    assert all(np.isfinite(g).all() for g in jax.tree.leaves(grads))
    h = 1e-2
    numeric = (f(x, grid.log_snr(schedule, 6), 0.5 + h) - f(x, grid.log_snr(schedule, 6), 0.5 - h)) / (2 * h)
    np.testing.assert_allclose(grads[2], numeric, rtol=1e-2)


def test_dtypes_and_errors():
    tree = rows_of(jdiff.BrownianTree(jax.random.key(0)), 2)
    for dtype in (jnp.bfloat16, jnp.float32):
        assert normal(noise_of_step(tree, 0, 0.5, 0.2), (2, 3), dtype).dtype == dtype
    with jax.enable_x64(True):
        assert normal(noise_of_step(tree, 0, 0.5, 0.2), (2, 3), jnp.float64).dtype == jnp.float64
    with pytest.raises(ValueError, match="one key per sample"):
        normal(noise_of_step(tree, 0, 0.5, 0.2), (3, 3))
    with pytest.raises(ValueError, match="tol must be in"):
        jdiff.BrownianTree(jax.random.key(0), 1e-12)
