"""Solvers against oracles: order of convergence, exact moments, equivalences."""

import functools
from typing import Any

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, Diagonal, exact_flow, jitted_sample, mixture, one_of

import jdiff
from jdiff import solvers
from jdiff.core.pytrees import noun

DETERMINISTIC = {
    "ddim": solvers.DDIM(0.0),
    "euler": solvers.Euler(),
    "heun": solvers.Heun(),
    "rk4": solvers.RK4(),
    "dpm2": solvers.DPM2(),
    "dpm_solver_3": solvers.DPMSolver(3),
    "dpmpp_2s": solvers.DPMpp2S(),
    "euler_maruyama_0": solvers.EulerMaruyama(0.0),
    "churn_0": solvers.EDMStochastic(0.0),
    "ancestral_0": solvers.DPM2Ancestral(0.0),
    "gradient_estimation": solvers.GradientEstimation(),
    "lms_4": solvers.LMS(),
    "lms_4_single": solvers.LMS(start="single_step"),
    "pndm": solvers.PNDM(),
    "pndm_trapezoid": solvers.PNDM("trapezoid"),
    "ipndm": solvers.IPNDM(),
    "deis_3": solvers.DEIS(),
    "deis_3_single": solvers.DEIS(start="single_step"),
    "deis_log_rho_3_single": solvers.DEIS(3, "log_rho", "single_step"),
    "exponential_x0_4_single": solvers.ExponentialAB(4, "x0", "single_step"),
    "exponential_eps_5_single": solvers.ExponentialAB(5, "eps", "single_step"),
    "exponential_x0_6_single": solvers.ExponentialAB(6, "x0", "single_step"),
    "dpm_solver_m_2": solvers.DPMSolverM(),
    "dpmpp_2m": solvers.DPMpp2M(),
    "dpmpp_2m_single": solvers.DPMpp2M("single_step"),
    "dpmpp_3m": solvers.DPMpp3M(),
    "dpmpp_3m_single": solvers.DPMpp3M("single_step"),
    "unipc_2": solvers.UniPC(),
    "unipc_2_bh1": solvers.UniPC(2, "bh1"),
    "unipc_3_eps": solvers.UniPC(3, prediction="eps"),
    "unipc_3_single": solvers.UniPC(3, start="single_step"),
    "sa_solver_0": solvers.SASolver(tau=0.0),
}
LOW_ORDER_START = {"lms_4", "deis_3", "dpmpp_3m"}  # second order is what such a start allows
STOCHASTIC = {
    "ddpm": solvers.DDPM(),
    "ddpm_large": solvers.DDPM("large"),
    "ddim_half": solvers.DDIM(0.5),
    "euler_maruyama": solvers.EulerMaruyama(),
    "euler_maruyama_half": solvers.EulerMaruyama(0.5),
    "dpmpp_sde": solvers.DPMppSDE(),
    "dpmpp_sde_half": solvers.DPMppSDE(0.5),
    "dpmpp_2m_sde": solvers.DPMpp2MSDE(),
    "dpmpp_3m_sde_half": solvers.DPMpp3MSDE(0.5),
    "sa_solver": solvers.SASolver(),
    "dpm2_ancestral": solvers.DPM2Ancestral(),
    "dpmpp_2s_ancestral_half": solvers.DPMpp2SAncestral(0.5),
}
# these on all schedules always, one of each kind; the others in the slow tests
QUICK = {"ddim", "heun", "pndm", "dpmpp_3m_single", "unipc_3_eps", "ddpm", "dpmpp_2m_sde"}


def pairs(names):
    """(solver, schedule), all of them; a solver's schedules one after another, as they share its program."""
    return [
        pytest.param(name, schedule, marks=() if name in QUICK else pytest.mark.slow)
        for name in names
        for schedule in SCHEDULES
    ]


@functools.cache
def exact_end(name):
    """(denoiser, noise at 0.7, its exact image at 0.05) of the mixture under a schedule, in float64."""
    schedule = one_of(name)
    denoise = mixture().denoise(schedule)
    x = jnp.asarray(float(SCHEDULES[name].sigma(0.7)) * np.random.default_rng(0).normal(size=(16, 2)))
    return denoise, x, exact_flow(schedule, denoise, x, 0.7, 0.05)


@functools.partial(jax.jit, static_argnames="most")
def run_to(solver, denoise, schedule, x, steps, most):
    """The state at 0.05 after `steps` steps, even in log-SNR, from 0.7: one program for every count up to `most`."""
    ends = jdiff.log_snr(schedule, jnp.array([0.7, 0.05]))
    u = jnp.minimum(jnp.arange(most + 1) / steps, 1)
    times = jdiff.time_of(schedule, ends[0] + u * (ends[1] - ends[0]))
    return jdiff.sample(solver, denoise, schedule, x, times, n=steps + 1, path=True)[1][-1]


