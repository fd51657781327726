"""From networks to denoisers: what a network regresses, what it is shown, and E[x_0 | x_t] made of the two."""

from jdiff.denoisers.network import Denoiser, denoiser, remember

__all__ = ["Denoiser", "denoiser", "remember"]
