"""Distances between sets of points, in closed form."""

import numpy as np
import pytest

from jdiff import metrics


def test_frechet_of_gaussians_in_closed_form():
    """Points with exact moments: |m|^2 + sum (sqrt a - sqrt b)^2 for commuting covariances; 0 for equal sets."""
    base = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # sample covariance = identity
    a, b = base * [1.0, 2.0], base * [3.0, 1.0] + [1.0, -2.0]
    np.testing.assert_allclose(metrics.frechet(a, b), 1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2, rtol=1e-10)
    np.testing.assert_allclose(metrics.frechet(a, a), 0, atol=1e-12)


def test_sliced_wasserstein_of_a_shift():
    """A shift by v moves every projection by v.d: the mean over directions of the plane is |v|^2 / 2."""
    a = np.random.default_rng(0).normal(size=(200, 2))
    np.testing.assert_allclose(metrics.sliced_wasserstein(a, a + [3.0, 4.0]), np.sqrt(25 / 2), rtol=1e-6)
    with pytest.raises(ValueError, match="one size"):
        metrics.sliced_wasserstein(a, a[:10])


def test_nearest_distance():
    a, b = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 4.0]])
    np.testing.assert_allclose(metrics.nearest_distance(a, b), [1, 0], atol=1e-7)