@pytest.mark.parametrize("solver,schedule", pairs(DETERMINISTIC))
def test_order_of_convergence(schedule, solver):
    """log error falls with log steps at least at the nominal order - 0.2, against the exact probability-flow map."""
    with jax.enable_x64(True):
        denoise, x, truth = exact_end(schedule)
        order = 2 if solver in LOW_ORDER_START else DETERMINISTIC[solver].order
        # a polynomial in sigma/alpha sees a grid that is even in log-SNR as very uneven: it settles late
        counts = np.array([128, 256, 512] if "lms" in solver else [32, 64, 128])
        errors = []
        for steps in counts:
            end = run_to(DETERMINISTIC[solver], denoise, one_of(schedule), x, int(steps), int(counts[-1]))
            errors.append(np.sqrt(np.mean((np.asarray(end) - truth) ** 2)))
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert slope > order - 0.2, (slope, errors)


COMPOSED = {
    "churn": solvers.EDMStochastic(),
    "restart": solvers.Restart(solvers.DPMpp2M(), low=0.1, high=1.0),
    "predictor_corrector": solvers.PredictorCorrector(solvers.UniPC()),
    "annealed_langevin": solvers.AnnealedLangevin(steps=3),
}
ALL = DETERMINISTIC | STOCHASTIC | COMPOSED


class Recording(jdiff.Denoise):
    """A denoiser that keeps its predictions in the order in which it made them."""

    def __init__(self, base):
        self.base, self.schedule, self.predictions = base, base.schedule, []

    def predict(self, x, t):
        self.predictions.append(self.base.predict(x, t))
        return self.predictions[-1]


@pytest.mark.parametrize("name", ALL)
def test_step_returns_its_first_prediction(name):
    """The very arrays of the first prediction: the step is traced only, and each evaluation makes new ones."""
    solver, times, recording = ALL[name], jnp.array([0.7, 0.4, 0.2]), Recording(Diagonal(jdiff.VP()))

    def step(x, keys):
        plan, state = solver.plan(recording.schedule, times, len(times)), solver.init(x)
        now = solvers.Now(0, times[0], times[1], jax.tree.map(lambda a: a[0], plan))
        x_s, new_state, prediction = solver.step(recording, recording.schedule, x, now, state, keys)
        first, *later = recording.predictions
        assert prediction.x0 is first.x0 and prediction.eps is first.eps
        assert all(prediction.x0 is not other.x0 for other in later)
        chex.assert_equal_shape([x, x_s, *prediction[:2]])
        chex.assert_trees_all_equal_shapes_and_dtypes(state, new_state)
        return x_s, prediction

    jax.eval_shape(step, jnp.ones((4, 3)), jax.random.split(jax.random.key(0), 4))


@noun
class Replay:
    """Noise given beforehand in place of a key, z (rows, draws): each fold or part j starts j draws further on."""

    z: Any

    def normal(self, shape, dtype):
        return self.z[:, :1].astype(dtype)

    def fold(self, j):
        return Replay(jnp.roll(self.z, -j, axis=1))

    def part(self, t, s, j):
        return self.fold(j)


@functools.partial(jax.jit, static_argnames=("most", "draws"))
def moments(solver, schedule, steps, most, draws):
    """(mean, variance) of x at t_min for data N(0.3, 0.4): exact, since x is affine in the start and in every draw.

    Its derivatives by all of them are the coefficients, and variances add up: no Monte Carlo. One program for every
    count of steps up to `most`.
    """
    denoise = Diagonal(schedule)
    times = jdiff.grid.log_snr(schedule, steps + 1, size=most + 1)
    plan = solver.plan(schedule, times, steps + 1)

    def end(x, z):
        def body(carry, now):
            now, z = now

            def step():
                return solver.step(denoise, schedule, carry[0], now, carry[1], Replay(z[None]))[:2]

            return jax.lax.cond(now.i < steps, step, lambda: carry), None

        x = x[None, None]
        now = solvers.Now(jnp.arange(most), times[:-1], times[1:], plan)
        return jax.lax.scan(body, (x, solver.init(x)), (now, z))[0][0][0, 0]

    (a, s), z = (schedule.alpha(times), schedule.sigma(times)), jnp.zeros((most, draws))
    value, (of_x, of_z) = jax.value_and_grad(end, (0, 1))(a[0] * 0.3, z)
    variance = of_x**2 * (a[0] ** 2 * 0.4 + s[0] ** 2) + (of_z**2).sum()
    return abs(value - a[-1] * 0.3), abs(variance / (a[-1] ** 2 * 0.4 + s[-1] ** 2) - 1)


