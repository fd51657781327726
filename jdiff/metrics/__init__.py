"""Distances between sets of samples, in NumPy float64, and a classifier that judges them."""

from jdiff.metrics.distances import frechet, nearest_distance, sliced_wasserstein
from jdiff.metrics.judge import Judge, fit_judge, load_judge, save_judge

__all__ = [
    "Judge", "fit_judge", "frechet", "load_judge", "nearest_distance", "save_judge", "sliced_wasserstein",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
