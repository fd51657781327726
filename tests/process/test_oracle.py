"""The oracles against brute force: quadrature, autodiff, SciPy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, exact_flow, mixture

import jdiff


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def grid_of_points(reach=5.0, n=161):
    axis = np.linspace(-reach, reach, n)
    return np.stack(np.meshgrid(axis, axis, indexing="ij"), -1).reshape(-1, 2), (axis[1] - axis[0]) ** 2


@pytest.mark.parametrize("schedule", ["vp", "ve", "flow", "discrete"])
def test_denoiser_is_the_posterior_mean_by_quadrature(schedule):
    """E[x_0 | x_t] = int x_0 p(x_0) N(x_t; alpha x_0, sigma^2) / p_t(x_t), the integrals on a grid."""
    from scipy.stats import multivariate_normal

    schedule, t = MORE_SCHEDULES[schedule], 0.5
    m = mixture()
    points, cell = grid_of_points()
    density = sum(
        w * multivariate_normal(mean, C).pdf(points)
        for w, mean, C in zip(m.weights, m.means, m.covariances, strict=True)
    )
    x = np.array([[0.3, -0.2], [-0.5, 0.9]])
    a, s = float(schedule.alpha(t)), float(schedule.sigma(t))
    for row in x:
        likelihood = multivariate_normal(row, s**2 * np.eye(2)).pdf(a * points)
        evidence = (density * likelihood).sum() * cell
        mean = (points * (density * likelihood)[:, None]).sum(0) * cell / evidence
        np.testing.assert_allclose(m.denoise(schedule)(row[None], t)[0], mean, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(m.log_prob(schedule, row[None], t)[0], np.log(evidence), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_score_tweedie_and_times_per_row(schedule):
    schedule, m = MORE_SCHEDULES[schedule], mixture()
    x, t = jax.random.normal(jax.random.key(0), (3, 2), float), jnp.array([0.2, 0.5, 0.9])
    score = m.score(schedule, x, t)
    np.testing.assert_allclose(score, jax.grad(lambda x: m.log_prob(schedule, x, t).sum())(x), rtol=1e-8, atol=1e-10)
    a, s = schedule.alpha(t)[:, None], schedule.sigma(t)[:, None]
    np.testing.assert_allclose((x + s**2 * score) / a, m.denoise(schedule)(x, t), rtol=1e-7, atol=1e-7)
    rows = [m.denoise(schedule)(x[i : i + 1], t[i])[0] for i in range(3)]
    np.testing.assert_allclose(m.denoise(schedule)(x, t), jnp.stack(rows), rtol=1e-10)
    x0, eps, _ = m.denoise(schedule).predict(x, t)
    np.testing.assert_allclose(a * x0 + s * eps, x, rtol=1e-12)


def test_posterior():
    """Given y = A x + noise: with A = alpha I it is the denoiser; two observations in turn are both at once."""
    m, schedule, t = mixture(), jdiff.VP(), 0.3
    x = jnp.array([[0.4, -0.6]])
    a, s = schedule.alpha(t), schedule.sigma(t)
    mean, _ = m.posterior(a * jnp.eye(2), x[0], s).moments()
    np.testing.assert_allclose(mean, m.denoise(schedule)(x, t)[0], rtol=1e-9)
    A, y = jnp.array([[1.0, 0.5], [0.2, -1.0]]), jnp.array([0.3, 0.7])
    both = m.posterior(A, y, 0.4)
    turns = m.posterior(A[:1], y[:1], 0.4).posterior(A[1:], y[1:], 0.4)
    for p, q in zip(jax.tree.leaves(both), jax.tree.leaves(turns), strict=True):
        np.testing.assert_allclose(p, q, rtol=1e-8, atol=1e-10)
    with pytest.raises(ValueError, match="expected"):
        m.posterior(A, y[:1], 0.4)


def test_samples_have_the_moments():
    m, n = mixture(), 40_000
    x = m.sample(jax.random.key(0), n)
    mean, C = m.moments()
    np.testing.assert_allclose(x.mean(0), mean, atol=5 * np.sqrt(np.diag(C) / n).max())
    np.testing.assert_allclose(np.cov(x.T), C, atol=0.03)
    np.testing.assert_array_equal(m.sample(jax.random.key(0), 7), x[:7])


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
    grads = jax.grad(lambda m: m.denoise(jdiff.VP())(jnp.ones((1, 2)), 0.5).sum())(m)
    assert all(jnp.isfinite(g).all() for g in jax.tree.leaves(grads))
    assert jnp.abs(grads.covariances).max() > 1e-3


def test_errors():
    with pytest.raises(ValueError, match=r"expected \(K,\), \(K, D\) and \(K, D, D\)"):
        jdiff.oracle.GaussianMixture(np.ones(2), np.ones((2, 3)), np.ones((2, 2, 2)))
    with pytest.raises(ValueError, match="Gaussian: mean"):
        jdiff.oracle.Gaussian(np.ones(2), np.ones((3, 3)))
