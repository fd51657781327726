"""Distances between sets of points and between Gaussians, in closed form or by the formula written out."""

import numpy as np
import pytest
from scipy import stats
from scipy.linalg import sqrtm

from jdiff import metrics
from jdiff.metrics import points

RANDOM = np.random.default_rng(0)


def test_frechet_of_gaussians_in_closed_form():
    """Points with exact moments: |m|^2 + sum (sqrt a - sqrt b)^2 for commuting covariances; 0 for equal sets."""
    base = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # sample covariance = identity
    a, b = base * [1.0, 2.0], base * [3.0, 1.0] + [1.0, -2.0]
    np.testing.assert_allclose(metrics.frechet(a, b), 1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2, rtol=1e-10)
    np.testing.assert_allclose(metrics.frechet(a, a), 0, atol=1e-12)


def test_frechet_distance_of_covariances_that_do_not_commute():
    """Against SciPy's root of the product."""
    (a, b), (m, n) = RANDOM.normal(size=(2, 6, 6)), RANDOM.normal(size=(2, 6))
    Ca, Cb = a @ a.T, b @ b.T
    expected = ((m - n) ** 2).sum() + np.trace(Ca + Cb - 2 * sqrtm(Ca @ Cb).real)
    np.testing.assert_allclose(metrics.frechet_distance(m, Ca, n, Cb), expected, rtol=1e-9)


def test_frechet_distance_of_singular_covariances():
    """Rank 1: |u|^2 + |v|^2 - 2 |u.v|. Rank 4 of 64: 0 from itself, all of both traces where no axis is shared."""
    u, v, zero = *RANDOM.normal(size=(2, 30)), np.zeros(30)
    expected = u @ u + v @ v - 2 * abs(u @ v)
    np.testing.assert_allclose(
        metrics.frechet_distance(zero, np.outer(u, u), zero, np.outer(v, v)), expected, rtol=1e-9
    )
    axes, zero = np.linalg.qr(RANDOM.normal(size=(64, 64)))[0], np.zeros(64)
    first, second = (axes[:, part] @ axes[:, part].T * 3.0 for part in (slice(4), slice(4, 8)))
    np.testing.assert_allclose(metrics.frechet_distance(zero, first, zero, first), 0, atol=1e-12)
    np.testing.assert_allclose(metrics.frechet_distance(zero, first, zero, second), 24, rtol=1e-12)
    np.testing.assert_allclose(metrics.frechet_distance(zero, first, zero, 0 * second), 12, rtol=1e-12)
    few = RANDOM.normal(size=(5, 64))  # fewer points than features
    np.testing.assert_allclose(metrics.frechet(few, few + 1), 64, rtol=1e-9)


def test_the_bias_of_a_frechet_distance():
    """The mean distance of N points from their own law: to 3 standard errors, and a tenth for higher orders."""
    scale, n = np.array([2.0, 1.0, 0.3]), 100
    found = []
    for _ in range(300):
        x = RANDOM.normal(size=(n, 3)) * scale
        found.append(metrics.frechet_distance(x.mean(0), np.cov(x.T), np.zeros(3), np.diag(scale**2)))
    law = metrics.Moments(n, np.zeros(3), np.diag(scale**2) * (n - 1))
    error = 3 * np.std(found) / np.sqrt(len(found))
    np.testing.assert_allclose(metrics.frechet_bias(law), np.mean(found), atol=error + 0.1 * np.mean(found))


def test_too_few_points_for_a_frechet_distance():
    some = metrics.Moments.init(8).update(RANDOM.normal(size=(8, 8)))
    enough = some.update(RANDOM.normal(size=(50, 8)))
    assert metrics.frechet_of(enough, enough) == pytest.approx(0, abs=1e-10)
    with pytest.raises(
        ValueError, match=r"8 points of 8 features make a Frechet distance about [\d.]+ too large; give"
    ):
        metrics.frechet_of(enough, some)


def test_kernel_distance_by_its_formula():
    """One subset of all points is the unbiased estimate with loops; over sets of one law the mean is 0."""
    a, b = RANDOM.normal(size=(6, 3)), RANDOM.normal(size=(7, 3)) + 0.5

    def k(x, y):
        return (x @ y / 3 + 1) ** 3

    def mean(u, v, same):
        return np.mean([k(x, y) for i, x in enumerate(u) for j, y in enumerate(v) if not (same and i == j)])

    expected = mean(a, a, True) + mean(b[:6], b[:6], True) - 2 * mean(a, b[:6], False)
    found = metrics.kernel_distance(a, b[:6], subsets=1, size=6)
    np.testing.assert_allclose(found.value, expected, rtol=1e-10)
    values = [metrics.kernel_distance(*RANDOM.normal(size=(2, 60, 3)), subsets=10).value for _ in range(200)]
    assert abs(np.mean(values)) < 3 * np.std(values) / np.sqrt(200)
    assert metrics.kernel_distance(*RANDOM.normal(size=(2, 60, 3)), subsets=10).std > 0


