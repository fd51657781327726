"""Solvers inside solvers: no noise is drawn twice, and no prediction of another path is used."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Diagonal

import jdiff
from jdiff import grid, solvers
from jdiff.config import SOLVERS
from jdiff.core import keys as core_keys

SCHEDULE = jdiff.EDM()
TIMES = grid.karras(SCHEDULE, 12)
X = jdiff.prior(SCHEDULE, jax.random.key(0), (8, 1))


# ---------------------------------------------------------------- noise


class Recording:
    """A key that reports each draw to `drawn`, as the numbers of the keys that it was made with."""

    def __init__(self, keys, drawn):
        self.keys, self.drawn = keys, drawn

    def fold(self, data):
        return Recording(core_keys.fold(self.keys, data), self.drawn)

    def part(self, t, s, j):
        return self.fold(j)

    def normal(self, shape, dtype):
        jax.debug.callback(lambda data: self.drawn.append(data.tobytes()), jax.random.key_data(self.keys))
        return jnp.ones(shape, dtype)


STOCHASTIC = {
    "ddpm": solvers.DDPM(),
    "dpmpp_sde": solvers.DPMppSDE(),
    "dpmpp_2m_sde": solvers.DPMpp2MSDE(),
    "churn": solvers.EDMStochastic(s_min=0.0),
    "ancestral": solvers.DPM2Ancestral(),
    "langevin": solvers.AnnealedLangevin(steps=3),
}
AROUND = {
    "restart": functools.partial(solvers.Restart, low=0.3, high=1.0, rounds=3, steps=1),
    "corrector": lambda base: solvers.PredictorCorrector(base, solvers.Langevin(0.1, steps=2)),
}
OWN_DRAWS = {"restart": 3, "corrector": 2}
BASE_DRAWS = {"dpmpp_sde": 2, "langevin": 3}


@pytest.mark.parametrize("outer", AROUND)
@pytest.mark.parametrize("inner", [None, *AROUND])
def test_no_noise_is_drawn_twice(inner, outer):
    """Every base in one or two others, one step across the restart's level: all draws have keys of their own."""
    times = jnp.array([SCHEDULE.time_at(1.0, 0.6), SCHEDULE.time_at(1.0, 0.2)])
    drawn = {name: [] for name in STOCHASTIC}

    @jax.jit
    def step(x, keys):
        for name, base in STOCHASTIC.items():
            solver = AROUND[outer](base if inner is None else AROUND[inner](base))
            now = solvers.Now(0, times[0], times[1], jax.tree.map(lambda a: a[0], solver.plan(SCHEDULE, times, 2)))
            solver.step(Diagonal(SCHEDULE), SCHEDULE, x, now, solver.init(x), Recording(keys, drawn[name]))

    step(X[:2], jax.random.split(jax.random.key(1), 2))
    jax.effects_barrier()
    for name, keys in drawn.items():
        expected = OWN_DRAWS[outer] + OWN_DRAWS.get(inner, 0) + BASE_DRAWS.get(name, 1)
        assert (len(keys), len(set(keys))) == (expected, expected), name


def test_nested_restarts_have_the_variance_of_independent_noise():
    """At one level of data of variance 0: x is noise alone, and what each solver adds of it is known."""
    schedule, low, high = jdiff.VE(0.01, 50.0), 1.0, 2.0
    denoise = Diagonal(schedule, m=0.0, c=0.0)
    times = jnp.array([schedule.time_at(1.0, 1.5), schedule.time_at(1.0, 0.8)])
    solver = solvers.DDIM(0.0)
    for _ in range(2):
        solver = solvers.Restart(solver, low, high, rounds=1, steps=1)
    x = 1.5 * jax.random.normal(jax.random.key(0), (40_000, 1))
    out = jax.jit(lambda x: jdiff.sample(solver, denoise, schedule, x, times, jax.random.key(1), path=True)[1][-1])(x)
    down = 0.8 / high  # Heun's step is exact here: with x_0 = 0 it scales x by the ratio of the noise levels
    variance = 0.8**2
    for _ in range(2):
        variance = (variance + high**2 - 0.8**2) * down**2
    np.testing.assert_allclose(np.var(out), variance, rtol=0.03)


# ---------------------------------------------------------------- history

REMEMBERING = {
    "dpmpp_2m": solvers.DPMpp2M(),
    "unipc_3": solvers.UniPC(3),
    "sa_solver": solvers.SASolver(tau=0.0),
    "lms_4": solvers.LMS(),
    "exponential_3_single": solvers.ExponentialAB(3, start="single_step"),
    "pndm": solvers.PNDM(),
    "gradient_estimation": solvers.GradientEstimation(),
}


def bend(x, t):
    """A denoiser for equivalences: cheap, and not linear."""
    return jnp.tanh(x)


