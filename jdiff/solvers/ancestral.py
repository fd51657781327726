"""Ancestral sampling: a deterministic step past s, then fresh noise back up to s."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.keys import normal
from jdiff.core.pytrees import noun
from jdiff.process.forward import fresh_noise
from jdiff.solvers.base import OneStepSolver, is_positive
from jdiff.solvers.ddim import DDIM
from jdiff.solvers.stages import DPM2, DPMpp2S

MOST_FRESH = 1 - 1e-4  # of the noise at s: a deterministic step cannot go down to none


@noun
class Ancestral:
    """`base` from t to the time d where sigma_d/alpha_d = sqrt(1 - c) sigma_s/alpha_s, then noise of share c.

    x_s = (alpha_s/alpha_d) x_d + sigma_s sqrt(c) z  with c = min(eta^2 (1 - SNR_t / SNR_s), 1), as in `DDIM`. `base`: a
    deterministic solver without memory (`Euler`, `Heun`, `DPM2`, `DPMpp2S`, ...).  Crowson's k-diffusion
    (`get_ancestral_step`). Raises ValueError for a negative eta or an unfit base.
    """

    base: object
    eta: Number = 1.0

    def check(self):
        check_range(self, 0, eta=self.eta)
        check_base(self, self.base)

    @property
    def stochastic(self):
        return is_positive(self.eta)

    @property
    def order(self):
        return 1 if self.stochastic else self.base.order

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        alpha, sigma = schedule.alpha(s), schedule.sigma(s)
        c = jnp.minimum(self.eta**2 * fresh_noise(schedule, t, s), MOST_FRESH)
        down = jnp.where(c > 0, schedule.time_at(alpha, sigma * jnp.sqrt(1 - c)), s)
        # a table ends at its first knot: what cannot be taken off there is not put back
        reached = schedule.sigma(down) / (schedule.alpha(down) * sigma)
        c = jnp.where(c > 0, jnp.maximum(1 - (alpha * reached) ** 2, 0), 0)
        return down, self.base.between(schedule, t, down), alpha / schedule.alpha(down), sigma * safe_sqrt(c)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        down, plan, grow, noise = now.plan
        x, _, prediction = self.base.step(denoise, schedule, x, now._replace(s=down, plan=plan), (), None)
        return expand(grow, x) * x + scaled_noise(noise, x, key), state, prediction


def check_base(solver, base) -> None:
    """Raise ValueError unless `base` is a deterministic solver without memory."""
    name = type(solver).__name__
    if not isinstance(base, OneStepSolver):
        raise ValueError(f"{name}: {type(base).__name__} cannot step between free times; use Euler, Heun, RK4 or DPM2")
    if base.stochastic:
        raise ValueError(f"{name}: {type(base).__name__} draws noise of its own; use Euler, Heun, RK4 or DPM2")


def scaled_noise(scale, x, key):
    """scale z; without a key nan where it is not 0, never left out."""
    scale = expand(scale, x)
    if key is None:
        return jnp.where(scale == 0, 0, jnp.nan).astype(x.dtype)
    return scale * normal(key, x.shape, x.dtype)


def EulerAncestral(eta: Number = 1.0) -> DDIM:
    """Euler ancestral: x_s = alpha_s x_0 + sigma_s (sqrt(1 - c) eps + sqrt(c) z), which is DDIM(eta).

    Crowson's k-diffusion; the identity holds because Euler's step is the same in every coordinate.
    """
    return DDIM(eta)


def DPM2Ancestral(eta: Number = 1.0) -> Ancestral:
    """DPM2 ancestral: `Ancestral` over `DPM2`.  Crowson's k-diffusion."""
    return Ancestral(DPM2(), eta)


def DPMpp2SAncestral(eta: Number = 1.0) -> Ancestral:
    """DPM-Solver++(2S) ancestral: `Ancestral` over `DPMpp2S`.  Crowson's k-diffusion."""
    return Ancestral(DPMpp2S(), eta)
