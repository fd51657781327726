"""Sampling: a solver over a grid of times, adaptive steps, all steps at once, and what watches them."""

from jdiff.sampling.adaptive import sample_adaptive
from jdiff.sampling.callbacks import progress
from jdiff.sampling.loop import invert, sample
from jdiff.sampling.picard import sample_parallel

__all__ = ["invert", "progress", "sample", "sample_adaptive", "sample_parallel"]


def __dir__() -> list[str]:
    return sorted(__all__)
