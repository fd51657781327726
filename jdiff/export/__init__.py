"""Denoisers and samplers as files that run without the code that made them.

`save` writes a denoiser and `save_sampler` a whole sampler, as a folder of programs and parameters; `load` reads both.
"""

from jdiff.export.denoise import ExportedDenoise, save
from jdiff.export.folder import ExportError
from jdiff.export.loading import load
from jdiff.export.sampler import ExportedSampler, save_sampler

__all__ = ["ExportError", "ExportedDenoise", "ExportedSampler", "load", "save", "save_sampler"]
