"""One-step methods for the probability-flow ODE."""

from typing import NamedTuple

import jax.numpy as jnp

from jdiff.arrays import Array, expand, noun
from jdiff.forward import predict
from jdiff.solvers.base import Mix, mix

LEAST_ALPHA = 1e-4  # of sigma: below it, 1/alpha would amplify rounding, and a step in sigma/alpha is endless


@noun
class Euler:
    """x_s = alpha_s x_0 + sigma_s eps: Euler's method in sigma/alpha, and in t for `Flow`.

    It is `DDIM(eta=0)` under its other name: with x_0 and eps held fixed, every coordinate gives the same step.
    Karras et al. 2022, arXiv:2206.00364, algorithm 1 without its correction.
    """

    order = 1
    stochastic = False

    def plan(self, schedule, times, n):
        s = times[1:]
        sigma = schedule.sigma(s)
        return Mix(schedule.alpha(s), sigma, jnp.zeros_like(sigma))

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        return mix(now.plan, predict(denoise, schedule, x, now.t), x, None), state


class _Correction(NamedTuple):
    predictor: Mix
    x0: Array
    eps: Array


@noun
class Heun:
    """The trapezoidal rule after an Euler step: second order for two evaluations.

    With m = alpha, the rule in sigma/alpha (Karras et al. 2022, arXiv:2206.00364, algorithm 1); with m = alpha + sigma,
    the rule in sigma/(alpha + sigma), which is t for `Flow` and finite at alpha = 0:
    x_s = y + ((alpha_s - m_s alpha_t / m_t) (x_0' - x_0) + (sigma_s - m_s sigma_t / m_t) (eps' - eps)) / 2, where y is
    Euler's x_s and the primes are predictions at (y, s). Each step takes m = alpha unless alpha_t is (nearly) 0.
    """

    order = 2
    stochastic = False

    def plan(self, schedule, times, n):
        alpha, sigma = schedule.alpha(times), schedule.sigma(times)
        tiny = alpha[:-1] < LEAST_ALPHA * sigma[:-1]
        m_t = jnp.where(tiny, alpha[:-1] + sigma[:-1], jnp.where(tiny, 1, alpha[:-1]))
        m_s = jnp.where(tiny, alpha[1:] + sigma[1:], alpha[1:])
        of_x0 = jnp.where(tiny, alpha[1:] - m_s / m_t * alpha[:-1], 0)
        return _Correction(Euler().plan(schedule, times, n), of_x0, sigma[1:] - m_s / m_t * sigma[:-1])

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        first = predict(denoise, schedule, x, now.t)
        y = mix(now.plan.predictor, first, x, None)
        second = predict(denoise, schedule, y, now.s)
        of_x0, of_eps = expand(now.plan.x0, x), expand(now.plan.eps, x)
        return y + 0.5 * (of_x0 * (second.x0 - first.x0) + of_eps * (second.eps - first.eps)), state
