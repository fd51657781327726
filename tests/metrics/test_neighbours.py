"""Precision, recall, density and coverage by their definitions with loops, and on a line that one can look at."""

import numpy as np
import pytest

from jdiff import metrics
from jdiff.metrics import neighbours, points


def by_definition(real, fake, k):
    def radius(x, own):
        return sorted(np.linalg.norm(x - y) for y in own)[k]  # the first is x itself

    def inside(x, centre, own):
        return np.linalg.norm(x - centre) <= radius(centre, own)

    precision = np.mean([any(inside(f, r, real) for r in real) for f in fake])
    recall = np.mean([any(inside(r, f, fake) for f in fake) for r in real])
    density = np.sum([[inside(f, r, real) for r in real] for f in fake]) / (k * len(fake))
    coverage = np.mean([any(inside(f, r, real) for f in fake) for r in real])
    return precision, recall, density, coverage


@pytest.mark.parametrize("k", [1, 3])
@pytest.mark.parametrize("block", [points.BLOCK, 70])
def test_by_definition(k, block, monkeypatch):
    monkeypatch.setattr(points, "BLOCK", block)
    random = np.random.default_rng(k)
    real, fake = random.normal(size=(30, 2)), random.normal(size=(25, 2)) * 1.4 + 0.4
    found = (*metrics.precision_recall(real, fake, k), *metrics.density_coverage(real, fake, k))
    np.testing.assert_allclose(found, by_definition(real, fake, k))


def test_on_a_line():
    """Real points at 0, 1, 2, 3 with balls of radius 1; fake ones at 0.5 and 9 with balls of radius 8.5."""
    real, fake = np.arange(4.0)[:, None], np.array([[0.5], [9.0]])
    assert metrics.precision_recall(real, fake, 1) == (0.5, 1.0)
    assert metrics.density_coverage(real, fake, 1) == (2 / 2, 2 / 4)


def test_of_equal_laws():
    """Density is about 1, and coverage 1 - (1 - share of a ball)^M: about 1 - 2^-k for equally many points."""
    real, fake = np.random.default_rng(0).normal(size=(2, 1500, 2))
    density, coverage = metrics.density_coverage(real, fake, 3)
    assert abs(density - 1) < 0.1 and abs(coverage - (1 - 2**-3)) < 0.04
    assert metrics.precision_recall(real, real, 3) == (1, 1)


def test_copies_are_neighbours():
    """Two points at one place have radius 0 for k = 1: a point is no neighbour of itself, but its copy is."""
    np.testing.assert_allclose(neighbours.radii(np.array([[0.0], [0.0], [2.0]]), 1), [0, 0, 2], atol=1e-7)


def test_bad_calls():
    x = np.zeros((4, 2))
    for call, words in (
        (lambda: metrics.precision_recall(x, x[:3], 3), "k must be an integer, 1 or more, at most 2, got 3"),
        (lambda: metrics.precision_recall(x, x, 0), "k must be an integer, 1 or more, at most 3, got 0"),
        (lambda: metrics.precision_recall(x, x[:1]), "precision_recall: fake has 1 points"),
        (lambda: metrics.density_coverage(x, x[:, :1]), r"density_coverage: expected points \(N, D\)"),
        (lambda: metrics.density_coverage(x, x[:0]), "density_coverage: fake has 0 points"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
