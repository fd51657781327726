"""One-step methods of Runge and Kutta for the probability-flow ODE: Euler, Heun, RK4."""

from typing import NamedTuple

import jax.numpy as jnp

from jdiff.core.arrays import Array, expand
from jdiff.core.pytrees import Noun, noun, prints_as_call, static
from jdiff.solvers.base import Mix, mix, nearly_noise


class StagePoint(NamedTuple):
    """Where a stage stands, in every step: its time, the coefficients of its first-order part, and m there; (N,)."""

    t: Array
    first_order: Mix
    m: Array


class RungeKuttaPlan(NamedTuple):
    """The points of the stages, and D(alpha/m) and D(sigma/m) over every step, (N,)."""

    points: tuple[StagePoint, ...]
    alpha_change: Array
    sigma_change: Array


@noun
class RungeKutta(Noun):
    """An explicit Runge-Kutta method for the probability-flow ODE in sigma/alpha.

    With x = m y the ODE is

        y' = (alpha/m)' x_0 + (sigma/m)' eps,

    in the coordinate in which both factors are linear. m = alpha gives sigma/alpha. Where alpha is 0, or nearly so,
    m = alpha + sigma gives sigma/(alpha + sigma), which is t for `Flow`. Stage k is

        x_k = alpha_k x_0 + sigma_k eps + m_k sum_j a_kj (D(alpha/m) (x_0j - x_0) + D(sigma/m) (eps_j - eps)),

    with D the change over the step, and x_0 and eps those at x_t.

    Args:
        order: the order of the method.
        rows: Butcher's a without its first row, which is empty; then b.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, eq. 4 and algorithm 1, for m = alpha.
    """

    order: int = static()
    rows: tuple = static()
    stochastic = False

    @property
    def mixes(self):
        return len(self.rows) == 1

    def between(self, schedule, t, s):
        """The plan of steps from t (N,) to s (N,), wherever they are."""
        (alpha_t, sigma_t), (alpha_s, sigma_s) = ((schedule.alpha(u), schedule.sigma(u)) for u in (t, s))
        no_signal = nearly_noise(schedule, t)
        m_t = jnp.where(no_signal, alpha_t + sigma_t, jnp.where(no_signal, 1, alpha_t))
        m_s = jnp.where(no_signal, alpha_s + sigma_s, jnp.where(no_signal, 1, alpha_s))
        # alpha/m for m = alpha is written as 1, so that its change is exactly 0
        alpha = jnp.where(no_signal, alpha_t / m_t, 1), jnp.where(no_signal, alpha_s / m_s, 1)
        sigma = sigma_t / m_t, sigma_s / m_s
        points = []
        for row in self.rows:
            c = sum(row)
            # The end of the step is s itself, and not what the schedule's inverse rounds it to.
            at_end = abs(c - 1) < 1e-9
            t_stage = s if at_end else schedule.time_at(*(a + c * (b - a) for a, b in (alpha, sigma)))
            alpha_stage, sigma_stage = schedule.alpha(t_stage), schedule.sigma(t_stage)
            first_order = Mix(alpha_stage, sigma_stage, jnp.zeros_like(alpha_stage))
            points.append(
                StagePoint(t_stage, first_order, jnp.where(no_signal, alpha_stage + sigma_stage, alpha_stage))
            )
        return RungeKuttaPlan(tuple(points), alpha[1] - alpha[0], sigma[1] - sigma[0])

    def plan(self, schedule, times, n, breaks=None):
        return self.between(schedule, times[:-1], times[1:])

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        first = denoise.predict(x, now.t)
        predictions = [first]
        alpha_change, sigma_change = expand(now.plan.alpha_change, x), expand(now.plan.sigma_change, x)
        for i, (row, point) in enumerate(zip(self.rows, now.plan.points, strict=True)):
            y = mix(point.first_order, first, x, None)
            for a, other in zip(row[1:], predictions[1:], strict=True):
                if a:
                    change = alpha_change * (other.x0 - first.x0) + sigma_change * (other.eps - first.eps)
                    y = y + expand(a * point.m, x) * change
            if i < len(self.rows) - 1:
                predictions.append(denoise.predict(y, point.t))
        return y, state, first


@prints_as_call
def Euler() -> RungeKutta:
    """Euler's method in sigma/alpha.

        x_s = alpha_s x_0 + sigma_s eps

    It is `DDIM(eta=0)` under its other name: with x_0 and eps held fixed, every coordinate gives the same step. For
    `Flow` it is also Euler's method in t.

    Returns:
        The solver, of first order, with one evaluation a step.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, algorithm 1 without its correction.
    """
    return RungeKutta(1, ((1.0,),))


@prints_as_call
def Heun() -> RungeKutta:
    """Heun's method: the trapezoidal rule after an Euler step, in r = sigma/alpha.

        y   = alpha_s x_0(x_t) + sigma_s eps(x_t)
        x_s = y + alpha_s (r_s - r_t) (eps(y) - eps(x_t)) / 2

    From alpha = 0 it is the same rule in sigma/(alpha + sigma), which is t for `Flow`.

    Returns:
        The solver, of second order, with two evaluations a step.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, algorithm 1.
    """
    return RungeKutta(2, ((1.0,), (0.5, 0.5)))


@prints_as_call
def RK4() -> RungeKutta:
    """The classical method of Runge and Kutta, in r = sigma/alpha.

        x_s = (alpha_s / alpha_t) x_t + alpha_s (r_s - r_t) (eps_1 + 2 eps_2 + 2 eps_3 + eps_4) / 6

    eps_1 is the prediction at x_t. eps_2 and eps_3 are those in the middle of the step, reached along eps_1 and eps_2.
    eps_4 is that at its end, reached along eps_3. From alpha = 0 it is the same rule in sigma/(alpha + sigma).

    Returns:
        The solver, of fourth order, with four evaluations a step.

    Reference:
        Kutta 1901; Karras et al. 2022, arXiv:2206.00364, eq. 4 for the ODE.
    """
    return RungeKutta(4, ((0.5,), (0.0, 0.5), (0.0, 0.0, 1.0), (1 / 6, 1 / 3, 1 / 3, 1 / 6)))
