"""The forward process, its posterior and prior, and the SDEs, against closed forms."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, mixture, one_of

import jdiff

q_posterior = jax.jit(jdiff.q_posterior)


@jax.jit
def rates_at(schedule, *times):
    return [f(u) for u in times for f in (schedule.alpha, schedule.sigma)]


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_q_posterior_is_bayes_rule(schedule):
    """q(x_s | x_t, x_0) of jointly Gaussian variables, by conditioning their covariance in float64."""
    with jax.enable_x64(True):
        schedule = one_of(schedule, MORE_SCHEDULES)
        x0, x_t = np.array([[0.7, -0.4]]), np.array([[0.2, 1.1]])
        for t, s in ((0.9, 0.3), (0.5, 0.45), (1.0, 0.2)):
            a_t, s_t, a_s, s_s = map(float, rates_at(schedule, t, s))
            ratio = a_t / a_s  # x_t = ratio x_s + noise, so cov(x_s, x_t | x_0) = ratio sigma_s^2
            mean = a_s * x0 + ratio * s_s**2 / s_t**2 * (x_t - a_t * x0)
            variance = s_s**2 - (ratio * s_s**2) ** 2 / s_t**2
            got_mean, got_std = map(np.asarray, q_posterior(schedule, x0, x_t, t, s))
            np.testing.assert_allclose(got_mean, mean, rtol=1e-7, atol=1e-9)
            np.testing.assert_allclose(got_std.ravel(), np.sqrt(variance), rtol=1e-7, atol=1e-9)


def test_q_posterior_where_sigma_is_0():
    x0, x_t = jnp.array([[0.7]]), jnp.array([[0.2]])
    mean, std = jdiff.q_posterior(jdiff.Flow(), x0, x_t, 0.5, 0.0)
    np.testing.assert_allclose(mean, x0, rtol=1e-6)
    assert float(std.squeeze()) == 0


def test_prior_has_the_moments_of_x_t():
    schedule = jdiff.discrete(jdiff.betas.sigmoid(100))
    mean, std = np.array([1.0, -2.0], np.float32), np.array([0.5, 0.1], np.float32)
    x = jdiff.prior(schedule, jax.random.key(0), (50_000, 2), mean=mean, std=std)
    a, s = float(schedule.alpha(1.0)), float(schedule.sigma(1.0))
    np.testing.assert_allclose(x.mean(0), a * mean, atol=0.012)
    np.testing.assert_allclose(x.std(0), np.sqrt(a**2 * std**2 + s**2), rtol=0.012)
    np.testing.assert_allclose(jdiff.prior(jdiff.EDM(), jax.random.key(0), (50_000, 1)).std(), 80, rtol=0.01)


def test_errors():
    x = jnp.ones((3, 2))
    for call in (
        lambda: jdiff.q_sample(jdiff.VP(), x, jnp.ones(2), x),
        lambda: jdiff.q_sample(jdiff.VP(), x, 0.5, x[:1]),
        lambda: jdiff.eps_from(jdiff.VP(), x[:, :1], x, 0.5),
        lambda: jdiff.prior(jdiff.VP(), jax.random.key(0), (3, 2), mean=jnp.ones(3)),
        lambda: jdiff.prior(jdiff.VP(), jax.random.key(0), (3, 2), jnp.ones(3)),
    ):
        with pytest.raises(ValueError, match="shape"):
            call()


def song(name, t, b0=0.1, b1=20.0, low=0.01, high=50.0):
    """(f, g^2) of arXiv:2011.13456, appendix B."""
    beta, integral = b0 + t * (b1 - b0), b0 * t + 0.5 * (b1 - b0) * t**2
    return {
        "vp": (-beta / 2, beta),
        "subvp": (-beta / 2, beta * (1 - np.exp(-2 * integral))),
        "ve": (0 * t, (low * (high / low) ** t) ** 2 * 2 * np.log(high / low)),
    }[name]


@pytest.mark.parametrize("name", ["vp", "subvp", "ve"])
def test_forward_sde_is_songs(name):
    with jax.enable_x64(True):
        t = np.linspace(0.01, 1, 30)
        for got, expected in zip(jdiff.sde.forward(SCHEDULES[name], t), song(name, t), strict=True):
            np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12)


@jax.jit
def fields(schedule, x, t):
    """f, g^2, the score by differentiation, and what `sde` makes of the denoiser."""
    denoise = mixture().denoise(schedule)
    flow = jdiff.sde.probability_flow(denoise, schedule)
    return (
        *jdiff.sde.forward(schedule, t),
        jax.grad(lambda x: mixture().log_prob(schedule, x, t).sum())(x),
        jdiff.sde.score(denoise, schedule, x, t),
        flow(x, t),
        flow(x, jnp.full(5, t)),
        *jdiff.sde.reverse(denoise, schedule)(x, t),
    )


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_the_flow_is_the_reverse_sde_with_half_its_score(schedule):
    """dx/dt = f x - g^2 score / 2, the reverse drift is f x - g^2 score; the score is the gradient of log p."""
    with jax.enable_x64(True):
        schedule, t = one_of(schedule), 0.6
        x = np.asarray(jax.random.normal(jax.random.key(0), (5, 2), jnp.float64))
        f, g2, score, own_score, velocity, per_row, drift, diffusion = map(np.asarray, fields(schedule, x, t))
        np.testing.assert_allclose(own_score, score, rtol=1e-7, atol=1e-9)
        np.testing.assert_allclose(velocity, f * x - 0.5 * g2 * score, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(drift, f * x - g2 * score, rtol=1e-7, atol=1e-7)
        np.testing.assert_allclose(diffusion**2, g2, rtol=1e-12)
        np.testing.assert_allclose(per_row, velocity, rtol=1e-9, atol=1e-9)


def test_the_flow_is_finite_from_pure_noise():
    x = jnp.ones((2, 2))
    for schedule in (jdiff.Flow(), jdiff.Cosine()):
        velocity = jdiff.sde.probability_flow(mixture().denoise(schedule), schedule)
        chex.assert_tree_all_finite(jax.jit(lambda x, v=velocity: jax.jvp(lambda x: v(x, 1.0), (x,), (x,)))(x))


# ---------------------------------------------------------------- tables


def bar(schedule, T):
    return np.asarray(schedule.alpha(np.arange(1, T + 1) / T)) ** 2


def test_published_tables():
    """alpha_bar at indices 0, 499, 999 of the tables that everybody uses."""
    with jax.enable_x64(True):
        linear = bar(jdiff.discrete(jdiff.betas.linear(1000)), 1000)[[0, 499, 999]]
        np.testing.assert_allclose(linear, [0.9999, 7.8587242882e-2, 4.0358297654e-5], rtol=1e-9)
        cosine = bar(jdiff.discrete(jdiff.betas.cosine(1000)), 1000)[[0, 499, 999]]
        np.testing.assert_allclose(cosine, [0.9999587158, 0.4938435904, 2.428767e-9], rtol=1e-6)


def test_the_linear_table_tends_to_vp():
    """betas of beta_t / T give VP as T grows, at first order."""
    with jax.enable_x64(True):
        t, errors = np.linspace(0.1, 1, 10), []
        for T in (500, 1000, 2000):
            table = jdiff.discrete(jdiff.betas.linear(T, 0.1 / T, 20 / T))
            errors.append(np.abs(table.alpha(t) - jdiff.VP().alpha(t)).max())
        assert errors[0] < 5e-3
        np.testing.assert_allclose([errors[0] / errors[1], errors[1] / errors[2]], 2, rtol=0.1)


def test_scurve_table():
    """The recipe of the README: sigmoid(linspace(-6, 6, T)) (0.5e-2 - 1e-5) + 1e-5 ends at alpha_bar = 0.78."""
    T = 100
    expected = np.asarray(jax.nn.sigmoid(jnp.linspace(-6, 6, T))) * (0.5e-2 - 1e-5) + 1e-5
    np.testing.assert_allclose(jdiff.betas.sigmoid(T), expected, rtol=1e-5)
    np.testing.assert_allclose(np.prod(1 - jdiff.betas.sigmoid(T)), 0.78, atol=0.005)


def test_zero_terminal_snr():
    betas = jdiff.betas.zero_terminal_snr(jdiff.betas.linear(100))
    assert betas[-1] == 1
    np.testing.assert_allclose(betas[0], 1e-4, rtol=1e-9)
    assert float(jdiff.discrete(betas, exact=True).alpha(1.0)) == 0
    assert 0 < float(jdiff.discrete(betas).alpha(1.0)) < 1e-8


@pytest.mark.parametrize("betas", [[0.1, 0.0], [0.1, 1.5], [-0.1], [1.0, 0.5], [[0.1]], [], [np.nan]])
def test_bad_betas(betas):
    with pytest.raises(ValueError, match="betas"):
        jdiff.discrete(betas)


# ---------------------------------------------------------------- grids


def test_edms_grid():
    """The published 18 points, by karras on any schedule that reaches them and by uniform on EDM's clock."""
    published = [80, 57.585985, 40.785574, 28.374585, 19.352453]
    for times in (jdiff.grid.karras(jdiff.EDM(), 18), jdiff.grid.uniform(18, 0.0)):
        sigma = jdiff.EDM().sigma(times)
        np.testing.assert_allclose(sigma[:5], published, rtol=2e-6)
        np.testing.assert_allclose(sigma[-3:], [0.022935, 0.007528, 0.002], rtol=3e-4)
    wide = jdiff.VE(0.001, 100.0)
    times = jdiff.grid.karras(wide, 18, sigma_min=0.002, sigma_max=80.0)
    np.testing.assert_allclose(wide.sigma(times)[:5], published, rtol=1e-4)


