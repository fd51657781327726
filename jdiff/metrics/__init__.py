"""Distances between sets of samples, in NumPy float64."""

from jdiff.metrics.distances import frechet, nearest_distance, sliced_wasserstein

__all__ = ["frechet", "nearest_distance", "sliced_wasserstein"]
