"""The lattice of equivalences: methods that are one another under some setting, in float64.

One program serves all schedules, and all solvers that differ in numbers alone.
"""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULES, Bent, Diagonal, jitted_sample, one_of

import jdiff
from jdiff import solvers
from jdiff.core.keys import each, fold, normal, part
from jdiff.core.pytrees import noun

KEY = jax.random.key(5)
N = 7


@jax.jit
def start(schedule):
    """(times, x): an uneven grid of a schedule, and states at its first time."""
    times = jdiff.grid.log_snr(schedule, N, t_max=0.9)
    times = times.at[N // 2].set(0.5 * (times[N // 2] + times[N // 2 - 1]))
    return times, jdiff.prior(schedule, jax.random.key(1), (3, 2), 0.9, dtype=jnp.float64)


def run(solver, schedule, x, times):
    """(x_0, all states (N - 1, B, 2)). Noise that a setting takes away is nan if it is asked for."""
    key = KEY if solver.stochastic else None
    return jitted_sample()(solver, Bent(schedule), schedule, x, times, key, path=True)


def trajectory(solver, name):
    times, x = start(one_of(name))
    return run(solver, one_of(name), x, times)[1]


@functools.cache
def reference_trajectory(reference, name):
    return trajectory(REFERENCES[reference], name)


@noun
class FirstPart:
    """`base` with the keys that a composed solver hands to the first of its parts."""

    base: object
    order = 1
    stochastic = True

    def plan(self, *args):
        return self.base.plan(*args)

    def init(self, x):
        return self.base.init(x)

    def step(self, denoise, schedule, x, now, state, key):
        return self.base.step(denoise, schedule, x, now, state, part(key, now.t, now.s, 0))


REFERENCES = {
    "euler": solvers.Euler(),
    "ddpm": solvers.DDPM(),
    "ddpm, keys of a part": FirstPart(solvers.DDPM()),
    "2m": solvers.DPMpp2M(),
    "3m": solvers.DPMpp3M(),
    "2s": solvers.DPMpp2S(),
    "dpm 2": solvers.DPMSolver(2),
    "ab 2": solvers.ExponentialAB(2),
    "ab 3": solvers.ExponentialAB(3),
    "heun": solvers.Heun(),
    "dpm2": solvers.DPM2(),
    "unipc 3": solvers.UniPC(3).replace(low_order_below=0, two_nodes=None),
    "unipc 2 bh1": solvers.UniPC(2, "bh1"),
}
SAME = {
    "euler": {
        "ddim 0": solvers.DDIM(0.0),
        "ddim of gradient estimation": solvers.GradientEstimation(1.0),
        "ab 1": solvers.ExponentialAB(1),
        "ab 1 eps": solvers.ExponentialAB(1, "eps"),
        "dpm 1": solvers.DPMSolver(1),
        "dpm m 1": solvers.DPMSolverM(1),
        "lms 1": solvers.LMS(1),
        "deis 1": solvers.DEIS(1),
        "ipndm 1": solvers.IPNDM(1),
        "unip 1": solvers.UniPC(1).replace(corrector=0),
        "sa 1": solvers.SASolver(1, 0, 0.0),
        "ancestral 0": solvers.Ancestral(solvers.Euler(), 0.0),
        "churn 0": solvers.Churn(solvers.Euler(), 0.0),
        "predictor-corrector": solvers.PredictorCorrector(solvers.Euler(), solvers.Langevin(0.0)),
    },
    "ddpm": {"ddim 1": solvers.DDIM(1.0)},
    "ddpm, keys of a part": {
        "predictor-corrector": solvers.PredictorCorrector(solvers.DDPM(), solvers.Langevin(0.0, 2)),
    },
    "2m": {"2m sde 0": solvers.DPMpp2MSDE(0.0)},
    "3m": {"3m sde 0": solvers.DPMpp3MSDE(0.0)},
    "2s": {"sde 0": solvers.DPMppSDE(0.0), "ancestral 0": solvers.DPMpp2SAncestral(0.0)},
    "dpm 2": {"ancestral 0": solvers.DPM2Ancestral(0.0)},
    "ab 2": {"sa 2": solvers.SASolver(2, 0, 0.0).replace(low_order_below=0)},
    "ab 3": {"sa 3": solvers.SASolver(3, 0, 0.0).replace(low_order_below=0)},
    "unipc 3": {"sa 3": solvers.SASolver(3, 3, 0.0).replace(low_order_below=0)},
    "unipc 2 bh1": {"sa 2": solvers.SASolver(2, 2, 0.0, "bh1")},
    "heun": {
        "edm stochastic 0": solvers.EDMStochastic(0.0),
        "ancestral 0": solvers.Ancestral(solvers.Heun(), 0.0),
        "restart elsewhere": solvers.Restart(solvers.Heun(), 1e-6, 2e-6),
        "predictor-corrector": solvers.PredictorCorrector(solvers.Heun(), solvers.Langevin(0.0)),
    },
}
PAIRS = [(a, b) for a, others in SAME.items() for b in others]


@pytest.mark.parametrize("reference,other", PAIRS)
def test_same(reference, other):
    """On every schedule, all states agree to rounding."""
    with jax.enable_x64(True):
        for schedule in SCHEDULES:
            expected, got = reference_trajectory(reference, schedule), trajectory(SAME[reference][other], schedule)
            chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-9, custom_message=schedule)


