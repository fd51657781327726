"""Solvers: update rules from x_t to x_s, one family a file."""

from jdiff.solvers.adams import DEIS, IPNDM, LMS, PNDM, ExponentialAB, GradientEstimation
from jdiff.solvers.ancestral import Ancestral, DPM2Ancestral, DPMpp2SAncestral, EulerAncestral
from jdiff.solvers.base import Now, Solver
from jdiff.solvers.churn import Churn, EDMStochastic
from jdiff.solvers.ddim import DDIM, DDPM
from jdiff.solvers.dpm import DPMpp2M, DPMpp2MSDE, DPMpp3M, DPMpp3MSDE, DPMSolverM
from jdiff.solvers.langevin import AnnealedLangevin, Langevin, PredictorCorrector
from jdiff.solvers.multistep import Multistep
from jdiff.solvers.remember import Remember
from jdiff.solvers.restart import Restart
from jdiff.solvers.runge_kutta import RK4, Euler, Heun, RungeKutta
from jdiff.solvers.stages import DPM2, DPMpp2S, DPMppSDE, DPMSolver, SingleStep
from jdiff.solvers.stochastic import EulerMaruyama
from jdiff.solvers.unipc import SASolver, UniPC

__all__ = [
    "Ancestral", "AnnealedLangevin", "Churn", "DDIM", "DDPM", "DEIS", "DPM2", "DPM2Ancestral", "DPMSolver",
    "DPMSolverM", "DPMpp2M", "DPMpp2MSDE", "DPMpp2S", "DPMpp2SAncestral", "DPMpp3M", "DPMpp3MSDE", "DPMppSDE",
    "EDMStochastic", "Euler", "EulerAncestral", "EulerMaruyama", "ExponentialAB", "GradientEstimation", "Heun",
    "IPNDM", "LMS", "Langevin", "Multistep", "Now", "PNDM", "PredictorCorrector", "RK4", "Remember", "Restart",
    "RungeKutta", "SASolver", "SingleStep", "Solver", "UniPC",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
