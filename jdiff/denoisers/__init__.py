"""From networks to denoisers: what a network regresses, what it is shown, and E[x_0 | x_t] made of the two."""

from jdiff.denoisers import adapt, conditioning, targets
from jdiff.denoisers.network import Denoiser, denoiser, remember

__all__ = ["Denoiser", "adapt", "conditioning", "denoiser", "remember", "targets"]


def __dir__() -> list[str]:
    return sorted(__all__)