def test_a_corrector_may_be_of_higher_order_than_its_predictor():
    """SASolver(1, corrector=2) corrects with the new prediction and two old ones, not with one."""
    with jax.enable_x64(True):
        both = [solvers.SASolver(1, corrector, 0.0).replace(low_order_below=0) for corrector in (1, 2)]
        vp = one_of("vp")
        times, _ = start(vp)
        weights = jax.jit(lambda: [solver.plan(vp, times, N).weights for solver in both])()
    chex.assert_shape(weights, [(N - 1, 1), (N - 1, 2)])
    assert (np.abs(weights[1][3:, 1]) > 0).all()


@pytest.mark.parametrize("solver", ["euler", "heun", "2m", "ab 3", "dpm2"])
def test_vp_is_ve_rescaled(solver):
    """x / alpha of VP is x of VE on one grid of log-SNR, with one network of (x / alpha, sigma / alpha)."""
    with jax.enable_x64(True):
        log_snr, x, ends = jnp.linspace(-6.0, 6.0, N), normal(KEY, (3, 2), jnp.float64), []
        for name in ("vp", "ve"):
            schedule = one_of(name)
            times = jdiff.time_of(schedule, log_snr)
            alpha = schedule.alpha(times)
            x0, xs = run(REFERENCES[solver], schedule, alpha[0] * x, times)
            ends.append((x0, xs / alpha[1:, None, None]))
        chex.assert_trees_all_close(*ends, rtol=1e-8, atol=1e-8)


def test_edm_stochastic_is_algorithm_2():
    """Against the paper's pseudocode in NumPy, line by line, with the same noise.  arXiv:2206.00364, algorithm 2."""
    churn, s_min, s_max, s_noise = 15.0, 0.1, 10.0, 1.007
    with jax.enable_x64(True):
        schedule = jdiff.EDM()
        denoise = Diagonal(schedule)
        times = jnp.linspace(1.0, 0.0, 18)
        sigmas = np.append(np.asarray(schedule.sigma(times)), 0.0)
        x = start = np.asarray(normal(jax.random.key(2), (3, 2), jnp.float64)) * 80.0

        def D(x, sigma):
            return denoise.m + denoise.c / (denoise.c + sigma**2) * (x - denoise.m)

        for i in range(18):
            t, t_next = sigmas[i], sigmas[i + 1]
            gamma = min(churn / 18, 2**0.5 - 1) if s_min <= t <= s_max else 0.0
            eps = s_noise * np.asarray(normal(fold(each(KEY, 3), i), (3, 2), jnp.float64))
            t_hat = t + gamma * t
            x_hat = x + np.sqrt(t_hat**2 - t**2) * eps
            d = (x_hat - D(x_hat, t_hat)) / t_hat
            x = x_hat + (t_next - t_hat) * d
            if t_next != 0:
                d_next = (x - D(x, t_next)) / t_next
                x = x_hat + (t_next - t_hat) * (0.5 * d + 0.5 * d_next)
        got = jitted_sample()(
            solvers.EDMStochastic(churn, s_min, s_max, s_noise), denoise, schedule, jnp.asarray(start), times, KEY
        )
        np.testing.assert_allclose(got, x, rtol=1e-9, atol=1e-10)