@pytest.mark.parametrize("solver,schedule", pairs(STOCHASTIC))
def test_moments_of_gaussian_data(schedule, solver):
    """Mean and variance of what a stochastic solver makes tend to the data's own, at least at first order."""
    with jax.enable_x64(True):
        counts = (100, 200, 400)
        errors = [max(moments(STOCHASTIC[solver], one_of(schedule), steps, 400, 2)) for steps in counts]
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert slope > STOCHASTIC[solver].order - 0.2, (slope, errors)


@pytest.mark.parametrize("churn", [5.0, 40.0])
def test_churn_keeps_the_marginals(churn):
    """With gamma = churn / N, whatever the churn, the variance tends to the data's."""
    with jax.enable_x64(True):
        counts = (100, 200, 400)
        solver = solvers.EDMStochastic(churn, 0.0, 1e9, 1.0)
        errors = [float(moments(solver, jdiff.EDM(), steps, 400, 1)[1]) for steps in counts]
        assert errors[2] < 0.6 * errors[1] < 0.4 * errors[0] and errors[2] < 0.02, errors


@pytest.mark.parametrize("snr,steps", [(0.05, 1), (0.16, 1), (0.16, 3), (0.4, 1)])
def test_langevin_corrector_keeps_the_marginals(snr, steps):
    """Between predictor steps, up to the bias snr^2 per unit of variance that unadjusted Langevin has."""
    with jax.enable_x64(True):
        solver = solvers.PredictorCorrector(solvers.DDPM(), solvers.Langevin(snr, steps))
        mean, variance = moments(solver, jdiff.VP(), 400, 400, steps + 1)
        assert mean < 0.01 and variance < snr**2 * steps + 0.02, (mean, variance)


def test_annealed_langevin_reaches_the_marginals():
    """The more and the smaller the steps at each level, the nearer."""
    with jax.enable_x64(True):
        errors = [
            max(moments(solvers.AnnealedLangevin(size, steps), jdiff.VE(), 40, 40, steps))
            for size, steps in ((0.4, 8), (0.2, 40), (0.1, 160))
        ]
        assert errors[2] < 0.5 * errors[1] < 0.25 * errors[0] and errors[2] < 0.05, errors


def test_restart_keeps_the_marginals():
    """Going up with fresh noise and down again changes nothing of a Gaussian but the rounding of Heun's steps."""
    with jax.enable_x64(True):
        solver = solvers.Restart(solvers.Heun(), 0.1, 2.0, rounds=3, steps=30)
        mean, variance = moments(solver, jdiff.EDM(), 100, 100, 4)
        assert mean < 1e-3 and variance < 1e-2, (mean, variance)


@functools.partial(jax.jit, static_argnums=1)
def smooth_times(schedule, n, start=0.7, end=0.05):
    """A grid that is smooth in log-SNR, between two times well inside the domain."""
    ends = jdiff.log_snr(schedule, jnp.array([start, end]))
    return jdiff.time_of(schedule, jnp.linspace(ends[0], ends[1], n))


def test_ddim_eta_1_is_ddpm():
    """Same key, same numbers: DDIM(1) is ancestral sampling."""
    schedule = jdiff.discrete(jdiff.betas.linear(100))
    denoise, times = Diagonal(schedule), jdiff.grid.discrete(100, 100)
    x = np.random.default_rng(0).normal(size=(8, 2)).astype(np.float32)
    a = jitted_sample()(solvers.DDIM(1.0), denoise, schedule, x, times, jax.random.key(1))
    b = jitted_sample()(solvers.DDPM(), denoise, schedule, x, times, jax.random.key(1))
    chex.assert_trees_all_close(a, b, atol=1e-6, strict=True)


