"""Churn: before each step a little noise on top, as in EDM's stochastic sampler."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.pytrees import Noun, noun, prints_as_call
from jdiff.solvers.base import OneStepSolver, check_base, is_positive, mixes, nearly_noise, scaled_noise
from jdiff.solvers.runge_kutta import Heun

LARGEST_GAMMA = 2**0.5 - 1  # the paper's: no step adds more noise than x already has


@noun
class Churn(Noun):
    """A little fresh noise, and then a deterministic step from the higher noise level down to s.

    With r = sigma_t / alpha_t and N the number of times, x is first brought up to the time t' of ratio r':

        gamma = min(churn / N, sqrt(2) - 1) where s_min <= r <= s_max, else 0
        r' = (1 + gamma) r
        x_t' / alpha_t' = x_t / alpha_t + s_noise sqrt(r'^2 - r^2) z,    z ~ N(0, I)

    and then `base` goes from t' to s. Where the schedule ends, gamma is cut to what the schedule reaches; `VE` and
    `EDM` go on beyond t = 1.

    Args:
        base: a deterministic solver without memory: `Euler`, `Heun`, `RK4`, `DPM2`, `DPMpp2S`.
        churn: the total amount of noise added, S_churn in the paper, 0 or more; 0 is `base` alone.
        s_min: the lowest noise level at which noise is added, in units of sigma/alpha, 0 or more.
        s_max: the highest such level, in the same units.
        s_noise: the standard deviation of the fresh noise, 0 or more; slightly above 1 makes up for a network that
            removes too much.

    Raises:
        ValueError: for negative numbers, or a base with memory or noise of its own.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """

    base: OneStepSolver
    churn: Number = 40.0
    s_min: Number = 0.0
    s_max: Number = float("inf")
    s_noise: Number = 1.0

    def check(self):
        check_range(self, 0, churn=self.churn, s_min=self.s_min, s_noise=self.s_noise)
        check_range(self, 0, float("inf"), s_max=self.s_max)
        check_base(self, self.base)

    @property
    def order(self) -> int:
        return self.base.order if not self.stochastic else 1

    @property
    def stochastic(self) -> bool:
        return is_positive(self.churn)

    @property
    def mixes(self):
        return mixes(self.base)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        no_signal = nearly_noise(schedule, t)
        ratio = sigma / jnp.where(no_signal, 1, alpha)
        inside = ~no_signal & (ratio >= self.s_min) & (ratio <= self.s_max)
        gamma = jnp.where(inside, jnp.minimum(self.churn / n, LARGEST_GAMMA), 0)
        up = jnp.minimum(schedule.time_at(alpha, (1 + gamma) * sigma), schedule.last_time)
        up = jnp.where((gamma > 0) & (up > t), up, t)
        signal_scale = jnp.where(no_signal, 1, schedule.alpha(up) / jnp.where(no_signal, 1, alpha))
        variance = jnp.where(up > t, schedule.sigma(up) ** 2 - (signal_scale * sigma) ** 2, 0)
        return up, signal_scale, self.s_noise * safe_sqrt(variance), self.base.between(schedule, up, s)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        up, signal_scale, noise_scale, base_plan = now.plan
        x = expand(signal_scale, x) * x + scaled_noise(noise_scale, x, key)
        return self.base.step(denoise, schedule, x, now._replace(t=up, plan=base_plan), state, None)


@prints_as_call
def EDMStochastic(churn: Number = 40.0, s_min: Number = 0.05, s_max: Number = 50.0, s_noise: Number = 1.003) -> Churn:
    """EDM's stochastic sampler: `Churn` over `Heun`. The defaults are those of ImageNet-64 in table 5.

    Args:
        churn: the total amount of noise added, S_churn in the paper, 0 or more; 0 is `Heun`.
        s_min: the lowest noise level at which noise is added, in units of sigma/alpha, 0 or more.
        s_max: the highest such level, in the same units.
        s_noise: the standard deviation of the fresh noise, 0 or more.

    Returns:
        The solver, of two evaluations a step.

    Raises:
        ValueError: for negative numbers.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, algorithm 2.
    """
    return Churn(Heun(), churn, s_min, s_max, s_noise)
