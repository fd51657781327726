"""Predictor-correctors that cost one evaluation a step: UniPC and SA-Solver."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, safe_divide
from jdiff.core.names import choose
from jdiff.core.pytrees import prints_as_call
from jdiff.solvers.base import check_order
from jdiff.solvers.multistep import Multistep, choose_start
from jdiff.solvers.polynomial import DATA, choose_rule, midpoint


# u such that total * u = B(h) / 2 with B(h) = h, where the total is 1 - exp(-h) or exp(h) - 1
def _bh1_data(h):
    return 0.5 * safe_divide(h, -jnp.expm1(-h))


def _bh1_noise(h):
    return 0.5 * safe_divide(h, jnp.expm1(h))


@prints_as_call
def UniPC(order: int = 2, variant: str = "bh2", prediction: str = "x0", start: str = "low_order") -> Multistep:
    """UniPC: an exponential predictor, UniP, and the corrector UniC with the prediction at the predicted point.

    With c = log(alpha/sigma), P the polynomial in c through the last `order` predictions of x_0, and P+ that through
    these and the one at the predicted point:

        predictor:  x_s / sigma_s = x_t / sigma_t + int_{c_t}^{c_s} e^c P(c) dc
        corrector:  x_s / sigma_s = x_t / sigma_t + int_{c_t}^{c_s} e^c P+(c) dc

    The network is evaluated at the predicted point only, and the next step begins from the corrected one. Where just
    two predictions meet, their line is not integrated exactly. With r = h_before / h, x_s / alpha_s then changes by
    (p_0 - p_1) B(h) / (2 r) in the predictor, and by (p_new - p_0) B(h) / 2 in the corrector.

    Args:
        order: how many predictions the predictor interpolates, 1 or more. The corrector interpolates one more.
        variant: "bh1", where B(h) = h, or "bh2", where B(h) = 1 - exp(-h) for x_0 and exp(h) - 1 for eps.
        prediction: what is interpolated, "x0" or "eps"; eps with e^(-c) and alpha, as in `ExponentialAB`.
        start: "low_order", the literature's, or "single_step", where the first steps are made by a method of order
            `order`.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an order below 1, another variant, prediction or start.

    Reference:
        Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8.
    """
    check_order("UniPC", order)
    variants = {"bh1": {"x0": _bh1_data, "eps": _bh1_noise}, "bh2": {"x0": midpoint, "eps": midpoint}}
    two_nodes = choose("variant of UniPC", variant, variants)
    rule = choose_rule("UniPC", prediction)
    return Multistep(
        nodes=order, rule=rule, two_nodes=two_nodes[prediction], corrector=order,
        start=choose_start("UniPC", start, order, rule),
    )  # fmt: skip


@prints_as_call
def SASolver(order: int = 2, corrector: int = 2, tau: Number = 1.0, variant: str = "exact") -> Multistep:
    """SA-Solver: stochastic Adams methods on x_0, with fresh noise of share 1 - exp(-2 tau^2 h).

    With c = log(alpha/sigma) and P the polynomial in c through the last `order` predictions of x_0:

        x_s = (sigma_s / sigma_t) e^(-tau^2 h) x_t
              + (1 + tau^2) alpha_s int_{c_t}^{c_s} e^((1 + tau^2) (c - c_s)) P(c) dc
              + sigma_s sqrt(1 - e^(-2 tau^2 h)) z,    z ~ N(0, I)

    The corrector takes the same step again, with the same z and the prediction at the predicted point as one more node
    of P.

    Args:
        order: how many predictions the predictor interpolates, 1 or more.
        corrector: how many old predictions the corrector interpolates beside the new one; 0 for no corrector.
        tau: the noise; 0 is the probability-flow ODE, 1 the reverse SDE.
        variant: what is done where just two predictions meet. "exact" integrates their line. "bh1" takes
            (1 + tau^2) h for 1 - exp(-(1 + tau^2) h) in the weight of the line's slope, as published code does.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an order below 1, another variant, or a tau that is not finite.

    Reference:
        Xue et al. 2023, arXiv:2309.05019, eq. 15 and 18.
    """
    check_order("SASolver", order)
    if corrector:
        check_order("SASolver's corrector", corrector)
    two_nodes = choose("variant of SASolver", variant, {"exact": None, "bh1": _bh1_data})
    return Multistep(eta=tau**2, nodes=order, rule=DATA, two_nodes=two_nodes, corrector=corrector)