@pytest.mark.parametrize("name", ["small", "large", "learned"])
def test_ddpm_is_ho_posterior(name):
    """One step from knot k has the mean and variance of Ho et al., in terms of beta and alpha_bar in float64."""
    T = 50
    betas = jdiff.betas.linear(T)
    bar = np.cumprod(1 - betas)
    schedule = jdiff.discrete(betas)
    x, x0, learned = np.random.default_rng(0).uniform(-1, 1, (3, 4, 3)).astype(np.float32)

    class Fixed(jdiff.Denoise):
        def predict(self, x, t):
            return jdiff.Prediction(x0, jdiff.eps_from(schedule, x0, x, t), learned)

    keys = jax.random.split(jax.random.key(3), 4)
    z = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)

    @jax.jit
    def step(times):
        solver = solvers.DDPM(name)
        now = solvers.Now(0, times[0], times[1], jax.tree.map(lambda a: a[0], solver.plan(schedule, times, 2)))
        return solver.step(Fixed(), schedule, x, now, (), keys)[0]

    for k in (2, 17, 50):  # Ho's index, 1-based
        out = step(jnp.array([k / T, (k - 1) / T]))
        b, ab, ab1 = betas[k - 1], bar[k - 1], bar[k - 2]
        mean = np.sqrt(ab1) * b / (1 - ab) * x0 + np.sqrt(1 - b) * (1 - ab1) / (1 - ab) * x
        small, large = (1 - ab1) / (1 - ab) * b, b
        v = {"small": 0, "large": 1, "learned": (np.asarray(learned) + 1) / 2}[name]
        std = np.exp(0.5 * (v * np.log(large) + (1 - v) * np.log(small)))
        np.testing.assert_allclose(out, mean + std * z, rtol=1e-4, atol=2e-5)


