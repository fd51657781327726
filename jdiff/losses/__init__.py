"""Losses, and what they are made of: laws of the noise level, weights, couplings, the variational bound."""

from jdiff.losses.regression import denoising, hybrid, loss_aware, uncertain
from jdiff.losses.vlb import vlb_prior, vlb_terms

__all__ = ["denoising", "hybrid", "loss_aware", "uncertain", "vlb_prior", "vlb_terms"]
