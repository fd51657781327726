"""jdiff: diffusion models in JAX as pure functions over pytrees.

x_t = alpha_t x_0 + sigma_t eps, with t in [0, 1] and noise growing with t. A schedule gives alpha and sigma; a network
becomes `denoise(x_t, t) -> E[x_0 | x_t]`; a solver steps from t to s < t; `sample` runs it over a grid of times.
"""

import importlib
from typing import TYPE_CHECKING, Any

from jdiff import convert, export, guidance, losses, models, posterior, solvers, train
from jdiff.core.brownian import BrownianTree
from jdiff.core.keys import BatchKey
from jdiff.core.pytrees import Noun, concrete, noun, per_sample, static
from jdiff.denoisers import adapt, conditioning, denoiser, targets
from jdiff.losses import coupling, levels, variational_bound, weights
from jdiff.models import create_model, list_models, quantize, register_model
from jdiff.process import betas, forward, grid, oracle, schedules, sde
from jdiff.process.betas import discrete
from jdiff.process.clock import Schedule, log_snr, time_of
from jdiff.process.declare import schedule
from jdiff.process.forward import eps_from, prior, q_posterior, q_sample
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.process.schedules import EDM, VE, VP, Cosine, Flow, SubVP
from jdiff.process.shifted import Shifted
from jdiff.process.table import Discrete
from jdiff.sampling import (
    bits_per_dim,
    decode,
    dequantize,
    encode,
    invert,
    log_likelihood,
    many_draws,
    progress,
    sample,
    sample_adaptive,
    sample_parallel,
)
from jdiff.train import ema, optim, parallel

if TYPE_CHECKING:
    from jdiff import config as config
    from jdiff import data as data
    from jdiff import metrics as metrics
    from jdiff import runs as runs

__version__ = "0.1.0"
__all__ = [
    "adapt", "as_denoise", "BatchKey", "betas", "bits_per_dim", "BrownianTree", "concrete", "conditioning", "convert",
    "Cosine", "coupling", "create_model", "decode", "Denoise", "denoiser", "dequantize", "discrete", "Discrete",
    "EDM", "ema", "encode", "eps_from", "export", "Flow", "forward", "grid", "guidance", "invert", "levels",
    "list_models", "log_likelihood", "log_snr", "losses", "many_draws", "models", "Noun", "noun", "optim",
    "oracle", "parallel", "per_sample", "posterior", "Prediction", "prior", "progress", "q_posterior",
    "q_sample", "quantize", "register_model", "sample", "sample_adaptive", "sample_parallel", "Schedule", "schedule",
    "schedules", "sde", "Shifted", "solvers", "static", "SubVP", "targets", "time_of", "train",
    "variational_bound", "VE", "VP", "weights",
]  # fmt: skip

LAZY = ("config", "data", "metrics", "runs")  # folders that bring heavier libraries along, when they are first named


def __getattr__(name: str) -> Any:
    if name in LAZY:
        return importlib.import_module(f"jdiff.{name}")
    raise AttributeError(f"module 'jdiff' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted([*__all__, *LAZY, "__version__"])
