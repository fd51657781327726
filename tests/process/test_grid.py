"""Grids: closed forms, traced n, clipping, and learning the times."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, mixture, one_of
from scipy import stats

import jdiff
from jdiff import config, grid, solvers
from jdiff.core.arrays import as_time
from jdiff.process.times import LOWEST_LOG_SNR, check_times

# Sabour et al. 2024, table for Stable Diffusion 1.5: a list as users paste it, its final 0 dropped
ALIGNED = [14.615, 6.475, 3.861, 2.697, 1.886, 1.396, 0.963, 0.652, 0.399, 0.152, 0.029]


POLYEXPONENTIAL, BETA = (jax.jit(f, static_argnums=1) for f in (grid.polyexponential, grid.beta))


def ratio(schedule, times):
    return np.asarray(schedule.sigma(times) / schedule.alpha(times))


@jax.jit
def of_schedule(schedule):
    return {
        "exponential": grid.exponential(schedule, 20),
        "polyexponential of 1": grid.polyexponential(schedule, 20),
        "polyexponential of 2": grid.polyexponential(schedule, 20, 2.0),
        "beta": grid.beta(schedule, 20),
    }


def test_exponential_is_uniform_in_log_sigma():
    times = grid.exponential(jdiff.VE(0.02, 50.0), 9)
    np.testing.assert_allclose(ratio(jdiff.VE(0.02, 50.0), times), np.geomspace(50.0, 0.02, 9), rtol=2e-5)


@pytest.mark.parametrize("rho", [0.5, 1.0, 2.0])
def test_polyexponential_is_its_formula(rho):
    schedule = jdiff.VE(0.001, 200.0)
    times = POLYEXPONENTIAL(schedule, 11, rho, 0.02, 50.0)
    ramp = np.linspace(1, 0, 11) ** rho
    expected = np.exp(ramp * (np.log(50.0) - np.log(0.02)) + np.log(0.02))
    np.testing.assert_allclose(ratio(schedule, times), expected, rtol=2e-5)


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_polyexponential_of_1_is_exponential(schedule):
    grids = of_schedule(one_of(schedule, MORE_SCHEDULES))
    chex.assert_trees_all_close(grids["polyexponential of 1"], grids["exponential"], rtol=2e-4, atol=1e-6)


@pytest.mark.parametrize("a,b", [(0.6, 0.6), (1.0, 1.0), (2.0, 0.5), (0.3, 3.0)])
def test_beta_has_scipys_quantiles(a, b):
    times = BETA(jdiff.VE(), 21, a, b)
    np.testing.assert_allclose(times, stats.beta.ppf(np.linspace(1, 0, 21), a, b), atol=4e-6)
    with jax.enable_x64(True):
        times = BETA(jdiff.VE(), 21, a, b)
        np.testing.assert_allclose(times, stats.beta.ppf(np.linspace(1, 0, 21), a, b), atol=1e-12)


def test_beta_has_its_derivatives():
    with jax.enable_x64(True):
        f = functools.partial(grid.beta, jdiff.Flow(), 7)
        quantiles = lambda ends: stats.beta.ppf(np.linspace(1, 0, 7), *ends)  # noqa: E731
        for argument in (0, 1):
            exact = np.asarray(jax.jit(jax.jacfwd(f, argument))(0.6, 0.8))
            ends = [np.array([0.6, 0.8]) for _ in range(2)]
            ends[0][argument] += 1e-5
            ends[1][argument] -= 1e-5
            numeric = (quantiles(ends[0]) - quantiles(ends[1])) / 2e-5
            np.testing.assert_allclose(exact, 0.999 * numeric, atol=1e-7)


def test_shift_is_the_shifted_schedule():
    """Shifting a grid of Flow is what `Shifted(Flow())` does to the clock; inverse shifts cancel."""
    times = grid.uniform(9)
    shifted = grid.shift(times, 3.0)
    np.testing.assert_allclose(shifted, jdiff.Shifted(jdiff.Flow(), 3.0).sigma(times), rtol=1e-6)
    np.testing.assert_allclose(grid.shift(shifted, 1 / 3), times, rtol=1e-6)
    np.testing.assert_allclose(ratio(jdiff.Flow(), shifted[1:]), 3 * ratio(jdiff.Flow(), times[1:]), rtol=1e-5)


@jax.jit
def ratios_of_sigmas(schedule):
    grids = grid.of_sigmas(schedule, ALIGNED), grid.of_sigmas(schedule, ALIGNED, 25)
    return [schedule.sigma(times) / schedule.alpha(times) for times in grids]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_of_sigmas_has_those_sigmas(schedule):
    own, finer = ratios_of_sigmas(one_of(schedule))
    np.testing.assert_allclose(own, ALIGNED, rtol=1e-4)
    ends = np.linspace(0, 1, 25), np.linspace(0, 1, len(ALIGNED))
    np.testing.assert_allclose(finer, np.exp(np.interp(*ends, np.log(ALIGNED))), rtol=1e-4)


def test_of_sigmas_clips_its_ends():
    """The list of a scaled linear table that rounds its sigma_max up; infinity where alpha = 0."""
    table = jdiff.discrete(jdiff.betas.scaled_linear(1000))
    times = grid.of_sigmas(table, [15.0, *ALIGNED[1:]])
    assert times[0] == 1.0 and (np.diff(times) < 0).all()
    assert float(grid.of_sigmas(jdiff.Flow(), [np.inf, 1.0])[0]) == 1.0
    clipped = grid.polyexponential(jdiff.VE(), 5, sigma_min=1e-4, sigma_max=1e4)
    np.testing.assert_allclose(clipped, np.linspace(1, 0, 5), atol=1e-6)


GRIDS = {
    "exponential": lambda n, size: grid.exponential(jdiff.Flow(), n, size=size),
    "polyexponential": lambda n, size: grid.polyexponential(jdiff.VP(), n, 2.0, size=size),
    "beta": lambda n, size: grid.beta(jdiff.Cosine(), n, size=size),
    "shift": lambda n, size: grid.shift(grid.uniform(n, size=size), 3.0),
    "of_sigmas": lambda n, size: grid.of_sigmas(jdiff.EDM(), ALIGNED, n, size=size),
}


@pytest.mark.parametrize("name", GRIDS)
def test_a_traced_n_repeats_the_tail(name):
    traced = jax.jit(chex.assert_max_traces(lambda n: GRIDS[name](n, 12), n=1))
    for n, short in jax.jit(lambda: {size: GRIDS[name](size, None) for size in (2, 7, 12)})().items():
        padded = traced(n)
        np.testing.assert_allclose(padded[:n], short, rtol=1e-5, atol=1e-6)
        np.testing.assert_allclose(padded[n:], np.full(12 - n, short[-1]), rtol=1e-5)


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_grids_stay_in_the_domain(schedule):
    own = MORE_SCHEDULES[schedule]
    for name, times in of_schedule(one_of(schedule, MORE_SCHEDULES)).items():
        assert (np.diff(times) < 0).all(), name
        np.testing.assert_allclose([times[0], times[-1]], [own.t_max, own.t_min], rtol=1e-6, err_msg=name)
    check_times(own, grid.uniform(20, own.t_min, own.t_max))  # in float32, 1 + (t_min - 1) is below t_min


def test_every_grid_of_a_config_can_be_sampled_on():
    table = jdiff.discrete(jdiff.betas.linear(100))
    for name in config.GRIDS:
        args = dict(sigmas=[9.0, 1.0, 0.1]) if name == "sigmas" else {}
        _, times = config.build_sampler(config.Sample(grid=config.Named(name, args), steps=7), table)
        assert times.shape == (7,)
        check_times(table, times)


def test_errors():
    for call, text in (
        (lambda: grid.beta(jdiff.Flow(), 5, 0.0), "must be positive"),
        (lambda: grid.beta(jdiff.Flow(), 5, t_min=0.0), "times must satisfy"),
        (lambda: grid.shift(grid.uniform(5), -1.0), "must be positive"),
        (lambda: grid.log_snr(jdiff.VP(), 5, lowest=30.0), "lowest must be below"),
        (lambda: grid.log_snr(jdiff.VP(), 5, lowest=float("nan")), "lowest must be below"),
        (lambda: grid.of_sigmas(jdiff.EDM(), [10.0, 1.0, 0.0]), "drop a final 0"),
        (lambda: grid.of_sigmas(jdiff.EDM(), [10.0, 10.0, 1.0]), "must descend"),
        (lambda: grid.of_sigmas(jdiff.EDM(), [300.0, 200.0, 1.0]), "leaves the schedule's sigma/alpha, 0.002 to 80"),
        (lambda: grid.of_sigmas(jdiff.EDM(), [[1.0]]), "expected"),
        (lambda: grid.polyexponential(jdiff.VE(), 5, sigma_min=60.0), "leaves no range"),
        (lambda: grid.optimize(lambda t: t[:2], jdiff.VE(), grid.uniform(4), jnp.zeros(3)), "truth has"),
        (lambda: grid.optimize(lambda t: t, jdiff.VE(), jnp.array([0.1, 0.5]), jnp.zeros(2)), "descend"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


def test_optimize_finds_the_closed_form():
    """run = log-SNR of the times: the loss is 0 where truth says, and the ends do not move."""
    schedule = jdiff.VP()
    truth = jdiff.log_snr(schedule, jnp.array([1.0, 0.9, 0.3, 0.05, 0.001]))
    start = grid.log_snr(schedule, 5)
    times, losses = grid.optimize(lambda t: jdiff.log_snr(schedule, t), schedule, start, truth, steps=400)
    np.testing.assert_allclose(times, [1.0, 0.9, 0.3, 0.05, 0.001], rtol=2e-2)
    assert losses.shape == (400,) and losses.min() < 1e-3 * losses[0]
    assert times[0] == start[0] and times[-1] == start[-1]


@pytest.mark.slow
@pytest.mark.parametrize("name,solver,gain", [("vp", solvers.DDIM(0.0), 1.3), ("flow", solvers.Heun(), 3.0)])
def test_optimized_times_are_better_on_new_noise(name, solver, gain):
    """5 steps with learned times against the best of three fixed grids, on noise that was not trained on."""
    schedule = SCHEDULES[name]
    denoise = mixture().denoise(schedule)
    noise = [jdiff.prior(schedule, jax.random.key(i), (256, 2)) for i in range(2)]
    exact = jax.jit(lambda x: jdiff.sample(solvers.Heun(), denoise, schedule, x, grid.log_snr(schedule, 100)))
    truth = [exact(x) for x in noise]

    def run(times, x=noise[0]):
        return jdiff.sample(solver, denoise, schedule, x, times)

    @jax.jit
    def error(times):
        return jnp.sqrt(jnp.mean((run(times, noise[1]) - truth[1]) ** 2))

    fixed = [error(f(schedule, 6)) for f in (grid.log_snr, grid.karras, grid.beta)]
    times, _ = grid.optimize(run, schedule, grid.karras(schedule, 6), truth[0])
    assert error(times) * gain < min(fixed)


# ---------------------------------------------------------------- where a schedule has no signal left

SILENT = {
    "cosine table": jdiff.discrete(jdiff.betas.cosine(1000)),
    "zero terminal SNR": jdiff.discrete(jdiff.betas.zero_terminal_snr(jdiff.betas.linear(1000))),
    "of 50": jdiff.discrete(jdiff.betas.zero_terminal_snr(jdiff.betas.linear(50))),
}
STARTS = MORE_SCHEDULES | SILENT


@jax.jit
def spaced_grids(schedule, t_max):
    """Of the ends and of four grids: the log-SNR there. Also the grids' first times, and alpha at t_max."""
    grids = (
        grid.log_snr(schedule, 20),
        grid.log_snr(schedule, 20, lowest=-18.0),
        grid.polyexponential(schedule, 20),
        grid.karras(schedule, 20, sigma_max=np.exp(9.0)),  # log-SNR -18
    )
    at = [jdiff.log_snr(schedule, times) for times in (jnp.stack([t_max, as_time(schedule.t_min)]), *grids)]
    return at, [times[0] for times in grids], schedule.alpha(t_max)


