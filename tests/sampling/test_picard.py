"""Parallel sampling: the sequential result in fewer sweeps, alone and over devices."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULES, Diagonal, jitted_sample, mixture
from jax.sharding import AxisType, NamedSharding, PartitionSpec

import jdiff
from jdiff import grid, solvers

pytestmark = pytest.mark.slow  # many programs to compile

SOLVERS = {"ddim": solvers.DDIM(0.0), "ddpm": solvers.DDPM(), "heun": solvers.Heun()}
parallel = jax.jit(jdiff.sample_parallel, static_argnames=("window", "max_sweeps", "sharding"))


def setup(name="vp", n=26, batch=8):
    """A problem that is not linear to the slopes: their data is centred, and of another variance than this one's."""
    schedule = SCHEDULES[name]
    denoise = Diagonal(schedule)
    x = jdiff.prior(schedule, jax.random.key(0), (batch, 2))
    return denoise, schedule, x, grid.log_snr(schedule, n), jax.random.key(1)


@pytest.mark.parametrize(
    "solver,name",
    [
        ("ddim", "vp"),
        ("ddpm", "flow"),
        ("heun", "edm"),
        pytest.param("ddim", "edm", marks=pytest.mark.slow),
        pytest.param("ddpm", "vp", marks=pytest.mark.slow),
        pytest.param("heun", "flow", marks=pytest.mark.slow),
    ],
)
def test_the_sequential_result_in_fewer_sweeps(solver, name):
    """25 steps: 5 to 7 sweeps at tol = 0.1, 8 to 10 at 1e-3, and the result to a few tol."""
    _, schedule, *rest = setup(name)
    inputs = mixture().denoise(schedule), schedule, *rest
    expected = jitted_sample()(SOLVERS[solver], *inputs)
    sweeps = []
    for tol, error in ((1e-1, 0.1), (1e-3, 2e-3), (0.0, 2e-5)):
        x0, info = parallel(SOLVERS[solver], *inputs, tol=tol)
        np.testing.assert_allclose(x0, expected, atol=error)
        sweeps.append(int(info.sweeps))
        assert info.evaluations == info.sweeps * 25 * (2 if solver == "heun" else 1) + 1
    assert sweeps[0] <= 8 and sweeps[1] <= 11 and sweeps[2] <= 25


def test_linear_problems_take_two_sweeps():
    """Data of N(0, std^2): the slopes are the solver's own, so one sweep is exact and the second finds nothing."""
    schedule = jdiff.VP()
    denoise, x, times = Diagonal(schedule, 0.0, 0.25), jnp.ones((2, 3)), grid.log_snr(schedule, 40)
    for solver in SOLVERS.values():
        x0, info = parallel(solver, denoise, schedule, x, times, jax.random.key(0), std=0.5)
        np.testing.assert_allclose(
            x0, jitted_sample()(solver, denoise, schedule, x, times, jax.random.key(0)), atol=1e-5
        )
        assert info.sweeps <= 2


@pytest.mark.parametrize("solver", SOLVERS)
def test_a_window_of_one_is_sequential(solver):
    inputs = setup("edm", 9)
    x0, info = parallel(SOLVERS[solver], *inputs, window=1)
    assert info.sweeps == 8
    np.testing.assert_allclose(x0, jitted_sample()(SOLVERS[solver], *inputs), atol=2e-6)


