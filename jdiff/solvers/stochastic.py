"""Euler-Maruyama's method for the reverse SDE."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.pytrees import Noun, noun
from jdiff.process import sde
from jdiff.solvers.base import Mix, is_positive, mix, nearly_noise
from jdiff.solvers.ddim import DDIM


@noun
class EulerMaruyama(Noun):
    """Euler-Maruyama's method in t, for the family of reverse SDEs that all have the same marginals.

        x_s = x_t + (f x_t - (1 + eta^2) / 2 g^2 score) (s - t) + eta g sqrt(t - s) z,    z ~ N(0, I)

    A step from alpha = 0, where f is infinite, is one of `DDIM(eta)`.

    Args:
        eta: 0 or more. 1 is the reverse SDE, and 0 is Euler's method in t for the probability-flow ODE. The noise of a
            step grows with eta^2 without a limit: above 1, take shorter steps.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Song et al. 2021, arXiv:2011.13456, eq. 6 and section 4.1.
    """

    eta: Number = 1.0
    order = 1
    mixes = True

    def check(self):
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self) -> bool:
        return is_positive(self.eta)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        no_signal = nearly_noise(schedule, t)
        finite_t = jnp.where(no_signal, s, t)  # a time at which f is finite
        f, g2 = sde.forward(schedule, finite_t)
        alpha, sigma = schedule.alpha(finite_t), schedule.sigma(finite_t)
        x_scale = 1 + f * (s - t)
        # x = alpha x_0 + sigma eps, and the score is -eps / sigma
        euler = Mix(
            x_scale * alpha,
            x_scale * sigma + 0.5 * (1 + self.eta**2) * g2 * (s - t) / sigma,
            self.eta * safe_sqrt(g2 * (t - s)),
        )
        ddim = DDIM(self.eta).plan(schedule, times, n)
        return Mix(*(jnp.where(no_signal, a, b) for a, b in zip(ddim, euler, strict=True)))

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        return mix(now.plan, prediction, x, key), state, prediction
