"""The Inception score in closed form; a classifier that tells two sets apart as well as Bayes could."""

import numpy as np
import pytest
from scipy.stats import norm

from jdiff import metrics


def test_inception_score_in_closed_form():
    """K sure and even classes score K; one answer for all images scores 1; in between exp of the mean divergence."""
    sure = np.eye(4)[np.arange(400) % 4]
    np.testing.assert_allclose(metrics.inception_score(sure), (4, 0), atol=1e-12)
    np.testing.assert_allclose(metrics.inception_score(np.full((100, 4), 0.25)), (1, 0), atol=1e-12)
    p = np.random.default_rng(0).dirichlet(np.ones(5), 60)
    scores = [np.exp(np.mean([np.sum(q * np.log(q / half.mean(0))) for q in half])) for half in (p[:30], p[30:])]
    np.testing.assert_allclose(metrics.inception_score(p, 2), (np.mean(scores), np.std(scores)))
    for wrong in (p[0], p * 2, -p):
        with pytest.raises(ValueError, match="whose rows sum to 1"):
            metrics.inception_score(wrong)
    with pytest.raises(ValueError, match="splits must be an integer, 1 or more, at most 60, got 61"):
        metrics.inception_score(p, 61)


def test_two_samples():
    """0.5 for one law; for normals d apart Bayes is right with probability Phi(d / 2)."""
    a, b = np.random.default_rng(0).normal(size=(2, 1000, 2))
    same, apart = metrics.classifier_two_sample(a, b), metrics.classifier_two_sample(a, b[:900] + [1.5, 0.0])
    assert abs(same.value - 0.5) < 0.04
    assert abs(apart.value - norm.cdf(0.75)) < 0.04 and 0 < apart.std < 0.1
    with pytest.raises(ValueError, match="b has 3 points; expected 5 or more"):
        metrics.classifier_two_sample(a, b[:3])