@pytest.mark.parametrize("name", STARTS)
def test_spacing_starts_at_the_lowest_useful_log_snr(name):
    """Evenly from max(own log-SNR at t_max, -10), on every schedule; the user can ask for more."""
    with jax.enable_x64(True):
        out = spaced_grids(one_of(name, STARTS), np.float32(1.0))
    (ends, *grids, wide), first, alpha = jax.tree.map(np.asarray, out)
    for log_snr, t, lowest in zip(grids, first, (LOWEST_LOG_SNR, -18.0, LOWEST_LOG_SNR), strict=False):
        spaced = np.linspace(max(ends[0], lowest), ends[1], 20)
        np.testing.assert_allclose(log_snr[1:], spaced[1:], rtol=1e-4, atol=1e-4)
        nearly_silent = alpha > 0 and ends[0] < lowest - 1
        assert (t < STARTS[name].t_max) == nearly_silent
        if nearly_silent:
            np.testing.assert_allclose(log_snr[0], lowest, rtol=1e-4)
    np.testing.assert_allclose(wide[0], max(ends[0], -18.0), rtol=1e-4)


@jax.jit
def moments(schedule):
    """Of samples of N(1, 1/4), on each grid."""
    denoise = jdiff.oracle.Gaussian([1.0], [[0.25]]).denoise(schedule)
    builds = grid.karras, grid.log_snr, grid.polyexponential, grid.beta
    grids = {build.__name__: build(schedule, 20) for build in builds}

    def of_grid(times):
        x = jdiff.prior(schedule, jax.random.key(0), (2048, 1), times[0])
        x0 = jdiff.sample(solvers.Heun(), denoise, schedule, x, times)
        return x0.mean(), x0.std()

    found = jax.lax.map(of_grid, jnp.stack(list(grids.values())))
    return dict(zip(grids, zip(*found, strict=True), strict=True))


@pytest.mark.parametrize("name", SILENT)
def test_samples_on_tables_that_end_without_signal(name):
    """N(1, 1/4) from 20 times: the standard deviation was 5.62 where grids began at log-SNR -40."""
    for build, (mean, std) in moments(one_of(name, SILENT)).items():
        assert abs(mean - 1) < 0.03 and abs(std - 0.5) < 0.03, (build, mean, std)


def test_optimize_starts_from_any_times():
    """Also from times whose second lies below the lowest useful log-SNR: finite, descending, and no worse."""
    schedule = SILENT["cosine table"]
    times = jnp.array([1.0, 0.9985, 0.5, 0.01])
    assert jdiff.log_snr(schedule, times[1]) < LOWEST_LOG_SNR
    learnt, losses = grid.optimize(lambda t: t, schedule, times, jnp.array([1.0, 0.9, 0.4, 0.01]), steps=50)
    assert (np.diff(learnt) < 0).all() and np.isfinite(losses).all() and losses.min() < losses[0]
