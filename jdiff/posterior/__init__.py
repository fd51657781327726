"""Sampling given an observation y = A(x_0) + noise, or a reward: denoisers given y, and weighted particles."""

from jdiff.posterior import potentials, resampling
from jdiff.posterior.ddnm import ddnm, replace
from jdiff.posterior.diffpir import diffpir
from jdiff.posterior.dps import dps
from jdiff.posterior.kld import KLD, kld_count
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
from jdiff.posterior.repaint import repaint
from jdiff.posterior.smc import Particles, smc
from jdiff.posterior.tmpd import tmpd
from jdiff.posterior.twisted import likelihood, twisted

__all__ = [
    "Blur",
    "Grey",
    "Identity",
    "KLD",
    "Magnitude",
    "Mask",
    "Particles",
    "PerSample",
    "Separable",
    "adjoint",
    "bicubic",
    "box",
    "ddnm",
    "diffpir",
    "dps",
    "gaussian_blur",
    "kld_count",
    "likelihood",
    "mmps",
    "motion_kernel",
    "pgdm",
    "potentials",
    "random_pixels",
    "repaint",
    "replace",
    "resampling",
    "smc",
    "tmpd",
    "twisted",
]
