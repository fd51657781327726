"""Autoguidance: a model guided by a worse version of itself."""

from collections.abc import Callable

from jdiff.guidance.cfg import Guided, cfg
from jdiff.process.prediction import Denoise


def autoguidance(good: Denoise | Callable, bad: Denoise | Callable, w) -> Guided:
    """Autoguidance:  x_0 = b + w (g - b),  away from what a worse model of the same data and condition says.

    Both models are given the same condition, so that w leads to better samples and not to a narrower class. The bad
    one is smaller, trained for less time, or both. It is EDM2's `gnet`, and w is its `guidance`.

    Args:
        good: g, a denoiser or a function (x, t) -> E[x_0 | x_t].
        bad: b, the worse one.
        w: the weight, as for `cfg`: 1 is the good model, 1.5 to 3 are usual.

    Returns:
        The guided denoiser; its `extra` is the good one's.

    Raises:
        ValueError: for a weight that is no finite number, and denoisers of different schedules.

    Reference:
        Karras et al. 2024, arXiv:2406.02507, eq. 3.
    """
    return cfg(good, bad, w)
