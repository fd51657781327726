"""Multistep methods on eps: LMS, DEIS, exponential Adams-Bashforth, PNDM, iPNDM, gradient estimation."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand
from jdiff.core.checks import LARGEST, check_range
from jdiff.core.pytrees import noun
from jdiff.solvers import stages
from jdiff.solvers.base import Mix, check_order, mix, steps_before
from jdiff.solvers.multistep import Multistep, Start, starting
from jdiff.solvers.polynomial import DATA, NOISE, NOISE_BY_INDEX, NOISE_BY_RATIO, NOISE_BY_TIME


def LMS(order: int = 4, start: str = "low_order") -> Multistep:
    """Linear multistep (Adams-Bashforth) in sigma/alpha: eps a polynomial in sigma/alpha.

    With order 1 it is Euler's method. Of second order globally, unless start="single_step".
    Crowson's k-diffusion; Karras et al. 2022, arXiv:2206.00364, eq. 3. Raises ValueError for an order below 1.
    """
    check_order("LMS", order)
    return Multistep(None, order, NOISE_BY_RATIO, None, 0, starting("LMS", start, order, NOISE), low_order_below=0)


def DEIS(order: int = 3, coordinate: str = "t", start: str = "low_order") -> Multistep:
    """DEIS: eps a polynomial in t (tAB, the paper's), or in "log_rho", the logarithm of sigma/alpha.

    Zhang & Chen 2022, arXiv:2204.13902, eq. 14 and 15. Of second order globally, unless start="single_step".
    Raises ValueError for an order below 1 or another coordinate.
    """
    check_order("DEIS", order)
    rules = {"t": NOISE_BY_TIME, "log_rho": NOISE}
    if coordinate not in rules:
        raise ValueError(f"DEIS: unknown coordinate {coordinate!r}; one of {', '.join(rules)}")
    return Multistep(None, order, rules[coordinate], None, 0, starting("DEIS", start, order, NOISE))


def ExponentialAB(order: int = 3, prediction: str = "x0", start: str = "low_order") -> Multistep:
    """Exponential Adams-Bashforth of any order: x_0 or eps a polynomial in log(alpha/sigma), integrated exactly.

    Hochbruck & Ostermann 2010, section 2.7. Of second order globally, unless start="single_step". Raises ValueError for
    an order below 1 or another prediction.
    """
    check_order("ExponentialAB", order)
    rules = {"x0": DATA, "eps": NOISE}
    if prediction not in rules:
        raise ValueError(f"ExponentialAB: unknown prediction {prediction!r}; one of {', '.join(rules)}")
    rule = rules[prediction]
    return Multistep(None, order, rule, None, 0, starting("ExponentialAB", start, order, rule), low_order_below=0)


def PNDM(start: str = "runge_kutta") -> Multistep:
    """PNDM: Adams-Bashforth 4 as if steps were even, inside a DDIM step; second order.

    The first three steps are pseudo Runge-Kutta ("runge_kutta", four evaluations each), or the first alone is a pseudo
    trapezoid ("trapezoid", Stable Diffusion's PLMS).  Liu et al. 2022, arXiv:2202.09778, section 3.3.
    """
    starts = {
        "runge_kutta": Start(NOISE_BY_TIME, stages.RUNGE_KUTTA, 3),
        "trapezoid": Start(NOISE_BY_TIME, stages.TRAPEZOID, 1),
    }
    if start not in starts:
        raise ValueError(f"PNDM: unknown start {start!r}; one of {', '.join(starts)}")
    return _AsIfEven(4).replace(start=starts[start])


def IPNDM(order: int = 4) -> Multistep:
    """iPNDM: PNDM that starts with lower orders, one evaluation each.

    Zhang & Chen 2022, arXiv:2204.13902, section 3.3 and table 3. Raises ValueError for orders outside 1 to 4.
    """
    check_order("IPNDM", order, 4)
    return _AsIfEven(order)


def _AsIfEven(order):
    return Multistep(None, order, NOISE_BY_INDEX, None, 0, None, low_order_below=0)


@noun
class GradientEstimation:
    """x_s = alpha_s x_0 + sigma_s eps + (1 - gamma) (sigma_s - sigma_t alpha_s / alpha_t) (eps_before - eps).

    A DDIM step along gamma eps + (1 - gamma) eps_before; gamma = 1 is DDIM. On a grid that is uniform in sigma/alpha,
    gamma = 3/2 would be Adams-Bashforth 2.  Permenter & Yuan 2023, arXiv:2306.04848, algorithm 2.
    """

    gamma: Number = 2.0
    order = 1
    stochastic = False

    def check(self):
        check_range(self, -LARGEST, gamma=self.gamma)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        total = NOISE.total(schedule, t, s, 1.0)
        has_past = steps_before(breaks, len(t)) > 0
        first = Mix(schedule.alpha(s), schedule.sigma(s), jnp.zeros_like(total))
        return first, jnp.where(has_past, (1 - self.gamma) * total, 0)

    def init(self, x):
        return jnp.zeros_like(x)

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        first, change = now.plan
        x_s = mix(first, prediction, x, None) + expand(change, x) * (state - prediction.eps)
        return x_s, prediction.eps, prediction
