"""The lattice of equivalences: methods that are one another under some setting, in float64."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULES, Diagonal, jitted_sample

import jdiff
from jdiff import solvers
from jdiff.arrays import each, fold, normal, noun
from jdiff.forward import rates
from jdiff.solvers import polynomial

KEY = jax.random.key(5)
N = 9


@noun
class Bent:
    """A denoiser that is not affine: every method sees its curvature."""

    schedule: jdiff.schedules.Schedule

    def __call__(self, x, t):
        alpha, sigma = rates(self.schedule, t, x)
        return jnp.tanh(alpha * x / (alpha**2 * 0.3 + sigma**2))

    def predict(self, x, t):
        x0 = self(x, t)
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t))


def trajectory(solver, schedule, key=KEY, n=N):
    """All states and the end, (n, B, 2), on an uneven grid."""
    times = jdiff.grid.log_snr(schedule, n, t_max=0.9)
    times = times.at[n // 2].set(0.5 * (times[n // 2] + times[n // 2 - 1]))
    x = jdiff.prior(schedule, jax.random.key(1), (3, 2), 0.9, dtype=jnp.float64)
    x0, xs = jitted_sample()(solver, Bent(schedule), schedule, x, times, key, path=True, checkpoint=False)
    return np.concatenate([np.asarray(xs), np.asarray(x0)[None]])


@functools.cache
def cached(name, schedule):
    return trajectory(REFERENCES[name], SCHEDULES[schedule])


def multistep(nodes, rule=polynomial.DATA, **settings):
    return solvers.Multistep(None, nodes, rule, **settings)


REFERENCES = {
    "euler": solvers.Euler(),
    "ddpm": solvers.DDPM(),
    "ddim half": solvers.DDIM(0.5),
    "2m": solvers.DPMpp2M(),
    "3m": solvers.DPMpp3M(),
    "2s": solvers.DPMpp2S(),
    "dpm 2": solvers.DPMSolver(2),
    "ab 2": solvers.ExponentialAB(2),
    "ab 3": solvers.ExponentialAB(3),
    "heun": solvers.Heun(),
    "dpm2": solvers.DPM2(),
    "unipc 3": solvers.UniPC(3).replace(few=0, two_nodes=None),
    "unipc 2 bh1": solvers.UniPC(2, "bh1"),
}
SAME = {
    "euler": {
        "ddim 0": solvers.DDIM(0.0),
        "ddim of gradient estimation": solvers.GradientEstimation(1.0),
        "euler ancestral 0": solvers.EulerAncestral(0.0),
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
    "ddpm": {
        "ddim 1": solvers.DDIM(1.0),
        "predictor-corrector": solvers.PredictorCorrector(solvers.DDPM(), solvers.Langevin(0.0, 2)),
    },
    "ddim half": {"euler ancestral": solvers.EulerAncestral(0.5)},
    "2m": {
        "2m sde 0": solvers.DPMpp2MSDE(0.0),
        "unip 2 bh2": solvers.UniPC(2).replace(corrector=0),
        "sa 2": solvers.SASolver(2, 0, 0.0).replace(two_nodes=polynomial.midpoint),
    },
    "3m": {"3m sde 0": solvers.DPMpp3MSDE(0.0)},
    "2s": {"sde 0": solvers.DPMppSDE(0.0), "ancestral 0": solvers.DPMpp2SAncestral(0.0)},
    "dpm 2": {"dpm2": solvers.DPM2(), "ancestral 0": solvers.DPM2Ancestral(0.0)},
    "ab 2": {
        "sa 2": solvers.SASolver(2, 0, 0.0).replace(few=0),
        "bare": multistep(2, few=0),
    },
    "ab 3": {
        "unip 3": solvers.UniPC(3).replace(corrector=0, few=0, two_nodes=None),
        "sa 3": solvers.SASolver(3, 0, 0.0).replace(few=0),
        "3m": solvers.DPMpp3M().replace(few=0, two_nodes=None),
    },
    "unipc 3": {"sa 3": solvers.SASolver(3, 3, 0.0).replace(few=0)},
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
    """One schedule each, by turns; times, states and end agree to rounding."""
    schedule = list(SCHEDULES)[PAIRS.index((reference, other)) % len(SCHEDULES)]
    with jax.enable_x64(True):
        a, b = cached(reference, schedule), trajectory(SAME[reference][other], SCHEDULES[schedule])
        np.testing.assert_allclose(b, a, rtol=1e-9, atol=1e-9)


@pytest.mark.slow
def test_a_corrector_may_be_of_higher_order_than_its_predictor():
    """SASolver(1, corrector=2) corrects with the new prediction and two old ones, not with one."""
    schedule = jdiff.VP()
    times = jdiff.grid.log_snr(schedule, 20)
    pulls = [solvers.SASolver(1, corrector, 0.0).plan(schedule, times, 20).pulls for corrector in (1, 2)]
    assert pulls[0].shape[1] == 1 and pulls[1].shape[1] == 2
    assert (abs(pulls[1][3:, 1]) > 0).all()


@pytest.mark.parametrize("solver", ["euler", "heun", "2m", "ab 3", "dpm2"])
def test_vp_is_ve_rescaled(solver):
    """x / alpha of VP is x of VE on one grid of log-SNR, with one network of (x / alpha, sigma / alpha)."""
    with jax.enable_x64(True):
        log_snr = jnp.linspace(-6.0, 6.0, N)
        x, ends = jdiff.arrays.normal(KEY, (3, 2), jnp.float64), []
        for schedule in (jdiff.VP(), jdiff.VE(0.01, 50.0)):
            times = jdiff.time_of(schedule, log_snr)
            alpha = schedule.alpha(times)
            x0, xs = jitted_sample()(REFERENCES[solver], Bent(schedule), schedule, alpha[0] * x, times, path=True)
            ends.append((x0, xs / alpha[1:, None, None]))
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-8, atol=1e-8), *ends)


class Time:
    """Shows the network x and t themselves."""

    def __call__(self, schedule, x, t):
        return x, jnp.broadcast_to(t, x.shape[:1])


jax.tree_util.register_static(Time)


def test_targets_are_one_for_a_multistep_solver():
    """x0-, eps-, v-, score- and velocity-networks of one function take DPM-Solver++ 2M along one path."""
    with jax.enable_x64(True):
        schedule = SCHEDULES["flow"]
        oracle = Diagonal(schedule)
        times = jdiff.grid.log_snr(schedule, N, t_max=0.9)
        x = jdiff.prior(schedule, KEY, (3, 2), 0.9, dtype=jnp.float64)
        expected = jitted_sample()(solvers.DPMpp2M(), oracle, schedule, x, times, path=True, checkpoint=False)
        for target in (jdiff.targets.X0(), jdiff.targets.Eps(), jdiff.targets.V(), jdiff.targets.Score(),
                       jdiff.targets.Velocity()):  # fmt: skip

            def apply(params, x, t, cond, target=target):
                x0, eps, _ = oracle.predict(x, t)
                return jdiff.targets.aim(schedule, target, x0, eps, t)

            denoise = jdiff.denoiser(apply, (), schedule, target, conditioning=Time())
            got = jitted_sample()(solvers.DPMpp2M(), denoise, schedule, x, times, path=True, checkpoint=False)
            jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-7, atol=1e-8), got, expected)


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
