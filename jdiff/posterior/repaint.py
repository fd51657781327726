"""RePaint: inpainting by any solver, going back up with fresh noise after each step."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array, expand, safe_sqrt
from jdiff.core.checks import check_is
from jdiff.core.keys import fold, normal
from jdiff.core.pytrees import known, noun, static
from jdiff.posterior.observation import ARRAYS
from jdiff.posterior.operators import Mask
from jdiff.process.prediction import Prediction
from jdiff.solvers.base import Solver, check_order, check_solver


@noun
class Repaint:
    """A solver that inpaints: see `repaint`."""

    base: Solver
    mask: Mask
    y: Any
    rounds: int = static(default=10)
    stochastic = True

    @property
    def order(self):
        return self.base.order

    def plan(self, schedule, times, n, breaks=None):
        return self.base.plan(schedule, times, n)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        alpha, sigma = schedule.alpha(now.s), schedule.sigma(now.s)
        signal_scale = schedule.alpha(now.t) / alpha
        noise_scale = safe_sqrt(schedule.sigma(now.t) ** 2 - (signal_scale * sigma) ** 2)
        y = jnp.asarray(self.y, x.dtype)
        y = y if y.ndim == x.ndim else y[None]
        seen = self.mask(jnp.ones_like(x)) > 0

        def once(x, key) -> tuple[Array, Prediction]:
            x, _, prediction = self.base.step(denoise, schedule, x, now, (), fold(key, 0))
            observed = expand(alpha, x) * y + expand(sigma, x) * normal(fold(key, 1), x.shape, x.dtype)
            return jnp.where(seen, observed, x), prediction

        def again(x, j):
            x = expand(signal_scale, x) * x + expand(noise_scale, x) * normal(fold(fold(key, 3), j), x.shape, x.dtype)
            return once(x, fold(fold(key, 4), j))[0], None

        x, prediction = once(x, fold(key, 2))
        return lax.scan(again, x, jnp.arange(self.rounds - 1))[0], state, prediction


def repaint(solver: Solver, mask, y, *, rounds: int = 10) -> Repaint:
    """RePaint: after a step of `solver` from t to s the observed part is alpha_s y + sigma_s z, and `rounds` - 1 times

        x_t = (alpha_t / alpha_s) x_s + sqrt(sigma_t^2 - (alpha_t sigma_s / alpha_s)^2) z,    z ~ N(0, I)

    goes back up, and the step is made again. So the hidden part hears of y as often as that. One round is replacement;
    many are nearer to the posterior.

    >>> import numpy as np, jdiff
    >>> inpaint = repaint(jdiff.solvers.DDIM(1.0), np.array([1.0, 0.0]), np.array([0.5, 0.0]), rounds=5)

    `jdiff.sample(inpaint, replace(denoise, mask, y), ...)` ends with y itself where it is observed. A step costs
    `rounds` of the solver's.

    Args:
        solver: a solver without memory, as `DDIM(1.0)` or `Heun()`.
        mask: 1 where x_0 is observed and 0 elsewhere, of the shape of one sample, or with a last axis of 1.
        y: the observed data, of the shape of one sample, or (B, ...). Outside the mask it may be anything finite.
        rounds: how often each step is made, 1 or more.

    Returns:
        The solver. It draws noise, so it needs a key.

    Raises:
        TypeError: for what is no solver, and a y that is no array.
        ValueError: for a solver with a memory, rounds below 1, a mask of other numbers or of another size.

    Reference:
        Lugmayr et al. 2022, arXiv:2201.09865, algorithm 1.
    """
    check_solver("solver", solver)
    if jax.tree.leaves(jax.eval_shape(lambda: solver.init(jnp.zeros((1, 1))))):
        raise ValueError(f"repaint: {type(solver).__name__} remembers earlier steps; use DDIM, DDPM, Heun, ...")
    check_order("repaint", rounds, what="rounds")
    check_is("y", y, ARRAYS, "observed data, an array of the shape of one sample or (B, ...)")
    if known(y) and not np.isfinite(np.asarray(y, np.float64)).all():
        raise ValueError("y has numbers that are not finite; where a mask hides y, give 0")
    return Repaint(solver, Mask(mask), y, int(rounds))
