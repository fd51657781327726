"""Guidance: functions from denoisers to a denoiser. w = 1 is no guidance."""

from jdiff.guidance.apg import apg
from jdiff.guidance.autoguidance import autoguidance
from jdiff.guidance.cached import cached
from jdiff.guidance.cfg import cfg
from jdiff.guidance.cfg_pp import cfg_pp
from jdiff.guidance.classifier import classifier, classifier_x0
from jdiff.guidance.compose import compose
from jdiff.guidance.interval import interval, interval_of_steps
from jdiff.guidance.rescale import rescale
from jdiff.guidance.tcfg import tcfg
from jdiff.guidance.threshold import threshold
from jdiff.guidance.zero_star import zero_star

__all__ = [
    "apg", "autoguidance", "cached", "cfg", "cfg_pp", "classifier", "classifier_x0", "compose", "interval",
    "interval_of_steps", "rescale", "tcfg", "threshold", "zero_star",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
