"""Solvers against oracles: order of convergence, exact moments, equivalences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, Diagonal, exact_flow, jitted_sample, mixture

import jdiff
from jdiff import solvers

DETERMINISTIC = {"ddim": solvers.DDIM(0.0), "euler": solvers.Euler(), "heun": solvers.Heun()}
STOCHASTIC = {"ddpm": solvers.DDPM(), "ddpm_large": solvers.DDPM("large"), "ddim_half": solvers.DDIM(0.5)}


def smooth_times(schedule, n, start=0.7, end=0.05):
    """A grid that is smooth in log-SNR, between two times well inside the domain."""
    ends = jdiff.log_snr(schedule, jnp.array([start, end]))
    return jdiff.time_of(schedule, jnp.linspace(ends[0], ends[1], n))


@pytest.mark.parametrize("solver", DETERMINISTIC)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_order_of_convergence(schedule, solver):
    """log error falls with log steps at least at the nominal order - 0.2, against the exact probability-flow map."""
    with jax.enable_x64(True):
        schedule, solver = SCHEDULES[schedule], DETERMINISTIC[solver]
        denoise = mixture().denoise(schedule)
        x = jdiff.prior(schedule, jax.random.key(0), (16, 2), 0.7, dtype=jnp.float64)
        truth = exact_flow(schedule, denoise, x, 0.7, 0.05)
        counts, errors = np.array([32, 64, 128]), []
        for n in counts:
            times = smooth_times(schedule, n + 1)
            _, path = jitted_sample()(solver, denoise, schedule, x, times, path=True)
            errors.append(np.sqrt(np.mean((np.asarray(path[-1]) - truth) ** 2)))
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert slope > solver.order - 0.2, (slope, errors)


@pytest.mark.parametrize("solver", [*DETERMINISTIC, *STOCHASTIC])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moments_of_gaussian_data(schedule, solver):
    """For Gaussian data a step is affine in (x, z): its moments propagate exactly, and tend to the marginal's.

    With z1, z2 the noises of two keys, a step is A x + b + c z; A, b and c follow from three calls: no Monte Carlo.
    """
    with jax.enable_x64(True):
        schedule, solver = SCHEDULES[schedule], (DETERMINISTIC | STOCHASTIC)[solver]
        denoise = Diagonal(schedule)  # data N(0.3, 0.4)
        keys = jax.random.split(jax.random.key(1), 2)
        z = jax.vmap(lambda k: jax.random.normal(k, (1,), jnp.float64)[0])(keys)

        @jax.jit
        def moments(times):
            n = len(times)
            plan = solver.plan(schedule, times, n)

            def body(carry, now):
                mean, variance = carry
                key = jnp.stack([keys[0], keys[0], keys[1]])
                out = solver.step(denoise, schedule, jnp.array([[0.0], [1.0], [0.0]]), now, (), key)[0][:, 0]
                c = (out[0] - out[2]) / (z[0] - z[1])
                b, A = out[0] - c * z[0], out[1] - out[0]
                return (A * mean + b, A**2 * variance + c**2), None

            a, s = schedule.alpha(times), schedule.sigma(times)
            start = (a[0] * 0.3, a[0] ** 2 * 0.4 + s[0] ** 2)
            steps = solvers.Now(jnp.arange(n - 1), times[:-1], times[1:], plan)
            (mean, variance), _ = jax.lax.scan(body, start, steps)
            return abs(mean - a[-1] * 0.3), abs(variance - a[-1] ** 2 * 0.4 - s[-1] ** 2)

        counts = (100, 200, 400)
        errors = np.array([moments(jdiff.grid.log_snr(schedule, n)) for n in counts]).max(1)
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert slope > solver.order - 0.2, (slope, errors)


def test_ddim_eta_1_is_ddpm():
    """Same key, same numbers: DDIM(1) is ancestral sampling."""
    schedule = jdiff.discrete(jdiff.betas.linear(100))
    denoise, times = mixture().denoise(schedule), jdiff.grid.discrete(100, 100)
    x = jdiff.prior(schedule, jax.random.key(0), (8, 2))
    a = jdiff.sample(solvers.DDIM(1.0), denoise, schedule, x, times, jax.random.key(1))
    b = jdiff.sample(solvers.DDPM(), denoise, schedule, x, times, jax.random.key(1))
    np.testing.assert_allclose(a, b, atol=1e-6)


@pytest.mark.parametrize("name", ["small", "large", "learned"])
def test_ddpm_is_ho_posterior(name):
    """One step from knot k has the mean and variance of Ho et al., in terms of beta and alpha_bar in float64."""
    T = 50
    betas = jdiff.betas.linear(T)
    bar = np.cumprod(1 - betas)
    schedule = jdiff.discrete(betas)
    x = jax.random.normal(jax.random.key(0), (4, 3))
    x0 = 0.3 * jax.random.normal(jax.random.key(1), (4, 3))
    learned = jax.random.uniform(jax.random.key(2), (4, 3), minval=-1.0, maxval=1.0)

    class Fixed:
        def predict(self, x, t):
            return jdiff.Prediction(x0, jdiff.eps_from(schedule, x0, x, t), learned)

    for k in (2, 17, 50):  # Ho's index, 1-based
        times = jnp.array([k / T, (k - 1) / T])
        solver = solvers.DDPM(name)
        now = solvers.Now(0, times[0], times[1], jax.tree.map(lambda a: a[0], solver.plan(schedule, times, 2)))
        keys = jax.random.split(jax.random.key(3), 4)
        out, _ = solver.step(Fixed(), schedule, x, now, (), keys)
        z = jax.vmap(lambda k: jax.random.normal(k, (3,)))(keys)
        b, ab, ab1 = betas[k - 1], bar[k - 1], bar[k - 2]
        mean = np.sqrt(ab1) * b / (1 - ab) * x0 + np.sqrt(1 - b) * (1 - ab1) / (1 - ab) * x
        small, large = (1 - ab1) / (1 - ab) * b, b
        v = {"small": 0, "large": 1, "learned": (np.asarray(learned) + 1) / 2}[name]
        std = np.exp(0.5 * (v * np.log(large) + (1 - v) * np.log(small)))
        np.testing.assert_allclose(out, mean + std * z, rtol=1e-4, atol=2e-5)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_euler_is_euler_in_sigma(schedule):
    """With h = x/alpha and r = sigma/alpha, the step is h + (r_s - r_t) (h - x0) / r_t."""
    with jax.enable_x64(True):
        schedule = SCHEDULES[schedule]
        denoise = mixture().denoise(schedule)
        times = smooth_times(schedule, 12)
        x = jdiff.prior(schedule, jax.random.key(0), (4, 2), times[0], dtype=jnp.float64)
        hat, expected = x / schedule.alpha(times[0]), []
        for t, s in zip(times[:-1], times[1:], strict=True):
            ratio = [schedule.sigma(u) / schedule.alpha(u) for u in (t, s)]
            x0 = denoise(hat * schedule.alpha(t), t)
            hat = hat + (ratio[1] - ratio[0]) * (hat - x0) / ratio[0]
            expected.append(hat * schedule.alpha(s))
        for solver in (solvers.Euler(), solvers.DDIM(0.0)):
            _, path = jdiff.sample(solver, denoise, schedule, x, times, path=True)
            np.testing.assert_allclose(path, jnp.stack(expected), rtol=1e-10, atol=1e-12)


def test_heun_is_edm_algorithm_1():
    """On EDM's own grid, Heun and the last denoise are Karras' algorithm 1 down to sigma = 0."""
    with jax.enable_x64(True):
        schedule = jdiff.EDM()
        denoise = mixture().denoise(schedule)
        times = jdiff.grid.uniform(18, 0.0)
        sigmas = np.append(np.asarray(schedule.sigma(times)), 0.0)
        x = start = 80.0 * jax.random.normal(jax.random.key(0), (4, 2), jnp.float64)
        for i in range(18):
            d = (x - denoise(x, times[i])) / sigmas[i]
            y = x + (sigmas[i + 1] - sigmas[i]) * d
            if i < 17:
                d = 0.5 * (d + (y - denoise(y, times[i + 1])) / sigmas[i + 1])
                y = x + (sigmas[i + 1] - sigmas[i]) * d
            x = y
        out = jdiff.sample(solvers.Heun(), denoise, schedule, start, times)
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
        _, path = jdiff.sample(solvers.Heun(), denoise, schedule, x, times, path=True)
        np.testing.assert_allclose(path[0], expected, rtol=1e-10)


@pytest.mark.parametrize("solver", [*DETERMINISTIC, *STOCHASTIC])
@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_starts_and_ends_anywhere(schedule, solver):
    """From t_max (where alpha may be 0) to t_min: finite, and the right mean and covariance within sampling error."""
    schedule, solver = MORE_SCHEDULES[schedule], (DETERMINISTIC | STOCHASTIC)[solver]
    n = 120 if solver.order == 1 else 40
    x = jdiff.prior(schedule, jax.random.key(0), (8192, 1))
    times = jdiff.grid.log_snr(schedule, n)
    out = jitted_sample()(solver, Diagonal(schedule), schedule, x, times, jax.random.key(1))
    last = float(schedule.sigma(times[-1]) / schedule.alpha(times[-1]))  # E[x_0 | x_t] lacks the posterior's spread
    variance = 0.4**2 / (0.4 + last**2)
    np.testing.assert_allclose(out.mean(), 0.3, atol=0.03)
    np.testing.assert_allclose(out.var(), variance, atol=0.06)  # 'large' has 12% too much at 120 steps


def test_learned_variance_needs_a_learned_variance():
    schedule = jdiff.Cosine()
    with pytest.raises(ValueError, match="learned_variance=True"):
        jdiff.sample(
            solvers.DDPM("learned"), mixture().denoise(schedule), schedule, jnp.zeros((1, 2)),
            jdiff.grid.uniform(3), jax.random.key(0),
        )  # fmt: skip


@pytest.mark.parametrize("make", [lambda: solvers.DDIM(-1.0), lambda: solvers.DDPM("medium")])
def test_bad_settings(make):
    with pytest.raises(ValueError, match="DDIM: eta|unknown variance 'medium'"):
        make()
