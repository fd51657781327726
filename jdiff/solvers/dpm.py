"""DPM-Solver++: multistep methods on x_0 in log-SNR, for the ODE and the SDE. Single steps are in `stages`."""

from jdiff.core.arrays import Number
from jdiff.core.pytrees import prints_as_call
from jdiff.solvers.base import check_order
from jdiff.solvers.multistep import Multistep, choose_start
from jdiff.solvers.polynomial import DATA, NOISE, midpoint


@prints_as_call
def DPMpp2M(start: str = "low_order") -> Multistep:
    """DPM-Solver++(2M): the line through the last two predictions of x_0, taken half-way.

        x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^(-h)) (x_0 + (x_0 - x_0before) / (2 r)),    r = h_before / h

    with h the step in log(alpha/sigma). The first step has no line, and is one of DDIM.

    Args:
        start: "low_order", the literature's, or "single_step", where the first step is one of `DPMpp2S`. Both have
            second order.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for another start.

    Reference:
        Lu et al. 2022, arXiv:2211.01095, algorithm 2.
    """
    return Multistep(nodes=2, rule=DATA, two_nodes=midpoint, start=choose_start("DPMpp2M", start, 2, DATA, midpoint))


@prints_as_call
def DPMpp3M(start: str = "low_order") -> Multistep:
    """DPM-Solver++(3M): the parabola through the last three predictions of x_0, integrated exactly.

        x_s / sigma_s = x_t / sigma_t + int_{c_t}^{c_s} e^c P(c) dc,    c = log(alpha/sigma)

    The second step, which has two predictions, is one of `DPMpp2M`. Published code has half of the term in the
    second difference of the predictions, and so stays at second order.

    Args:
        start: "low_order", the literature's, has second order as a whole. "single_step" makes the first two steps by a
            method of third order, and so has that order.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for another start.

    Reference:
        Lu et al. 2022, arXiv:2211.01095, appendix.
    """
    return Multistep(nodes=3, rule=DATA, two_nodes=midpoint, start=choose_start("DPMpp3M", start, 3, DATA))


@prints_as_call
def DPMpp2MSDE(eta: Number = 1.0) -> Multistep:
    """DPM-Solver++(2M) for the SDE, with fresh noise of share 1 - exp(-2 eta h).

        x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) (x_0 + (x_0 - x_0before) / (2 r))
              + sigma_s sqrt(1 - e^(-2 eta h)) z,    r = h_before / h,    z ~ N(0, I)

    Args:
        eta: 0 or more; 0 is `DPMpp2M`.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Lu et al. 2022, arXiv:2211.01095, section 5.
    """
    return Multistep(eta=eta, nodes=2, rule=DATA, two_nodes=midpoint)


@prints_as_call
def DPMpp3MSDE(eta: Number = 1.0) -> Multistep:
    """DPM-Solver++(3M) for the SDE, with fresh noise of share 1 - exp(-2 eta h).

        x_s = (sigma_s / sigma_t) e^(-eta h) x_t
              + (1 + eta) alpha_s int_{c_t}^{c_s} e^((1 + eta) (c - c_s)) P(c) dc
              + sigma_s sqrt(1 - e^(-2 eta h)) z,    c = log(alpha/sigma),    z ~ N(0, I)

    P is the parabola in c through the last three predictions of x_0.

    Args:
        eta: 0 or more; 0 is `DPMpp3M`.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Crowson's k-diffusion, `sample_dpmpp_3m_sde`.
    """
    return Multistep(eta=eta, nodes=3, rule=DATA, two_nodes=midpoint)


@prints_as_call
def DPMSolverM(order: int = 2, start: str = "low_order") -> Multistep:
    """Multistep DPM-Solver: eps a polynomial in c = log(alpha/sigma).

        x_s / alpha_s = x_t / alpha_t - int_{c_t}^{c_s} e^(-c) P(c) dc

    P is the polynomial in c through the last `order` predictions of eps. Wherever there are two of them, the integral
    takes the line's value half-way:

        x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) (eps + (eps - eps_before) / (2 r)),    r = h_before / h

    Args:
        order: how many predictions are interpolated, 1 to 3.
        start: "low_order", the literature's, has second order as a whole. "single_step" makes the first steps by a
            method of order `order`, and so has that order.

    Returns:
        The solver, of one evaluation a step.

    Raises:
        ValueError: for another order or another start.

    Reference:
        Lu et al. 2022, arXiv:2206.00927 and arXiv:2211.01095, appendices.
    """
    check_order("DPMSolverM", order, 3)
    two_nodes = midpoint if order > 1 else None
    return Multistep(
        nodes=order, rule=NOISE, two_nodes=two_nodes, start=choose_start("DPMSolverM", start, order, NOISE)
    )
