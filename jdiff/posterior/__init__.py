"""Sampling given an observation y = A(x_0) + noise, or a reward: denoisers given y, and weighted particles."""

from jdiff.posterior.ddnm import ddnm, replace
from jdiff.posterior.diffpir import diffpir
from jdiff.posterior.dps import dps
from jdiff.posterior.mmps import mmps
from jdiff.posterior.observation import PerSample
from jdiff.posterior.operators import (
    Blur,
    Grey,
    Identity,
    Magnitude,
    Mask,
    Separable,
    adjoint,
    bicubic,
    box,
    gaussian_blur,
    motion_kernel,
    random_pixels,
)
from jdiff.posterior.pgdm import pgdm
from jdiff.posterior.tmpd import tmpd

__all__ = [
    "Blur",
    "Grey",
    "Identity",
    "Magnitude",
    "Mask",
    "PerSample",
    "Separable",
    "adjoint",
    "bicubic",
    "box",
    "ddnm",
    "diffpir",
    "dps",
    "gaussian_blur",
    "mmps",
    "motion_kernel",
    "pgdm",
    "random_pixels",
    "replace",
    "tmpd",
]
