"""Self-conditioned sampling: each step sees the estimate of x_0 that the step before made."""

import jax.numpy as jnp

from jdiff.core.pytrees import Noun, noun
from jdiff.denoisers.network import remember
from jdiff.process.prediction import Denoise
from jdiff.solvers.base import Solver, check_solver, mixes


@noun
class Remember(Noun):
    """`base` with self-conditioning: the denoiser's networks are shown the last estimate of x_0.

    The first evaluation of all is shown 0. The first estimate of a step is shown to the rest of the step, where the
    solver evaluates several times, and to the next step. No evaluation is added. The denoiser is one made by
    `denoiser(..., self_conditioning=True)`. Under guidance, all its networks see the guided estimate.

    Args:
        base: any other solver; `Remember` stands around the others and never inside one.

    Raises:
        ValueError: in `step`, for a denoiser without self-conditioning.

    Reference:
        Chen et al. 2022, arXiv:2208.04202, section 3.2 and algorithm 2.
    """

    base: Solver

    def check(self):
        check_solver("the base of Remember", self.base)

    @property
    def order(self) -> int:
        return self.base.order

    @property
    def stochastic(self) -> bool:
        return self.base.stochastic

    @property
    def mixes(self):
        return mixes(self.base)

    def plan(self, schedule, times, n, breaks=None):
        return self.base.plan(schedule, times, n, breaks)

    def init(self, x):
        return self.base.init(x), jnp.zeros_like(x)

    def step(self, denoise, schedule, x, now, state, key):
        state, previous = state
        x, state, prediction = self.base.step(_OneStep(denoise, previous), schedule, x, now, state, key)
        return x, (state, prediction.x0.astype(x.dtype)), prediction

    def recall(self, denoise: Denoise, state) -> Denoise:
        """The denoiser as the next evaluation is to see it: what `sample` ends with."""
        return remember(denoise, state[1])


class _OneStep(Denoise):
    """A denoiser for one step: its first evaluation is shown `previous`, and the later ones the x_0 of the first.

    It changes when it is called. That is safe because a solver makes its first prediction outside of any loop, as it
    returns it.
    """

    def __init__(self, denoise, previous):
        self.denoise, self.schedule = remember(denoise, previous), denoise.schedule
        self.first = None

    def predict(self, x, t):
        if self.first is not None:
            return remember(self.denoise, self.first.x0).predict(x, t)
        self.first = self.denoise.predict(x, t)
        return self.first
