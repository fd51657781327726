"""Sampling: a solver over a grid of times, adaptive steps, all steps at once, and what watches them; likelihood."""

from jdiff.sampling.adaptive import sample_adaptive
from jdiff.sampling.callbacks import progress
from jdiff.sampling.dequantize import bits_per_dim, dequantize, many_draws
from jdiff.sampling.likelihood import decode, encode, log_likelihood
from jdiff.sampling.loop import invert, sample
from jdiff.sampling.picard import sample_parallel

__all__ = [
    "bits_per_dim", "decode", "dequantize", "encode", "invert", "log_likelihood", "many_draws", "progress", "sample",
    "sample_adaptive", "sample_parallel",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
