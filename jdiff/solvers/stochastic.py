"""Euler-Maruyama's method for the reverse SDE."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.pytrees import noun
from jdiff.process import sde
from jdiff.solvers.base import Mix, is_positive, mix, nearly_noise
from jdiff.solvers.ddim import DDIM


@noun
class EulerMaruyama:
    """x_s = x + (f x - (1 + eta^2)/2 g^2 score) (s - t) + eta g sqrt(t - s) z.

    eta = 1 is the reverse SDE, eta = 0 the probability-flow ODE by Euler in t; all have the same marginals. A step from
    alpha = 0, where f is infinite, is one of `DDIM(eta)`.  Song et al. 2021, arXiv:2011.13456, eq. 6 and section 4.1.
    The noise of a step grows with eta^2, without a limit: above 1, take shorter steps. Raises ValueError for an eta
    that is negative or not finite.
    """

    eta: Number = 1.0
    order = 1

    def check(self):
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self):
        return is_positive(self.eta)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        no_signal = nearly_noise(schedule, t)
        inner = jnp.where(no_signal, s, t)  # a time at which f is finite
        f, g2 = sde.forward(schedule, inner)
        alpha, sigma = schedule.alpha(inner), schedule.sigma(inner)
        grow = 1 + f * (s - t)
        # x = alpha x_0 + sigma eps, and the score is -eps / sigma
        own = Mix(
            grow * alpha,
            grow * sigma + 0.5 * (1 + self.eta**2) * g2 * (s - t) / sigma,
            self.eta * safe_sqrt(g2 * (t - s)),
        )
        instead = DDIM(self.eta).plan(schedule, times, n)
        return Mix(*(jnp.where(no_signal, a, b) for a, b in zip(instead, own, strict=True)))

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        return mix(now.plan, prediction, x, key), state, prediction
