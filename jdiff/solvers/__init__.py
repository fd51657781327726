"""Solvers: update rules from x_t to x_s, one family a file."""

from jdiff.solvers.base import Now, Solver
from jdiff.solvers.ddim import DDIM, DDPM
from jdiff.solvers.euler import Euler, Heun

__all__ = ["DDIM", "DDPM", "Euler", "Heun", "Now", "Solver"]