def test_mmd_of_gaussians_in_closed_form():
    """E k(x, y) = (s^2 / (s^2 + 2))^(D/2) exp(-d^2 / 2 (s^2 + 2)) for standard normals d apart; in blocks the same."""
    n, d, s = 3000, 0.7, 1.3
    a, b = RANDOM.normal(size=(2, n, 2))
    share = s**2 / (s**2 + 2)
    expected = 2 * share * (1 - np.exp(-(2 * d**2) / (2 * (s**2 + 2))))
    np.testing.assert_allclose(metrics.mmd(a, b + d, s), expected, atol=0.01)
    assert abs(metrics.mmd(a, b, s)) < 2e-3
    whole = metrics.mmd(a[:50], b[:40] + 1, s)
    original, points.BLOCK = points.BLOCK, 130
    try:
        np.testing.assert_allclose(metrics.mmd(a[:50], b[:40] + 1, s), whole, rtol=1e-12)
    finally:
        points.BLOCK = original
    assert metrics.mmd(a[:200], b[:200] + d) > 0.02  # the median distance as scale


def test_energy_distance_is_scipys_without_its_bias():
    """SciPy's is the root of the biased estimate of points on a line, in which each is 0 from itself."""
    a, b = RANDOM.normal(size=(40, 1)), RANDOM.normal(size=(30, 1)) * 2 + 0.5
    between, own_a, own_b = (np.abs(u[:, None] - v).mean() for u, v in ((a, b), (a, a), (b, b)))
    np.testing.assert_allclose(stats.energy_distance(a[:, 0], b[:, 0]) ** 2, 2 * between - own_a - own_b, rtol=1e-9)
    unbiased = 2 * between - own_a * 40 / 39 - own_b * 30 / 29
    np.testing.assert_allclose(metrics.energy_distance(a, b), unbiased, rtol=1e-6)


def test_sliced_wasserstein_of_a_shift():
    """A shift by v moves every projection by v.d: the mean over directions of the plane is |v|^2 / 2."""
    a = np.random.default_rng(0).normal(size=(200, 2))
    np.testing.assert_allclose(metrics.sliced_wasserstein(a, a + [3.0, 4.0]), np.sqrt(25 / 2), rtol=1e-6)
    with pytest.raises(ValueError, match="one size"):
        metrics.sliced_wasserstein(a, a[:10])


def test_nearest_distance():
    a, b = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 4.0]])
    np.testing.assert_allclose(metrics.nearest_distance(a, b), [1, 0], atol=1e-7)
    assert metrics.nearest_distance(a[:0], b).shape == (0,)


def test_bad_calls():
    a, eye, nan = np.zeros((4, 2)), np.eye(2), float("nan")
    for call, words in (
        (lambda: metrics.frechet(a, a[:, :1]), r"frechet: expected points \(N, D\) and \(M, D\), got \(4, 2\)"),
        (lambda: metrics.frechet(a, a[:1]), "frechet: b has 1 points; expected 2 or more"),
        (lambda: metrics.frechet(a, a * nan), "frechet: the points hold numbers that are not finite"),
        (lambda: metrics.frechet_distance(a[0], eye, a[0], np.ones(2)), r"expected \(D,\) and \(D, D\)"),
        (lambda: metrics.frechet_distance(a[0], eye, a[0, :1], eye[:1, :1]), "2 and 1 features; statistics of one"),
        (lambda: metrics.frechet_distance(a[0], eye, a[0], -eye), "cov_b has an eigenvalue of -1; it is no covariance"),
        (lambda: metrics.frechet_distance(a[0], eye, a[0], np.triu(np.ones((2, 2)))), "the covariance is not symm"),
        (lambda: metrics.frechet_distance(a[0], eye, a[0] * nan, eye), "numbers that are not finite"),
        (lambda: metrics.kernel_distance(a, a[:3]), "kernel_distance: b has 3 points; expected 4 or more"),
        (lambda: metrics.kernel_distance(a, a, size=5), "size must be an integer, 2 or more, at most 4, got 5"),
        (lambda: metrics.kernel_distance(a, a, subsets=2.0), "subsets must be an integer, 1 or more, got 2.0"),
        (lambda: metrics.mmd(a, a, 0.0), "mmd: scale must be positive, got 0.0"),
        (lambda: metrics.energy_distance(a, a[:1]), "energy_distance: b has 1 points; expected 2 or more"),
        (lambda: metrics.nearest_distance(a, a[:0]), "nearest_distance: b has 0 points; expected 1 or more"),
    ):
        with pytest.raises(ValueError, match=words) as caught:
            call()
        assert len(str(caught.value).splitlines()) == 1
