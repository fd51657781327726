"""Whether a posterior sampler is calibrated: simulation-based calibration by ranks, and TARP's expected coverage.

Both take simulations theta_i ~ prior, y_i ~ p(y | theta_i), and for each of them S samples of the sampler's posterior
given y_i. If the sampler draws from the true posterior, theta_i is as one of its samples.
"""

from typing import NamedTuple

import numpy as np

from jdiff.metrics.points import whole


class RankHistogram(NamedTuple):
    """How the ranks of N simulations fall into bins.

    Attributes:
        counts: (D, bins).
        expected: the count of a bin for a calibrated sampler.
        low: such a count is below this one in 2.5% of cases (if the band is of 95%).
        high: and above this one in 2.5%.
    """

    counts: np.ndarray
    expected: float
    low: float
    high: float


class TarpCoverage(NamedTuple):
    """The share of simulations whose truth is within the credible region of a level.

    Attributes:
        level: of the region, from 0 to 1, (L,).
        coverage: the share, (L,): equal to the level for a calibrated sampler, nearer to 1/2 for a wide one.
        low: for a calibrated sampler, the coverage at a level is below this in 2.5% of cases (for a band of 95%).
        high: and above this in 2.5%.
    """

    level: np.ndarray
    coverage: np.ndarray
    low: np.ndarray
    high: np.ndarray


def sbc_ranks(truth, samples) -> np.ndarray:
    """The rank of each true number among its posterior samples: how many of them are below it.

    For the true posterior it is even over 0, ..., S. A posterior that is too narrow has too many ranks at both ends,
    and a wide one too few. A shifted one has too many at one end.

    Args:
        truth: theta, (N, D).
        samples: of the posterior given each y, (N, S, D), independent of each other: thin the samples of a chain.

    Returns:
        Integers from 0 to S, (N, D).

    Raises:
        ValueError: for other shapes, or numbers that are not finite.

    Reference:
        Talts et al. 2018, arXiv:1804.06788, algorithm 1.
    """
    truth, samples = _simulations("sbc_ranks", truth, samples)
    return (samples < truth[:, None]).sum(1)


def rank_histogram(ranks, draws: int, bins: int = 20, level: float = 0.95) -> RankHistogram:
    """Count ranks in bins of equal width, with the band in which each count is for a calibrated sampler.

    Args:
        ranks: of `sbc_ranks`, (N, D).
        draws: S, the number of posterior samples.
        bins: how many bins; fewer are taken if S + 1 ranks cannot be divided so.
        level: the probability of the band, of each bin for itself.

    Raises:
        ValueError: for ranks beyond S, and a level that is no probability.

    Reference:
        Talts et al. 2018, arXiv:1804.06788, section 3.
    """
    ranks = np.asarray(ranks)
    draws = whole("rank_histogram", "draws", draws, 1)
    bins = whole("rank_histogram", "bins", bins, 1)
    if ranks.ndim != 2 or not ranks.size or ranks.dtype.kind not in "iu" or ranks.min() < 0 or ranks.max() > draws:
        raise ValueError(
            f"rank_histogram: ranks are {ranks.dtype}{ranks.shape}; expected integers (N, D) up to {draws}"
        )
    bins = max(n for n in range(1, min(bins, draws + 1) + 1) if (draws + 1) % n == 0)
    n = len(ranks)
    counts = np.stack([np.bincount(r * bins // (draws + 1), minlength=bins) for r in ranks.T])
    low, high = _band("rank_histogram", n, 1 / bins, level)
    return RankHistogram(counts, n / bins, float(low), float(high))


def tarp_coverage(truth, samples, *, references=None, levels: int = 51, level: float = 0.95, seed: int = 0):
    """The expected coverage of credible regions that are balls about random points.

    For each simulation, f is the share of the posterior samples that are nearer to a reference point than the truth is:
    the ball through the truth is the region of level f. The coverage of a level is the share of simulations with f
    below it. For the true posterior it is the level, wherever the references are, as long as they depend on y alone.

    Args:
        truth: theta, (N, D).
        samples: of the posterior given each y, (N, S, D).
        references: a point for each simulation, (N, D); drawn in the box of the true numbers if None.
        levels: how many levels from 0 to 1.
        level: the probability of the band, of each level for itself.
        seed: the seed of the draw.

    Returns:
        `TarpCoverage`.

    Raises:
        ValueError: for other shapes, or numbers that are not finite.

    Reference:
        Lemos et al. 2023, arXiv:2302.03026, algorithm 2.
    """
    truth, samples = _simulations("tarp_coverage", truth, samples)
    levels = whole("tarp_coverage", "levels", levels, 2)
    span = np.where(np.ptp(truth, axis=0) > 0, np.ptp(truth, axis=0), 1)
    if references is None:
        references = truth.min(0) + span * np.random.default_rng(seed).uniform(size=truth.shape)
    references = np.asarray(references, np.float64)
    if references.shape != truth.shape:
        raise ValueError(f"tarp_coverage: references have shape {references.shape}; expected {truth.shape}")
    of_truth = (((truth - references) / span) ** 2).sum(-1)
    of_samples = (((samples - references[:, None]) / span) ** 2).sum(-1)
    nearer = (of_samples < of_truth[:, None]).sum(1)
    # the rank of the truth, even over 0, ..., S: spread over its cell, so that ties of level and rank cost nothing
    f = (nearer + np.random.default_rng(seed + 1).uniform(size=len(nearer))) / (samples.shape[1] + 1)
    at = np.linspace(0, 1, levels)
    coverage = (f[None] < at[:, None]).mean(1)
    low, high = (bound / len(truth) for bound in _band("tarp_coverage", len(truth), at, level))
    return TarpCoverage(at, coverage, low, high)


def _simulations(verb, truth, samples):
    truth, samples = np.asarray(truth, np.float64), np.asarray(samples, np.float64)
    if truth.ndim != 2 or samples.ndim != 3 or samples.shape[::2] != truth.shape or not samples.size:
        raise ValueError(f"{verb}: truth {truth.shape} and samples {samples.shape}; expected (N, D) and (N, S, D)")
    if not (np.isfinite(truth).all() and np.isfinite(samples).all()):
        raise ValueError(f"{verb}: truth and samples hold numbers that are not finite")
    return truth, samples


def _band(verb, n, p, level):
    """The quantiles of a binomial count of n with probability p, between which it is with probability `level`."""
    from scipy.stats import binom

    if not 0 < level < 1:
        raise ValueError(f"{verb}: level is the probability of the band, between 0 and 1; got {level}")
    return binom.ppf((1 - level) / 2, n, p), binom.ppf((1 + level) / 2, n, p)
