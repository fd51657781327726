"""jdiff: diffusion models in JAX as pure functions over pytrees.

x_t = alpha_t x_0 + sigma_t eps, with t in [0, 1] and noise growing with t. A schedule gives alpha and sigma; a network
becomes `denoise(x_t, t) -> E[x_0 | x_t]`; a solver steps from t to s < t; `sample` runs it over a grid of times.
"""

from jdiff import betas, conditioning, forward, grid, guidance, levels, losses, oracle, sde, solvers, targets, weights

from jdiff import convert, ema, models, optim, parallel, train  # isort: skip
from jdiff.adaptive import sample_adaptive
from jdiff.arrays import BatchKey
from jdiff.betas import discrete
from jdiff.callbacks import progress
from jdiff.denoisers import denoiser
from jdiff.forward import Prediction, eps_from, prior, q_posterior, q_sample
from jdiff.models import create_model, list_models, register_model
from jdiff.noise import BrownianTree
from jdiff.picard import sample_parallel
from jdiff.sampling import invert, sample
from jdiff.schedules import EDM, VE, VP, Cosine, Discrete, Flow, Shifted, SubVP, log_snr, time_of

__version__ = "0.1.0"
