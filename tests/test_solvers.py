"""Solvers against oracles: order of convergence, exact moments, equivalences."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, exact_flow, mixture

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
            _, path = jdiff.sample(solver, denoise, schedule, x, times, path=True)
            errors.append(np.sqrt(np.mean((np.asarray(path[-1]) - truth) ** 2)))
        slope = -np.polyfit(np.log(counts), np.log(errors), 1)[0]
        assert slope > solver.order - 0.2, (slope, errors)


def gaussian():
    return jdiff.oracle.Gaussian(np.array([0.3, -0.2]), np.array([[0.5, 0.2], [0.2, 0.4]]))


@pytest.mark.parametrize("solver", [*DETERMINISTIC, *STOCHASTIC])
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_moments_of_gaussian_data(schedule, solver):
    """For Gaussian data every step is affine in (x, z), so mean and covariance propagate exactly: no Monte Carlo."""
    with jax.enable_x64(True):
        schedule = SCHEDULES[schedule]
        solver = (DETERMINISTIC | STOCHASTIC)[solver]
        data = gaussian()
        denoise = data.denoise(schedule)
        mean, C = np.asarray(data.mean), np.asarray(data.covariance)
        t_max = 0.995 if schedule.alpha(1.0) == 0 else 1.0
        errors = []
        for n in (100, 200):
            times = jdiff.grid.log_snr(schedule, n, t_max=t_max)
            plan = solver.plan(schedule, times, n)
            probe = jnp.concatenate([jnp.zeros((1, 2)), jnp.eye(2)])  # the affine map from its values at 0 and e_i

            def one(m, S, i, plan=plan, times=times, probe=probe):
                now = solvers.Now(i, times[i], times[i + 1], jax.tree.map(lambda p: p[i], plan))
                key = jax.random.split(jax.random.key(i), 3) if solver.stochastic else None
                if key is None:
                    out, spread = solver.step(denoise, schedule, probe, now, (), None)[0], 0.0
                else:
                    # the same noise for all three rows cancels; its scale is the difference between two noises
                    same = jnp.stack([key[0]] * 3)
                    out = solver.step(denoise, schedule, probe, now, (), same)[0]
                    z = jax.random.normal(key[0], (2,), jnp.float64)
                    other = solver.step(denoise, schedule, probe, now, (), jnp.stack([key[1]] * 3))[0]
                    z2 = jax.random.normal(key[1], (2,), jnp.float64)
                    spread = ((out[0] - other[0]) / (z - z2))[0]
                    out = out - spread * z[None]
                A = np.asarray(out[1:] - out[:1]).T
                return np.asarray(out[0]) + A @ m, A @ S @ A.T + float(spread) ** 2 * np.eye(2)

            # start from the exact marginal at times[0]
            a, s = float(schedule.alpha(times[0])), float(schedule.sigma(times[0]))
            m, S = a * mean, a**2 * C + s**2 * np.eye(2)
            with jax.disable_jit(False):
                for i in range(n - 1):
                    m, S = one(m, S, i)
            a, s = float(schedule.alpha(times[-1])), float(schedule.sigma(times[-1]))
            errors.append(np.abs(S - (a**2 * C + s**2 * np.eye(2))).max() + np.abs(m - a * mean).max())
        # "large" overestimates the noise by design, at first order too
        assert errors[1] < 0.75 * errors[0] or errors[1] < 1e-4, errors
        assert errors[1] < 0.12, errors


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
    data = mixture()
    n = 120 if solver.order == 1 else 40
    x = jdiff.prior(schedule, jax.random.key(0), (4096, 2))
    times = jdiff.grid.log_snr(schedule, n)
    out = jax.jit(jdiff.sample)(solver, data.denoise(schedule), schedule, x, times, jax.random.key(1))
    mean, covariance = data.moments()
    np.testing.assert_allclose(out.mean(0), mean, atol=0.06)
    np.testing.assert_allclose(np.cov(out.T), covariance, atol=0.12)


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
