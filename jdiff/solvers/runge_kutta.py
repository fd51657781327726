"""One-step methods of Runge and Kutta for the probability-flow ODE: Euler, Heun, RK4."""

from typing import NamedTuple

import jax.numpy as jnp

from jdiff.core.arrays import Array, expand
from jdiff.core.pytrees import noun, static
from jdiff.solvers.base import Mix, mix, nearly_noise


class _Plan(NamedTuple):
    t: tuple  # of each stage
    first: tuple
    x0: Array
    eps: Array


@noun
class RungeKutta:
    """An explicit Runge-Kutta method in sigma/alpha, or where alpha is (nearly) 0 in sigma/(alpha + sigma).

    With x = m y,  y' = (alpha/m)' x_0 + (sigma/m)' eps  in the coordinate in which both factors are linear: m = alpha
    gives sigma/alpha (Karras et al. 2022, arXiv:2206.00364, algorithm 1), m = alpha + sigma gives t for `Flow`, finite
    at alpha = 0. Stage k is  alpha_k x_0 + sigma_k eps + m_k sum_j a_kj (D(alpha/m) (x_0j - x_0) + D(sigma/m) (eps_j -
    eps)), with D the change over the step. `rows`: Butcher's a without its first, empty row; then b.
    """

    order: int = static()
    rows: tuple = static()
    stochastic = False

    def between(self, schedule, t, s):
        """The plan of steps from t (N,) to s (N,), wherever they are."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, s))
        no_signal = nearly_noise(schedule, t)
        m_t = jnp.where(no_signal, alpha_t + sigma_t, jnp.where(no_signal, 1, alpha_t))
        m_s = jnp.where(no_signal, alpha_s + sigma_s, jnp.where(no_signal, 1, alpha_s))
        # over alpha itself the change is exactly 0
        alpha = jnp.where(no_signal, alpha_t / m_t, 1), jnp.where(no_signal, alpha_s / m_s, 1)
        sigma = sigma_t / m_t, sigma_s / m_s
        times, first = [], []
        for row in self.rows:
            c = sum(row)
            if abs(c - 1) < 1e-9:
                here = s
            else:
                here = schedule.time_at(*(a + c * (b - a) for a, b in (alpha, sigma)))
            a, b = schedule.alpha(here), schedule.sigma(here)
            times.append(here)
            first.append((Mix(a, b, jnp.zeros_like(a)), jnp.where(no_signal, a + b, a)))
        return _Plan(tuple(times), tuple(first), alpha[1] - alpha[0], sigma[1] - sigma[0])

    def plan(self, schedule, times, n, breaks=None):
        return self.between(schedule, times[:-1], times[1:])

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        known = [denoise.predict(x, now.t)]
        of_x0, of_eps = expand(now.plan.x0, x), expand(now.plan.eps, x)
        for i, row in enumerate(self.rows):
            first, m = now.plan.first[i]
            y = mix(first, known[0], x, None)
            for a, other in zip(row[1:], known[1:], strict=True):
                if a:
                    change = of_x0 * (other.x0 - known[0].x0) + of_eps * (other.eps - known[0].eps)
                    y = y + expand(a * m, x) * change
            if i < len(self.rows) - 1:
                known.append(denoise.predict(y, now.plan.t[i]))
        return y, state, known[0]


def Euler() -> RungeKutta:
    """x_s = alpha_s x_0 + sigma_s eps: Euler's method in sigma/alpha, and in t for `Flow`; one evaluation.

    It is `DDIM(eta=0)` under its other name: with x_0 and eps held fixed, every coordinate gives the same step.
    Karras et al. 2022, arXiv:2206.00364, algorithm 1 without its correction.
    """
    return RungeKutta(1, ((1.0,),))


def Heun() -> RungeKutta:
    """The trapezoidal rule after an Euler step: second order for two evaluations.

    Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    return RungeKutta(2, ((1.0,), (0.5, 0.5)))


def RK4() -> RungeKutta:
    """The classical method of Runge and Kutta: fourth order for four evaluations.  Kutta 1901."""
    return RungeKutta(4, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)))