@pytest.mark.parametrize("window", [7, 25, *(pytest.param(w, marks=pytest.mark.slow) for w in (2, 100))])
def test_every_window(window):
    inputs = setup()
    x0, info = parallel(solvers.DDPM(), *inputs, window=window)
    np.testing.assert_allclose(x0, jitted_sample()(solvers.DDPM(), *inputs), atol=2e-3)
    assert -(-25 // window) <= info.sweeps <= 25


def test_sweeps_are_bounded():
    """max_sweeps accepts what has not converged: fewer sweeps, a larger error."""
    inputs = setup(n=41)
    expected = jitted_sample()(solvers.DDIM(0.0), *inputs)
    errors = []
    for most in (1, 4, 8):
        x0, info = parallel(solvers.DDIM(0.0), *inputs, tol=0.0, max_sweeps=most)
        assert info.sweeps <= most
        errors.append(np.abs(x0 - expected).max())
    assert errors[2] < errors[1] < errors[0] and errors[2] < 0.05


def test_from_where_there_is_no_signal():
    """Flow from t = 1, where alpha = 0, and a uniform grid."""
    denoise, schedule, x, _, key = setup("flow")
    for solver in SOLVERS.values():
        inputs = solver, denoise, schedule, x, grid.uniform(26), key
        np.testing.assert_allclose(parallel(*inputs)[0], jitted_sample()(*inputs), atol=3e-3)


def test_a_brownian_tree_and_keys_per_sample():
    denoise, schedule, x, times, key = setup(n=13)
    for noise in (jdiff.BrownianTree(key), jax.random.split(key, len(x))):
        inputs = solvers.DDPM(), denoise, schedule, x, times, noise
        np.testing.assert_allclose(parallel(*inputs)[0], jitted_sample()(*inputs), atol=2e-3)


def test_the_window_over_devices():
    """Eight devices, each with an eighth of the window, and a batch that is not divided."""
    denoise, schedule, x, times, key = setup(n=25)
    mesh = jax.make_mesh((8,), ("window",), axis_types=(AxisType.Auto,))
    sharding = NamedSharding(mesh, PartitionSpec("window"))
    alone, few = parallel(solvers.DDPM(), denoise, schedule, x, times, key, window=16)
    spread, many = parallel(solvers.DDPM(), denoise, schedule, x, times, key, window=16, sharding=sharding)
    np.testing.assert_allclose(spread, alone, atol=1e-4)
    assert abs(int(few.sweeps) - int(many.sweeps)) <= 1
    seen = []

    def spy(x, t):
        jax.debug.inspect_array_sharding(x, callback=seen.append)
        return denoise(x, t)

    arguments = solvers.DDIM(0.0), spy, schedule, x, times
    jax.jit(functools.partial(jdiff.sample_parallel, *arguments, window=16, sharding=sharding))()
    assert any(len(place.device_set) == 8 and not place.is_fully_replicated for place in seen)


def test_the_batch_over_devices():
    """pmap over the batch: each device sweeps until its own samples have converged."""
    denoise, schedule, x, times, key = setup(n=13, batch=16)
    keys = jax.random.split(key, 16)
    expected = jitted_sample()(solvers.DDPM(), denoise, schedule, x, times, keys)
    run = jax.pmap(lambda x, keys: jdiff.sample_parallel(solvers.DDPM(), denoise, schedule, x, times, keys, tol=1e-4))
    x0, info = run(x.reshape(8, 2, 2), keys.reshape(8, 2))
    np.testing.assert_allclose(x0.reshape(16, 2), expected, atol=1e-3)
    assert info.sweeps.shape == (8,)


def test_transformations():
    """vmap over eta, forward mode, one program for all numbers."""
    denoise, schedule, x, times, key = setup(n=9, batch=2)
    run = jax.jit(
        lambda eta, x: jdiff.sample_parallel(solvers.DDIM(eta), denoise, schedule, x, times, key, tol=1e-6)[0]
    )
    many = jax.vmap(run, (0, None))(jnp.array([0.0, 0.5]), x)
    for eta, got in zip((0.0, 0.5), many, strict=True):
        np.testing.assert_allclose(got, run(eta, x), atol=1e-5)
    assert run._cache_size() == 1
    tangent = jax.jvp(lambda x: run(0.5, x), (x,), (jnp.ones_like(x),))[1]
    sequential = lambda x: jdiff.sample(solvers.DDIM(0.5), denoise, schedule, x, times, key)  # noqa: E731
    np.testing.assert_allclose(tangent, jax.jvp(sequential, (x,), (jnp.ones_like(x),))[1], atol=1e-5)


def test_errors():
    denoise, schedule, x, times, key = setup(n=9)
    for call, text in (
        (lambda: jdiff.sample_parallel(solvers.DPMpp2M(), denoise, schedule, x, times), "remembers earlier steps"),
        (lambda: jdiff.sample_parallel(solvers.DDPM(), denoise, schedule, x, times), "give a key"),
        (lambda: jdiff.sample_parallel(solvers.Heun(), denoise, schedule, x, times, window=0), "1 step or more"),
        (
            lambda: jdiff.sample_parallel(solvers.Heun(), denoise, schedule, x, times, window=2, max_sweeps=3),
            "give max_sweeps >= 4",
        ),
        (lambda: jdiff.sample_parallel(solvers.Heun(), denoise, schedule, x, times[::-1]), "must descend"),
        (
            lambda: jdiff.sample_parallel(solvers.Heun(), denoise, schedule, jnp.ones(2, int), times),
            "expected floating",
        ),
    ):
        with pytest.raises(ValueError, match=text):
            call()
    x0, info = jdiff.sample_parallel(solvers.Heun(), denoise, schedule, x, times[:1])
    np.testing.assert_allclose(x0, denoise(x, times[0]), rtol=1e-6)
    assert info.sweeps == 0 and info.evaluations == 1
