"""Multistep methods on eps: LMS, DEIS, exponential Adams-Bashforth, PNDM, iPNDM, gradient estimation."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand
from jdiff.core.checks import LARGEST, check_range
from jdiff.core.names import choose
from jdiff.core.pytrees import Noun, noun, prints_as_call
from jdiff.solvers import stages
from jdiff.solvers.base import Mix, check_order, mix, steps_since_break
from jdiff.solvers.multistep import Multistep, Start, choose_start
from jdiff.solvers.polynomial import NOISE, NOISE_BY_INDEX, NOISE_BY_RATIO, NOISE_BY_TIME, choose_rule


@prints_as_call
def LMS(order: int = 4, start: str = "low_order") -> Multistep:
    """Linear multistep: Adams-Bashforth in r = sigma/alpha.

        x_s / alpha_s = x_t / alpha_t + int_{r_t}^{r_s} P(r) dr

    P is the polynomial in r through the last `order` predictions of eps. With order 1 this is Euler's method.

    Args:
        order: how many predictions are interpolated, 1 or more.
        start: "low_order", the literature's, has second order as a whole. "single_step" makes the first steps by a
            method of order `order`, and so has that order.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an order below 1, or another start.

    Reference:
        Crowson's k-diffusion, `sample_lms`; Karras et al. 2022, arXiv:2206.00364, eq. 1 and 3 for the ODE.
    """
    check_order("LMS", order)
    return Multistep(
        nodes=order, rule=NOISE_BY_RATIO, start=choose_start("LMS", start, order, NOISE), low_order_below=0
    )


@prints_as_call
def DEIS(order: int = 3, coordinate: str = "t", start: str = "low_order") -> Multistep:
    """DEIS: Adams-Bashforth with the exact weight of eps.

        x_s / alpha_s = x_t / alpha_t + int_t^s P(u) d(sigma_u / alpha_u)

    P is the polynomial through the last `order` predictions of eps, in the coordinate given.

    Args:
        order: how many predictions are interpolated, 1 or more.
        coordinate: "t", the paper's tAB, or "log_rho", the logarithm of sigma/alpha.
        start: "low_order", the literature's, has second order as a whole. "single_step" makes the first steps by a
            method of order `order`, and so has that order.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an order below 1, another coordinate or another start.

    Reference:
        Zhang & Chen 2022, arXiv:2204.13902, eq. 14 and 15.
    """
    check_order("DEIS", order)
    rule = choose("coordinate of DEIS", coordinate, {"t": NOISE_BY_TIME, "log_rho": NOISE})
    return Multistep(nodes=order, rule=rule, start=choose_start("DEIS", start, order, NOISE))


@prints_as_call
def ExponentialAB(order: int = 3, prediction: str = "x0", start: str = "low_order") -> Multistep:
    """Exponential Adams-Bashforth in c = log(alpha/sigma), its integral exact.

        x0:   x_s / sigma_s = x_t / sigma_t + int_{c_t}^{c_s} e^c P(c) dc
        eps:  x_s / alpha_s = x_t / alpha_t - int_{c_t}^{c_s} e^(-c) P(c) dc

    P is the polynomial in c through the last `order` predictions.

    Args:
        order: how many predictions are interpolated, 1 or more.
        prediction: what is interpolated, "x0" or "eps".
        start: "low_order" has second order as a whole. "single_step" makes the first steps by a method of order
            `order`, and so has that order.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an order below 1, another prediction or another start.

    Reference:
        Hochbruck & Ostermann 2010, section 2.7.
    """
    check_order("ExponentialAB", order)
    rule = choose_rule("ExponentialAB", prediction)
    return Multistep(nodes=order, rule=rule, start=choose_start("ExponentialAB", start, order, rule), low_order_below=0)


@prints_as_call
def PNDM(start: str = "runge_kutta") -> Multistep:
    """PNDM: a DDIM step along Adams-Bashforth 4 of eps, whose weights are those of even steps.

        x_s = alpha_s x_0' + sigma_s eps',    eps' = (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24

    eps_j is the prediction of j steps before, and x_0' = (x_t - sigma_t eps') / alpha_t. On grids that are not even it
    is of second order.

    Args:
        start: "runge_kutta" makes the first three steps by pseudo Runge-Kutta, of four evaluations each.
            "trapezoid" makes only the first by a pseudo trapezoid, of two evaluations: Stable Diffusion's PLMS.

    Returns:
        The solver, of one evaluation a step after the start.

    Raises:
        ValueError: for another start.

    Reference:
        Liu et al. 2022, arXiv:2202.09778, section 3.3.
    """
    starts = {
        "runge_kutta": Start(NOISE_BY_TIME, stages.RUNGE_KUTTA, steps=3),
        "trapezoid": Start(NOISE_BY_TIME, stages.TRAPEZOID, steps=1),
    }
    chosen = choose("start of PNDM", start, starts)
    return Multistep(nodes=4, rule=NOISE_BY_INDEX, start=chosen, low_order_below=0)


@prints_as_call
def IPNDM(order: int = 4) -> Multistep:
    """iPNDM: PNDM that starts with lower orders, of one evaluation each.

        order 1:  eps' = eps_0
        order 2:  eps' = (3 eps_0 - eps_1) / 2
        order 3:  eps' = (23 eps_0 - 16 eps_1 + 5 eps_2) / 12
        order 4:  eps' = (55 eps_0 - 59 eps_1 + 37 eps_2 - 9 eps_3) / 24

    Args:
        order: how many predictions are combined, 1 to 4.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for another order.

    Reference:
        Zhang & Chen 2022, arXiv:2204.13902, section 3.3 and table 3.
    """
    check_order("IPNDM", order, 4)
    return Multistep(nodes=order, rule=NOISE_BY_INDEX, low_order_below=0)


@noun
class GradientEstimation(Noun):
    """Gradient estimation: a DDIM step along gamma eps + (1 - gamma) eps_before.

        x_s = alpha_s x_0 + sigma_s eps + (1 - gamma) (sigma_s - sigma_t alpha_s / alpha_t) (eps_before - eps)

    eps_before is the prediction of the step before. The first step is one of DDIM.

    Args:
        gamma: any finite number. 1 is DDIM; 3/2 would be Adams-Bashforth 2 on a grid that is uniform in sigma/alpha.

    Raises:
        ValueError: for a gamma that is not finite.

    Reference:
        Permenter & Yuan 2023, arXiv:2306.04848, algorithm 2.
    """

    gamma: Number = 2.0
    order = 1
    stochastic = False

    def check(self):
        check_range(self, -LARGEST, gamma=self.gamma)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        total = NOISE.total(schedule, t, s, 1.0)
        has_past = steps_since_break(breaks, len(t)) > 0
        first_order = Mix(schedule.alpha(s), schedule.sigma(s), jnp.zeros_like(total))
        return first_order, jnp.where(has_past, (1 - self.gamma) * total, 0)

    def init(self, x):
        return jnp.zeros_like(x)

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        first_order, weight = now.plan
        x_s = mix(first_order, prediction, x, None) + expand(weight, x) * (state - prediction.eps)
        return x_s, prediction.eps, prediction