def two_modes():
    return jdiff.oracle.GaussianMixture([0.5, 0.5], [[-1.0], [1.0]], [[[0.01]], [[0.01]]]).denoise(SCHEDULE)


def test_restart_over_multistep_reaches_the_modes():
    """The share of samples within four standard deviations of a mode; it was a half with the old path's history."""

    @jax.jit
    def share(key):
        x = jdiff.prior(SCHEDULE, key, (512, 1))
        x0 = jdiff.sample(
            solvers.Restart(solvers.DPMpp2M(), low=0.3, high=2.0), two_modes(), SCHEDULE, x, TIMES, jax.random.key(1)
        )
        return (jnp.abs(jnp.abs(x0) - 1) < 0.4).mean()

    assert share(jax.random.key(2)) > 0.97


@pytest.mark.parametrize("name", REMEMBERING)
def test_a_break_begins_a_new_path(name):
    """From the break on, the coefficients of all steps are those of a grid that begins there."""
    solver, broken = REMEMBERING[name], 5
    if isinstance(solver, solvers.Multistep):
        solver = solver.replace(low_order_below=0)  # fewer steps follow the break than the grid has

    @jax.jit
    def plans(times):
        whole = solver.plan(SCHEDULE, times, len(times), jnp.arange(len(times) - 1) == broken)
        after = times[broken:]
        return jax.tree.map(lambda a: a[broken:], whole), solver.plan(SCHEDULE, after, len(after))

    with jax.enable_x64(True):
        chex.assert_trees_all_close(*plans(np.float64(TIMES)), rtol=1e-9, atol=1e-9, strict=True)


WITH_MEMORY = {
    name: solver
    for name, solver in {name: make() for name, make in SOLVERS.items()}.items()
    if jax.tree.leaves(jax.eval_shape(solver.init, X[:2]))
} | REMEMBERING


@pytest.mark.parametrize("name", WITH_MEMORY)
def test_after_a_break_nothing_is_read_from_before(name):
    """Three steps from a break, and from the start: the states before, whatever they are, change no number."""
    solver, x = WITH_MEMORY[name], X[:2]
    shape = jax.tree.leaves(jax.eval_shape(solver.init, x))
    states = [[jax.random.normal(jax.random.key(i), leaf.shape) for leaf in shape] for i in range(2)]
    structure = jax.tree.structure(jax.eval_shape(solver.init, x))

    @jax.jit
    def run(states):
        plan = solver.plan(SCHEDULE, TIMES, len(TIMES), jnp.arange(len(TIMES) - 1) == 5)
        ends = []
        for begin in (0, 5):
            state, y = jax.tree.unflatten(structure, states), x
            for i in range(begin, begin + 3):
                now = solvers.Now(i, TIMES[i], TIMES[i + 1], jax.tree.map(lambda a, i=i: a[i], plan))
                keys = jax.random.split(jax.random.key(i), 2)
                y, state, _ = solver.step(jdiff.as_denoise(bend, SCHEDULE), SCHEDULE, y, now, state, keys)
            ends.append(y)
        return ends

    chex.assert_trees_all_equal(run(states[0]), run(states[1]))


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc_3", "gradient_estimation"])
def test_a_restart_begins_a_new_path(name):
    """From the restart on, samples are those of the base alone, started where the restart ended."""
    base = REMEMBERING[name]
    if isinstance(base, solvers.Multistep):
        base = base.replace(low_order_below=0)
    solver = solvers.Restart(base, low=1.0, high=3.0, rounds=1, steps=2)
    crossing = int(np.argmax(np.asarray(SCHEDULE.sigma(TIMES)) <= 1.0))
    assert 3 < crossing < len(TIMES) - 3

    @jax.jit
    def both(x):
        x0, path = jdiff.sample(solver, bend, SCHEDULE, x, TIMES, jax.random.key(1), path=True, checkpoint=False)
        return x0, jdiff.sample(base, bend, SCHEDULE, path[crossing - 1], TIMES[crossing:], checkpoint=False)

    chex.assert_trees_all_close(*both(X), rtol=2e-5, atol=2e-5)


@pytest.mark.parametrize("name", ["dpmpp_2m", "unipc_3", "lms_4", "gradient_estimation"])
def test_a_predictor_after_a_corrector_begins_anew(name):
    """Its steps are first steps: those of DDIM, whatever the method."""
    solver = solvers.PredictorCorrector(REMEMBERING[name], solvers.Langevin(0.1))

    @jax.jit
    def plans(times):
        first_order, weights, *_ = solver.plan(SCHEDULE, times, len(times))
        return weights, first_order, solvers.DDIM(0.0).plan(SCHEDULE, times, len(times))

    with jax.enable_x64(True):
        weights, first_order, ddim = plans(np.float64(TIMES))
    np.testing.assert_array_equal(weights, 0)
    chex.assert_trees_all_close(first_order, ddim, rtol=1e-9, strict=True)
