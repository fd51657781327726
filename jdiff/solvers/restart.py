"""Restart: going back up with fresh noise, and down again, in the interval where it helps."""

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, expand, safe_sqrt
from jdiff.core.checks import check_ends, check_range
from jdiff.core.keys import fold, normal, part
from jdiff.core.pytrees import Noun, noun, static
from jdiff.solvers.base import Now, Solver, check_order, check_solver
from jdiff.solvers.runge_kutta import Heun


@noun
class Restart(Noun):
    """`base`, and restarts after the step in which sigma/alpha comes down to `low`.

    A restart is made `rounds` times at the end s of that step. With h the time at which sigma/alpha is `high`,

        x_h = (alpha_h / alpha_s) x_s + sqrt(sigma_h^2 - (alpha_h sigma_s / alpha_s)^2) z,    z ~ N(0, I)

    and then `steps` steps of Heun's method go down to s again, on the grid

        sigma_i / alpha_i = (a + (i / steps) (b - a))^7,    a = high^(1/7),    b = (sigma_s / alpha_s)^(1/7).

    An interval that the grid does not cross does nothing. Several are nested: Restart(Restart(Heun(), ...), ...). A
    `base` of several steps starts again after a restart, because the restart has moved x.

    Args:
        base: any solver.
        low: the noise level at whose crossing the restarts are made, in units of sigma/alpha, positive.
        high: the noise level up to which they go, in the same units, at least `low`. Where the schedule ends below
            it, they go up to that end.
        rounds: how many restarts, 1 or more.
        steps: how many steps of Heun's method lead down, 1 or more.

    Raises:
        ValueError: unless 0 < low <= high, and rounds and steps are 1 or more.

    Reference:
        Xu et al. 2023, arXiv:2306.14878, algorithm 1.
    """

    base: Solver = Heun()
    low: Number = 0.06
    high: Number = 0.3
    rounds: int = static(default=2)
    steps: int = static(default=4)
    stochastic = True

    @property
    def order(self) -> int:
        return self.base.order

    def check(self):
        check_solver("the base of Restart", self.base)
        check_range(self, 1e-12, low=self.low)
        check_ends(self, may_be_equal=True, low=self.low, high=self.high)
        check_order("Restart", self.rounds, what="rounds")
        check_order("Restart", self.steps, what="steps")

    def plan(self, schedule, times, n, breaks=None):
        # Not as a ratio: alpha may be 0 at the first time.
        above = schedule.sigma(times) > self.low * schedule.alpha(times)
        crossed = above[:-1] & ~above[1:] & (jnp.arange(len(times) - 1) < n - 1)
        inner_times = self._inner_times(schedule, times[1:])
        inner_plan = jax.vmap(lambda row: Heun().between(schedule, row[:-1], row[1:]))(inner_times)
        after_restart = jnp.concatenate([jnp.zeros_like(crossed[:1]), crossed[:-1]])
        breaks = after_restart if breaks is None else after_restart | breaks
        return crossed, inner_times, inner_plan, self.base.plan(schedule, times, n, breaks)

    def _inner_times(self, schedule, s) -> Array:
        """The grids from `high`, or wherever the schedule ends, down to each s (N,): (N, steps + 1)."""
        ratio = schedule.sigma(s) / schedule.alpha(s)
        ones = jnp.ones_like(self.high * ratio)
        top = jnp.minimum(schedule.time_at(ones, self.high * ones), schedule.t_max)
        high = schedule.sigma(top) / schedule.alpha(top)
        u = jnp.linspace(0, 1, self.steps + 1, dtype=s.dtype)[None]
        a, b = high[:, None] ** (1 / 7), ratio[:, None] ** (1 / 7)
        times = schedule.time_at(jnp.ones_like(a + u), (a + u * (b - a)) ** 7)
        return times.at[:, 0].set(top).at[:, -1].set(s)  # the ends are exact

    def init(self, x):
        return self.base.init(x)

    def step(self, denoise, schedule, x, now, state, key):
        crossed, inner_times, inner_plan, base_plan = now.plan
        # Solvers may be nested, so the base and each restart have keys of their own.
        base_key = part(key, now.t, now.s, 0)
        x, state, prediction = self.base.step(denoise, schedule, x, now._replace(plan=base_plan), state, base_key)
        top, s = inner_times[0], inner_times[-1]
        signal_scale = schedule.alpha(top) / schedule.alpha(s)
        noise_scale = safe_sqrt(schedule.sigma(top) ** 2 - (signal_scale * schedule.sigma(s)) ** 2)
        inner_steps = Now(jnp.arange(self.steps), inner_times[:-1], inner_times[1:], inner_plan)

        def heun_step(x, inner):
            return Heun().step(denoise, schedule, x, inner, (), None)[0], None

        def restart(x, j):
            z = normal(fold(key, 1 + j), x.shape, x.dtype)
            x = expand(signal_scale, x) * x + expand(noise_scale, x) * z
            return lax.scan(heun_step, x, inner_steps)[0], None

        x = lax.cond(crossed, lambda: lax.scan(restart, x, jnp.arange(self.rounds))[0], lambda: x)
        return x, state, prediction
