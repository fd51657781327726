"""Churn: before each step a little noise on top, as in EDM's stochastic sampler."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.pytrees import noun
from jdiff.solvers.ancestral import check_base, scaled_noise
from jdiff.solvers.base import is_positive, nearly_noise
from jdiff.solvers.runge_kutta import Heun

MOST_CHURN = 2**0.5 - 1


@noun
class Churn:
    """From t up to r' = (1 + gamma) sigma_t/alpha_t with noise s_noise sqrt(r'^2 - r^2) z, then `base` from there to s.

    gamma = min(churn / N, sqrt(2) - 1) where s_min <= sigma_t/alpha_t <= s_max, else 0; N is the number of times. Where
    the schedule ends, gamma is cut to what it reaches (`VE` and `EDM` go on).  Karras et al. 2022, arXiv:2206.00364,
    algorithm 2. Raises ValueError for negative numbers or an unfit base.
    """

    base: object
    churn: Number = 40.0
    s_min: Number = 0.0
    s_max: Number = float("inf")
    s_noise: Number = 1.0

    def check(self):
        check_range(self, 0, churn=self.churn, s_min=self.s_min, s_noise=self.s_noise)
        check_range(self, 0, float("inf"), s_max=self.s_max)
        check_base(self, self.base)

    @property
    def order(self):
        return self.base.order if not self.stochastic else 1

    @property
    def stochastic(self):
        return is_positive(self.churn)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        alpha, sigma = schedule.alpha(t), schedule.sigma(t)
        no_signal = nearly_noise(schedule, t)
        ratio = sigma / jnp.where(no_signal, 1, alpha)
        inside = ~no_signal & (ratio >= self.s_min) & (ratio <= self.s_max)
        gamma = jnp.where(inside, jnp.minimum(self.churn / n, MOST_CHURN), 0)
        up = jnp.minimum(schedule.time_at(alpha, (1 + gamma) * sigma), schedule.last_time)
        up = jnp.where((gamma > 0) & (up > t), up, t)
        grow = jnp.where(no_signal, 1, schedule.alpha(up) / jnp.where(no_signal, 1, alpha))
        more = jnp.where(up > t, schedule.sigma(up) ** 2 - (grow * sigma) ** 2, 0)
        return up, grow, self.s_noise * safe_sqrt(more), self.base.between(schedule, up, s)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        up, grow, noise, plan = now.plan
        x = expand(grow, x) * x + scaled_noise(noise, x, key)
        return self.base.step(denoise, schedule, x, now._replace(t=up, plan=plan), state, None)


def EDMStochastic(churn: Number = 40.0, s_min: Number = 0.05, s_max: Number = 50.0, s_noise: Number = 1.003) -> Churn:
    """EDM's stochastic sampler: `Churn` over `Heun`, two evaluations a step; the defaults are ImageNet-64's of table 5.

    Karras et al. 2022, arXiv:2206.00364, algorithm 2. Raises ValueError for negative numbers.
    """
    return Churn(Heun(), churn, s_min, s_max, s_noise)