@jax.jit
def euler_in_sigma(denoise, schedule, x, times):
    """With h = x/alpha and r = sigma/alpha, the step is h + (r_s - r_t) (h - x0) / r_t."""

    def step(hat, ends):
        t, s = ends
        ratio = [schedule.sigma(u) / schedule.alpha(u) for u in ends]
        hat = hat + (ratio[1] - ratio[0]) * (hat - denoise(hat * schedule.alpha(t), t)) / ratio[0]
        return hat, hat * schedule.alpha(s)

    return jax.lax.scan(step, x / schedule.alpha(times[0]), (times[:-1], times[1:]))[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_is_euler_in_sigma(schedule):
    with jax.enable_x64(True):
        schedule = one_of(schedule)
        denoise = mixture().denoise(schedule)
        times = smooth_times(schedule, 12)
        x = jdiff.prior(schedule, jax.random.key(0), (4, 2), times[0], dtype=jnp.float64)
        expected = euler_in_sigma(denoise, schedule, x, times)
        for solver in (solvers.Euler(), solvers.DDIM(0.0)):
            _, path = jitted_sample()(solver, denoise, schedule, x, times, path=True)
            chex.assert_trees_all_close(path, expected, rtol=1e-10, atol=1e-12)


def test_heun_is_edm_algorithm_1():
    """On EDM's own grid, Heun and the last denoise are Karras' algorithm 1 down to sigma = 0."""
    with jax.enable_x64(True):
        schedule = jdiff.EDM()
        denoise = mixture().denoise(schedule)
        D = jax.jit(lambda x, t: denoise(x, t))
        times = jdiff.grid.uniform(18, 0.0)
        sigmas = np.append(np.asarray(schedule.sigma(times)), 0.0)
        x = start = 80.0 * jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
        for i in range(18):
            d = (x - D(x, times[i])) / sigmas[i]
            y = x + (sigmas[i + 1] - sigmas[i]) * d
            if i < 17:
                d = 0.5 * (d + (y - D(y, times[i + 1])) / sigmas[i + 1])
                y = x + (sigmas[i + 1] - sigmas[i]) * d
            x = y
        out = jitted_sample()(solvers.Heun(), denoise, schedule, start, times)
        np.testing.assert_allclose(out, x, rtol=1e-9, atol=1e-10)


def test_heun_from_pure_noise_on_flow_is_heun_in_t():
    """The first step, from alpha = 0, is the textbook trapezoid on the velocity."""
    with jax.enable_x64(True):
        schedule = jdiff.Flow()
        denoise = mixture().denoise(schedule)
        times = jnp.array([1.0, 0.8])
        x = jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
        velocity = jdiff.sde.probability_flow(denoise, schedule)
        v0 = velocity(x, times[0])
        y = x - 0.2 * v0
        expected = x - 0.1 * (v0 + velocity(y, times[1]))
        _, path = jitted_sample()(solvers.Heun(), denoise, schedule, x, times, path=True)
        np.testing.assert_allclose(path[0], expected, rtol=1e-10)


KINDS = {
    "ddpm": 120, "ddim_half": 120, "heun": 40, "rk4": 20, "dpm_solver_3": 20, "unipc_3_eps": 40, "lms_4": 40,
    "deis_3_single": 40, "dpmpp_3m_sde_half": 120, "dpm2_ancestral": 120, "euler_maruyama": 400,
}  # fmt: skip


@functools.partial(jax.jit, static_argnames="n")
def draw(solver, schedule, n):
    x = jdiff.prior(schedule, jax.random.key(0), (8192, 1))
    return jdiff.sample(solver, Diagonal(schedule), schedule, x, jdiff.grid.log_snr(schedule, n), jax.random.key(1))


@pytest.mark.slow
@pytest.mark.parametrize("solver", KINDS)
@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_starts_and_ends_anywhere(solver, schedule):
    """From t_max (where alpha may be 0) to t_min, by every kind of step: finite, and the right mean and variance."""
    out = draw((DETERMINISTIC | STOCHASTIC)[solver], one_of(schedule, MORE_SCHEDULES), KINDS[solver])
    schedule = MORE_SCHEDULES[schedule]
    last = schedule.sigma(jnp.asarray(schedule.t_min)) / schedule.alpha(jnp.asarray(schedule.t_min))
    variance = 0.4**2 / (0.4 + float(last) ** 2)  # E[x_0 | x_t] lacks the posterior's spread
    np.testing.assert_allclose(out.mean(), 0.3, atol=0.03)
    np.testing.assert_allclose(out.var(), variance, atol=0.06)  # DDPM on sub-VP lacks 9% at 120 steps


@pytest.mark.slow
@pytest.mark.parametrize("solver", [solvers.DDIM(), solvers.Heun(), solvers.DPMpp2M()], ids=["ddim", "heun", "2m"])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_inversion(solver, schedule):
    """Up and down again comes back at the solver's order, and up agrees with the exact map."""
    with jax.enable_x64(True):
        schedule, order = one_of(schedule), 1 if isinstance(solver, solvers.DDIM) else 2
        denoise, x = Diagonal(schedule), jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
        data = jdiff.oracle.Gaussian(jnp.full(2, 0.3), 0.4 * jnp.eye(2))
        errors, exact = [], []
        for n in (33, 65):
            times = smooth_times(schedule, n)
            noise = jax.jit(jdiff.invert)(solver, denoise, schedule, x, times)
            _, path = jitted_sample()(solver, denoise, schedule, noise, times, path=True)
            errors.append(float(jnp.abs(path[-1] - x).max()))
            exact.append(float(jnp.abs(noise - data.flow(schedule, x, times[-1], times[0])).max()))
        assert errors[1] < errors[0] / 2 ** (order - 0.3), errors
        assert exact[1] < exact[0] / 2 ** (order - 0.3), exact


def test_a_stochastic_solver_has_no_inverse():
    schedule = jdiff.VP()
    with pytest.raises(ValueError, match="has no inverse"):
        jdiff.invert(solvers.DDPM(), Diagonal(schedule), schedule, jnp.zeros((1, 2)), jnp.array([0.9, 0.1]))


def test_learned_variance_needs_a_learned_variance():
    schedule = jdiff.Cosine()
    with pytest.raises(ValueError, match="learned_variance=True"):
        jdiff.sample(
            solvers.DDPM("learned"), mixture().denoise(schedule), schedule, jnp.zeros((1, 2)),
            jdiff.grid.uniform(3), jax.random.key(0),
        )  # fmt: skip


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: solvers.DDIM(-1.0), "DDIM: eta must be"),
        (lambda: solvers.DDPM("medium"), "unknown variance of DDPM 'medium'"),
        (lambda: solvers.LMS(0), "LMS: order must be a whole number, 1 or more; got 0"),
        (lambda: solvers.DEIS(2.5), "DEIS: order must be a whole number"),
        (lambda: solvers.DEIS(coordinate="sigma"), "one of t, log_rho"),
        (lambda: solvers.DPMSolver(4), "DPMSolver: order must be a whole number, 1 to 3; got 4"),
        (lambda: solvers.IPNDM(5), "1 to 4"),
        (lambda: solvers.UniPC(2, "bh3"), "one of bh1, bh2"),
        (lambda: solvers.UniPC(2, prediction="v"), "one of x0, eps"),
        (lambda: solvers.UniPC(2, start="warm"), "one of low_order, single_step"),
        (lambda: solvers.PNDM("heun"), "one of runge_kutta, trapezoid"),
        (lambda: solvers.DPMppSDE(-0.5), "eta must be 0 or more"),
        (lambda: solvers.EDMStochastic(-1.0), "churn must be 0 or more"),
        (lambda: solvers.Churn(solvers.DPMpp2M()), "Multistep cannot step between free times"),
        (lambda: solvers.Ancestral(solvers.DPMppSDE()), "draws noise of its own"),
        (lambda: solvers.Langevin(norms="mean"), "one of expected, sample, batch"),
        (lambda: solvers.Restart(low=0.5, high=0.1), "low must be below high or equal to it"),
    ],
)
def test_bad_settings(make, message):
    with pytest.raises(ValueError, match=message):
        make()