@pytest.mark.parametrize("T,n", [(1000, 10), (1000, 16), (1000, 53), (1000, 999), (100, 100), (50, 7), (1000, 1)])
def test_discrete_spacings_are_diffusers(T, n):
    """As NumPy rounds them; for linspace from exact products, as np.linspace itself is off by rounding at a tie."""
    spacings = ("leading", "trailing", "linspace")
    times = jax.jit(lambda: {name: jdiff.grid.discrete(T, n, name) for name in spacings[: 3 if n > 1 else 2]})()
    index = {name: np.round(np.asarray(t) * T).astype(int) - 1 for name, t in times.items()}
    np.testing.assert_array_equal(index["leading"], (np.arange(n) * (T // n))[::-1])
    np.testing.assert_array_equal(index["trailing"], np.round(np.arange(T, 0, -T / n))[:n].astype(int) - 1)
    if n > 1:
        np.testing.assert_array_equal(index["linspace"], np.round((T - 1) * np.arange(n)[::-1] / (n - 1)).astype(int))


def test_a_traced_n_repeats_the_tail():
    for grid in (
        lambda n, size: jdiff.grid.uniform(n, size=size),
        lambda n, size: jdiff.grid.log_snr(jdiff.Flow(), n, size=size),
        lambda n, size: jdiff.grid.karras(jdiff.VP(), n, size=size),
        lambda n, size: jdiff.grid.discrete(1000, n, "trailing", size=size),
    ):
        traced = jax.jit(lambda n, grid=grid: grid(n, 12))
        whole = jax.jit(lambda grid=grid: {n: grid(n, None) for n in (1, 2, 7, 12)})()
        for n, short in whole.items():
            padded = traced(n)
            np.testing.assert_allclose(padded[:n], short, rtol=1e-5, atol=1e-6)
            np.testing.assert_allclose(padded[n:], short[-1] if n > 1 else padded[n:], rtol=1e-5)


@jax.jit
def grids(schedule):
    return jdiff.grid.log_snr(schedule, 20), jdiff.grid.karras(schedule, 20)


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_grids_stay_in_the_domain(schedule):
    own = MORE_SCHEDULES[schedule]
    for times in grids(one_of(schedule, MORE_SCHEDULES)):
        assert (np.diff(times) < 0).all()
        np.testing.assert_allclose([times[0], times[-1]], [own.t_max, own.t_min], rtol=1e-6)


def test_grid_errors():
    for call, text in (
        (lambda: jdiff.grid.discrete(10, 11), "n must be at most T"),
        (lambda: jdiff.grid.discrete(10, 5, offset=2), "leaves the table"),
        (lambda: jdiff.grid.discrete(10, 5, "middle"), "unknown spacing"),
        (lambda: jdiff.grid.uniform(0), "positive integer"),
        (lambda: jdiff.grid.uniform(5, size=4), "do not fit"),
        (lambda: jdiff.grid.uniform(5, 0.5, 0.2), "t_min"),
        (lambda: jdiff.grid.log_snr(jdiff.Flow(), 5, t_min=0.0), "times must satisfy"),
        (lambda: jax.jit(jdiff.grid.uniform)(5), "n is traced"),
    ):
        with pytest.raises(ValueError, match=text):
            call()


@jax.jit
def speed(schedule, t):
    return jdiff.sde.derivative(schedule.sigma, t)


@pytest.mark.parametrize("T", [3, 100, 1000])
def test_a_table_moves_at_its_end_knots_as_beside_them(T):
    """One-sided derivatives at t = 1/T and t = 1, wherever rounding puts these: g^2 there is no half, nor 0."""
    schedule = jdiff.discrete(jdiff.betas.linear(T, 0.1 / T, min(20 / T, 0.9)))
    for end, inward in ((1 / T, 1e-2 / T), (1.0, -1e-2 / T)):
        for nudge in (-1e-7, 0.0, 1e-7):
            np.testing.assert_allclose(
                speed(schedule, np.float32(end * (1 + nudge))), speed(schedule, np.float32(end + inward)), rtol=0.05
            )
