"""Ranks and coverage: even for the exact posterior of a mixture, and not for one too narrow, too wide or shifted."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import mixture
from scipy.stats import chisquare

from jdiff import metrics

N, DRAWS = 1000, 99
A, NOISE = np.array([[1.0, 0.5]]), 0.4


@functools.cache
def exact():
    """(truth (N, 2), samples (N, DRAWS, 2)) of the exact posterior of a mixture, given one noisy number each."""

    @jax.jit
    def run(key):
        k_truth, k_noise, k_samples = jax.random.split(key, 3)
        truth = mixture().sample(k_truth, N)
        y = truth @ A.T + NOISE * jax.random.normal(k_noise, (N, 1))

        def posterior(y, key):
            return mixture().posterior(jnp.asarray(A), y, NOISE).sample(key, DRAWS)

        return truth, jax.vmap(posterior)(y, jax.random.split(k_samples, N))

    return tuple(map(np.asarray, run(jax.random.key(0))))


def of(scale=1.0, shift=0.0):
    """The same with the samples of each posterior drawn together about their mean, or moved."""
    truth, samples = exact()
    centre = samples.mean(1, keepdims=True)
    return truth, centre + scale * (samples - centre) + shift


def p_values(truth, samples):
    """Of a chi-square test of the ranks, for each dimension."""
    return chisquare(metrics.rank_histogram(metrics.sbc_ranks(truth, samples), DRAWS).counts, axis=1).pvalue


def outside(found):
    """The share of numbers beyond their band."""
    return np.mean((found[1] < found.low) | (found[1] > found.high))


def test_ranks_by_their_definition():
    truth, samples = np.array([[0.5, 9.0]]), np.array([[[0.0, 1.0], [1.0, 2.0], [0.4, 3.0]]])
    np.testing.assert_array_equal(metrics.sbc_ranks(truth, samples), [[2, 3]])


def test_ranks_of_the_exact_posterior_are_even():
    assert (p_values(*of()) > 0.01).all()
    found = metrics.rank_histogram(metrics.sbc_ranks(*of()), DRAWS)
    assert found.counts.shape == (2, 20) and found.expected == N / 20 and (found.counts.sum(1) == N).all()
    beyond = (found.counts < found.low) | (found.counts > found.high)
    assert beyond.mean() < 0.15  # 5% expected


def test_ranks_of_a_wrong_posterior_are_not():
    """Too narrow: both ends too full; too wide: too empty; shifted: one end too full."""
    for scale, shift in ((0.6, 0.0), (1.6, 0.0), (1.0, 0.4)):
        assert (p_values(*of(scale, shift)) < 1e-6).all()
    found = {s: metrics.rank_histogram(metrics.sbc_ranks(*of(s)), DRAWS) for s in (0.6, 1.6)}
    assert (found[0.6].counts[:, [0, -1]] > found[0.6].high).all()
    assert (found[1.6].counts[:, [0, -1]] < found[1.6].low).all()
    moved = metrics.rank_histogram(metrics.sbc_ranks(*of(1.0, 0.4)), DRAWS)
    assert (moved.counts[:, 0] > moved.high).all() and (moved.counts[:, -1] < moved.low).all()


def test_the_band_holds_its_share():
    """Of even ranks, 95% of the counts are within a band of 95%, and half of them within one of 50%."""
    ranks = np.random.default_rng(0).integers(0, DRAWS + 1, (N, 400))
    for level in (0.95, 0.5):
        found = metrics.rank_histogram(ranks, DRAWS, level=level)
        inside = ((found.counts >= found.low) & (found.counts <= found.high)).mean()
        assert level - 0.01 < inside < level + 0.09  # counts are whole


def test_bins_divide_the_ranks():
    ranks = np.arange(8)[:, None]  # of 7 draws
    np.testing.assert_array_equal(metrics.rank_histogram(ranks, 7, 6).counts, [[2, 2, 2, 2]])
    np.testing.assert_array_equal(metrics.rank_histogram(ranks, 7, 20).counts, np.ones((1, 8)))


def test_coverage_of_the_exact_posterior_is_its_level():
    for seed in range(3):
        found = metrics.tarp_coverage(*of(), seed=seed)
        assert np.abs(found.coverage - found.level).max() < 1.63 / np.sqrt(N)  # Kolmogorov-Smirnov at 1%
        assert outside(found) < 0.3
    assert found.coverage[0] == 0 and found.coverage[-1] == 1


def test_coverage_of_a_wrong_posterior_is_not():
    """Too narrow: below its level above 1/2 and above it below. A biased one shows for references that know of it."""
    narrow = metrics.tarp_coverage(*of(0.5))
    assert outside(narrow) > 0.3
    at = {round(float(a), 2): c - a for a, c in zip(narrow.level, narrow.coverage, strict=True)}
    assert at[0.2] > 0.05 and at[0.8] < -0.05
    truth, samples = of(1.0, 0.6)
    assert outside(metrics.tarp_coverage(truth, samples, references=np.full(truth.shape, -3.0))) > 0.5


def test_bad_calls():
    truth, samples = np.zeros((3, 2)), np.zeros((3, 5, 2))
    for call, words in (
        (lambda: metrics.sbc_ranks(truth, samples[0]), r"truth \(3, 2\) and samples \(5, 2\); expected \(N, D\) and"),
        (lambda: metrics.sbc_ranks(truth, samples * np.nan), "numbers that are not finite"),
        (lambda: metrics.rank_histogram(np.full((3, 2), 6), 5), r"expected integers \(N, D\) up to 5"),
        (lambda: metrics.rank_histogram(truth, 5), r"ranks are float64\(3, 2\); expected integers"),
        (lambda: metrics.rank_histogram(np.ones((3, 2), int), 5, level=95), "level is the probability of the band"),
        (
            lambda: metrics.tarp_coverage(truth, samples, references=truth[:1]),
            r"references have shape \(1, 2\); expected",
        ),
        (lambda: metrics.tarp_coverage(truth, samples, levels=1), "levels must be an integer, 2 or more, got 1"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
