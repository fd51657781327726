"""Guidance: functions from denoisers to a denoiser. w = 1 is no guidance."""

from jdiff.guidance.cfg import cfg
from jdiff.guidance.interval import interval
from jdiff.guidance.threshold import threshold

__all__ = ["cfg", "interval", "threshold"]
