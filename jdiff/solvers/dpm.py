"""DPM-Solver++: multistep methods on x_0 in log-SNR, for the ODE and the SDE. Single steps are in `stages`."""

from jdiff.core.arrays import Number
from jdiff.solvers.base import check_order
from jdiff.solvers.multistep import Multistep, starting
from jdiff.solvers.polynomial import DATA, NOISE, midpoint


def DPMpp2M(start: str = "low_order") -> Multistep:
    """DPM-Solver++(2M): x_0's line through the last two predictions, taken half-way.

    Lu et al. 2022, arXiv:2211.01095, algorithm 2. One evaluation a step.
    """
    return Multistep(None, 2, DATA, midpoint, 0, starting("DPMpp2M", start, 2, DATA, midpoint))


def DPMpp3M(start: str = "low_order") -> Multistep:
    """DPM-Solver++(3M): x_0's parabola through the last three predictions, integrated exactly.

    Lu et al. 2022, arXiv:2211.01095, appendix. Published code has half of this second-difference term, and so stays at
    second order; this reaches third with start="single_step".
    """
    return Multistep(None, 3, DATA, midpoint, 0, starting("DPMpp3M", start, 3, DATA))


def DPMpp2MSDE(eta: Number = 1.0) -> Multistep:
    """DPM-Solver++(2M) of the SDE with fresh noise of share 1 - exp(-2 eta h); eta = 0 is DPMpp2M.

    Lu et al. 2022, arXiv:2211.01095, section 5. Raises ValueError for a negative eta.
    """
    return Multistep(eta, 2, DATA, midpoint)


def DPMpp3MSDE(eta: Number = 1.0) -> Multistep:
    """DPM-Solver++(3M) of the SDE with fresh noise of share 1 - exp(-2 eta h); eta = 0 is DPMpp3M.

    Crowson's k-diffusion. Raises ValueError for a negative eta.
    """
    return Multistep(eta, 3, DATA, midpoint)


def DPMSolverM(order: int = 2, start: str = "low_order") -> Multistep:
    """Multistep DPM-Solver of order 1 to 3: eps a polynomial in log-SNR.

    Lu et al. 2022, arXiv:2206.00927 and 2211.01095, appendix. Raises ValueError for another order.
    """
    check_order("DPMSolverM", order, 3)
    two_nodes = midpoint if order > 1 else None
    return Multistep(None, order, NOISE, two_nodes, 0, starting("DPMSolverM", start, order, NOISE))
