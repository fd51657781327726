"""Ancestral sampling: a deterministic step past s, then fresh noise back up to s."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.pytrees import Noun, noun, prints_as_call
from jdiff.process.forward import fresh_noise
from jdiff.solvers.base import OneStepSolver, check_base, is_positive, mixes, scaled_noise
from jdiff.solvers.ddim import DDIM
from jdiff.solvers.stages import DPM2, DPMpp2S

# Of the variance at s. A deterministic step cannot go down to no noise at all, so some of it is always left.
LARGEST_FRESH_SHARE = 1 - 1e-4


@noun
class Ancestral(Noun):
    """A deterministic step past s, and fresh noise back up to s.

    The share c of the noise that is renewed is that of `DDIM`, c = min(eta^2 (1 - SNR_t / SNR_s), 1). `base` goes from
    t down to the time d at which

        sigma_d / alpha_d = sqrt(1 - c) sigma_s / alpha_s,

    and then the noise that is missing is drawn:

        x_s = (alpha_s / alpha_d) x_d + sigma_s sqrt(c) z,    z ~ N(0, I).

    Args:
        base: a deterministic solver without memory: `Euler`, `Heun`, `RK4`, `DPM2`, `DPMpp2S`.
        eta: 0 or more. 0 is `base` alone; 1 renews as much as the posterior q(x_s | x_t, x_0) does.

    Raises:
        ValueError: for an eta that is negative or not finite, or a base with memory or noise of its own.

    Reference:
        Crowson's k-diffusion, `get_ancestral_step`.
    """

    base: OneStepSolver
    eta: Number = 1.0

    def check(self):
        check_range(self, 0, eta=self.eta)
        check_base(self, self.base)

    @property
    def stochastic(self) -> bool:
        return is_positive(self.eta)

    @property
    def order(self) -> int:
        return 1 if self.stochastic else self.base.order

    @property
    def mixes(self):
        return mixes(self.base)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        alpha, sigma = schedule.alpha(s), schedule.sigma(s)
        c = jnp.minimum(self.eta**2 * fresh_noise(schedule, t, s), LARGEST_FRESH_SHARE)
        down = jnp.where(c > 0, schedule.time_at(alpha, sigma * jnp.sqrt(1 - c)), s)
        # A table ends at its first knot. Noise that the step could not take off there must not be put back.
        kept_ratio = schedule.sigma(down) / (schedule.alpha(down) * sigma)
        c = jnp.where(c > 0, jnp.maximum(1 - (alpha * kept_ratio) ** 2, 0), 0)
        return down, self.base.between(schedule, t, down), alpha / schedule.alpha(down), sigma * safe_sqrt(c)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        down, base_plan, signal_scale, noise_scale = now.plan
        x, _, prediction = self.base.step(denoise, schedule, x, now._replace(s=down, plan=base_plan), (), None)
        return expand(signal_scale, x) * x + scaled_noise(noise_scale, x, key), state, prediction


@prints_as_call
def EulerAncestral(eta: Number = 1.0) -> DDIM:
    """Euler ancestral: `Ancestral` over `Euler`, in closed form.

        x_s = alpha_s x_0 + sigma_s (sqrt(1 - c) eps + sqrt(c) z),    c = min(eta^2 (1 - SNR_t / SNR_s), 1)

    This is `DDIM(eta)`, because Euler's step is the same in every coordinate.

    Args:
        eta: 0 or more; 0 is Euler's method.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Crowson's k-diffusion, `sample_euler_ancestral`.
    """
    return DDIM(eta)


@prints_as_call
def DPM2Ancestral(eta: Number = 1.0) -> Ancestral:
    """DPM2 ancestral: `Ancestral` over `DPM2`.

    Args:
        eta: 0 or more; 0 is `DPM2`.

    Returns:
        The solver, of two evaluations a step.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Crowson's k-diffusion, `sample_dpm_2_ancestral`.
    """
    return Ancestral(DPM2(), eta)


@prints_as_call
def DPMpp2SAncestral(eta: Number = 1.0) -> Ancestral:
    """DPM-Solver++(2S) ancestral: `Ancestral` over `DPMpp2S`.

    Args:
        eta: 0 or more; 0 is `DPMpp2S`.

    Returns:
        The solver, of two evaluations a step.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Crowson's k-diffusion, `sample_dpmpp_2s_ancestral`.
    """
    return Ancestral(DPMpp2S(), eta)
