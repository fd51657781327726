"""Distances between sets of samples, in NumPy float64; calibration of posteriors; a classifier that judges samples."""

from jdiff.metrics.calibration import RankHistogram, TarpCoverage, rank_histogram, sbc_ranks, tarp_coverage
from jdiff.metrics.classifiers import classifier_two_sample, inception_score
from jdiff.metrics.distances import (
    energy_distance,
    frechet,
    frechet_bias,
    frechet_distance,
    frechet_of,
    kernel_distance,
    mmd,
    nearest_distance,
    sliced_wasserstein,
)
from jdiff.metrics.inception import Inception
from jdiff.metrics.judge import Judge, fit_judge, load_judge, save_judge
from jdiff.metrics.moments import Moments, read_statistics, write_statistics
from jdiff.metrics.neighbours import density_coverage, precision_recall

__all__ = [
    "Inception", "Judge", "Moments", "RankHistogram", "TarpCoverage", "classifier_two_sample", "density_coverage",
    "energy_distance", "fit_judge", "frechet", "frechet_bias", "frechet_distance", "frechet_of", "inception_score",
    "kernel_distance", "load_judge", "mmd", "nearest_distance", "precision_recall", "rank_histogram",
    "read_statistics", "save_judge", "sbc_ranks", "sliced_wasserstein", "tarp_coverage", "write_statistics",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
