"""Losses, and what they are made of: laws of the noise level, weights, couplings, the variational bound."""

from jdiff.losses import coupling, levels, weights
from jdiff.losses.bound import variational_bound
from jdiff.losses.loss_aware import loss_aware
from jdiff.losses.regression import Regression, denoising, hybrid, uncertain
from jdiff.losses.vlb import vlb_prior, vlb_terms

__all__ = [
    "Regression", "coupling", "denoising", "hybrid", "levels", "loss_aware", "uncertain", "variational_bound",
    "vlb_prior", "vlb_terms", "weights",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
