"""Self-conditioned sampling: each step sees the estimate of x_0 that the step before made."""

import jax.numpy as jnp
from jax.extend.core import get_opaque_trace_state

from jdiff.core.arrays import Denoise
from jdiff.core.pytrees import noun
from jdiff.denoisers.network import remember
from jdiff.process.forward import predict


@noun
class Remember:
    """`base`, with its denoiser's networks shown the last estimate of x_0: 0 at the first evaluation.

    For a `denoiser(..., self_conditioning=True)`, also under guidance, whose networks then all see the guided
    estimate; no evaluation is added. Of solvers that evaluate several times a step, the first estimate of the step is
    shown to the rest of it and to the next step.  Chen et al. 2022, arXiv:2208.04202, section 3.2 and algorithm 2.
    Goes around other solvers, not into them. Raises ValueError for a denoiser without self-conditioning, and for
    solvers all of whose evaluations are inside a loop of their own (`AnnealedLangevin`).
    """

    base: object

    @property
    def order(self):
        return self.base.order

    @property
    def stochastic(self):
        return self.base.stochastic

    def plan(self, schedule, times, n, breaks=None):
        return self.base.plan(schedule, times, n, breaks)

    def init(self, x):
        return self.base.init(x), jnp.zeros_like(x)

    def step(self, denoise, schedule, x, now, state, key):
        state, previous = state
        watched = _Watched(denoise, schedule, previous)
        x, state = self.base.step(watched, schedule, x, now, state, key)
        if watched.first is None:
            name = type(self.base).__name__
            raise ValueError(f"Remember: {name} evaluates in a loop of its own; use DDIM, Heun, DPMpp2M")
        return x, (state, watched.first.astype(x.dtype))

    def recall(self, denoise: Denoise, state) -> Denoise:
        """The denoiser as the next evaluation is to see it: what `sample` ends with."""
        return remember(denoise, state[1])


class _Watched:
    """A denoiser for the length of one step: keeps the first estimate it makes, and shows it to the next ones."""

    def __init__(self, denoise, schedule, previous):
        self.denoise, self.schedule, self.previous, self.first = denoise, schedule, previous, None
        self.level = _level()

    def __call__(self, x, t):
        return self.predict(x, t).x0

    def predict(self, x, t):
        previous = self.previous if self.first is None else self.first
        prediction = predict(remember(self.denoise, previous), self.schedule, x, t)
        if self.first is None and _level() == self.level:  # what is made inside a loop cannot leave it
            self.first = prediction.x0
        return prediction


def _level():
    """Which function JAX is tracing."""
    return get_opaque_trace_state(convention="flax")
