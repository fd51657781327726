"""The oracles against brute force: quadrature, autodiff, SciPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, exact_flow, mixture, one_of

import jdiff


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def grid_of_points(reach=5.0, n=161):
    axis = np.linspace(-reach, reach, n)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), (axis[1] - axis[0]) ** 2


@jax.jit
def everything(schedule, m, x, t):
    """alpha, sigma, the score, the gradient of log p, x_0, eps and log p."""
    gradient = jax.grad(lambda x: m.log_prob(schedule, x, t).sum())(x)
    x0, eps, _ = m.denoise(schedule).predict(x, t)
    score, log_prob = m.score(schedule, x, t), m.log_prob(schedule, x, t)
    return schedule.alpha(t), schedule.sigma(t), score, gradient, x0, eps, log_prob


@pytest.mark.parametrize("schedule", ["vp", "ve", "flow", "discrete"])
def test_denoiser_is_the_posterior_mean_by_quadrature(schedule):
    """E[x_0 | x_t] = int x_0 p(x_0) N(x_t; alpha x_0, sigma^2) / p_t(x_t), the integrals on a grid."""
    from scipy.stats import multivariate_normal

    m, t = mixture(), 0.5
    points, cell = grid_of_points()
    density = sum(
        w * multivariate_normal(mean, C).pdf(points)
        for w, mean, C in zip(m.weights, m.means, m.covariances, strict=True)
    )
    x = np.array([[0.3, -0.2], [-0.5, 0.9]])
    of_t = np.full(2, t)
    found = map(np.asarray, everything(one_of(schedule, MORE_SCHEDULES), m, x, of_t))
    (a, *_), (s, *_), _, _, x0, _, log_prob = found
    for i, row in enumerate(x):
        likelihood = multivariate_normal(row, s**2 * np.eye(2)).pdf(a * points)
        evidence = (density * likelihood).sum() * cell
        mean = (points * (density * likelihood)[:, None]).sum(0) * cell / evidence
        np.testing.assert_allclose(x0[i], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(log_prob[i], np.log(evidence), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_score_tweedie_and_times_per_row(schedule):
    schedule, m = one_of(schedule, MORE_SCHEDULES), mixture()
    x, t = np.random.default_rng(0).normal(size=(3, 2)), np.array([0.2, 0.5, 0.9])
    a, s, score, gradient, x0, eps, _ = map(np.asarray, everything(schedule, m, x, t))
    np.testing.assert_allclose(score, gradient, rtol=1e-8, atol=1e-10)
    a, s = a[:, None], s[:, None]
    np.testing.assert_allclose((x + s**2 * score) / a, x0, rtol=1e-7, atol=1e-7)
    rows = [everything(schedule, m, x[i : i + 1], t[i : i + 1])[4][0] for i in range(3)]
    np.testing.assert_allclose(x0, np.stack(rows), rtol=1e-10)
    np.testing.assert_allclose(a * x0 + s * eps, x, rtol=1e-12)


def test_posterior():
    """Given y = A x + noise: with A = alpha I it is the denoiser; two observations in turn are both at once."""
    m, schedule, t = mixture(), jdiff.VP(), 0.3
    x, A, y = np.array([[0.4, -0.6]]), np.array([[1.0, 0.5], [0.2, -1.0]]), np.array([0.3, 0.7])

    @jax.jit
    def run():
        mean, _ = m.posterior(schedule.alpha(t) * jnp.eye(2), x[0], schedule.sigma(t)).moments()
        turns = m.posterior(A[:1], y[:1], 0.4).posterior(A[1:], y[1:], 0.4)
        return mean, m.denoise(schedule)(x, t)[0], m.posterior(A, y, 0.4), turns

    mean, x0, both, turns = run()
    np.testing.assert_allclose(mean, x0, rtol=1e-9)
    chex.assert_trees_all_close(both, turns, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="expected"):
        m.posterior(A, y[:1], 0.4)


def test_samples_have_the_moments():
    m, n = mixture(), 40_000
    x, first, (mean, C) = jax.jit(lambda key: (m.sample(key, n), m.sample(key, 7), m.moments()))(jax.random.key(0))
    x = np.asarray(x)
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(np.diag(C) / n).max())
    np.testing.assert_allclose(np.cov(x.T), C, atol=0.03)
    np.testing.assert_array_equal(first, x[:7])


@pytest.mark.parametrize("schedule", ["vp", "subvp", "edm", "flow"])
def test_the_flow_of_a_gaussian_solves_the_ode(schedule):
    schedule = MORE_SCHEDULES[schedule]
    data = jdiff.oracle.Gaussian(np.array([0.3, -0.2]), np.array([[0.5, 0.2], [0.2, 0.4]]))
    x = jax.random.normal(jax.random.key(0), (3, 2), float)
    expected = exact_flow(schedule, data.denoise(schedule), x, 0.8, 0.1)
    np.testing.assert_allclose(data.flow(schedule, x, 0.8, 0.1), expected, rtol=1e-7, atol=1e-8)


def test_gradients_with_respect_to_the_mixture():
    """Also for equal eigenvalues, where an eigendecomposition would give nan."""
    m = jdiff.oracle.GaussianMixture(np.array([0.5, 0.5]), np.eye(2), np.stack([np.eye(2)] * 2))
    grads = jax.jit(jax.grad(lambda m: m.denoise(jdiff.VP())(np.ones((1, 2)), 0.5).sum()))(m)
    chex.assert_tree_all_finite(grads)
    assert np.abs(grads.covariances).max() > 1e-3


def test_errors():
    with pytest.raises(ValueError, match=r"expected \(K,\), \(K, D\) and \(K, D, D\)"):
        jdiff.oracle.GaussianMixture(np.ones(2), np.ones((2, 3)), np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="Gaussian: mean"):
        jdiff.oracle.Gaussian(np.ones(2), np.ones((3, 3)))
