"""Data sets: arrays in memory, their held-out part, and the way to and from the model's numbers."""

from jdiff.data.dataset import Dataset
from jdiff.data.embedded import DATASETS, digits, load, scurve, scurve_points
from jdiff.data.order import batch_indices

__all__ = ["DATASETS", "Dataset", "batch_indices", "digits", "load", "scurve", "scurve_points"]
