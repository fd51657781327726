"""Restart: going back up with fresh noise, and down again, in the interval where it helps."""

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.keys import fold, normal, part
from jdiff.core.pytrees import noun, static
from jdiff.solvers.base import Now, check_order
from jdiff.solvers.runge_kutta import Heun


@noun
class Restart:
    """`base`, and once sigma/alpha has come down to `low`, `rounds` times noise up to `high` and `steps` steps back.

    Each round: x <- (alpha_h/alpha_s) x + sqrt(sigma_h^2 - (alpha_h sigma_s/alpha_s)^2) z, with h where sigma/alpha =
    high, then `steps` of Heun's down to s on the rho = 7 grid. Intervals that the grid does not cross do
    nothing; several are nested: Restart(Restart(Heun(), ...), ...). A `base` of several steps starts again after a
    restart, which has moved x.  Xu et al. 2023, arXiv:2306.14878, algorithm 1.
    Raises ValueError unless 0 < low < high.
    """

    base: object = Heun()
    low: Number = 0.06
    high: Number = 0.3
    rounds: int = static(2)
    steps: int = static(4)
    stochastic = True

    @property
    def order(self):
        return self.base.order

    def check(self):
        check_range(self, 1e-12, low=self.low)
        check_range(self, self.low, high=self.high)
        check_order("Restart, number of rounds as", self.rounds)
        check_order("Restart, number of steps as", self.steps)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        above = schedule.sigma(times) > self.low * schedule.alpha(times)  # no ratio: alpha may be 0 at the first time
        crossed = above[:-1] & ~above[1:] & (jnp.arange(len(t)) < n - 1)
        ratio = schedule.sigma(s) / schedule.alpha(s)
        # back to where the step ended, from the restart's height or wherever the schedule ends
        one = jnp.ones_like(self.high * ratio)
        top = jnp.minimum(schedule.time_at(one, self.high * one), schedule.t_max)
        high = schedule.sigma(top) / schedule.alpha(top)
        u = jnp.linspace(0, 1, self.steps + 1, dtype=t.dtype)[None]
        a, b = high[:, None] ** (1 / 7), ratio[:, None] ** (1 / 7)
        inner = schedule.time_at(jnp.ones_like(a + u), (a + u * (b - a)) ** 7)
        inner = inner.at[:, 0].set(top).at[:, -1].set(s)
        plan = jax.vmap(lambda row: Heun().between(schedule, row[:-1], row[1:]))(inner)
        after = jnp.concatenate([jnp.zeros_like(crossed[:1]), crossed[:-1]])  # the steps that follow a restart
        return crossed, inner, plan, self.base.plan(schedule, times, n, after if breaks is None else after | breaks)

    def init(self, x):
        return self.base.init(x)

    def step(self, denoise, schedule, x, now, state, key):
        crossed, inner, inner_plan, plan = now.plan
        # keys of their own for the two: solvers may be nested
        x, state, prediction = self.base.step(
            denoise, schedule, x, now._replace(plan=plan), state, part(key, now.t, now.s, 0)
        )
        top, s = inner[0], inner[-1]
        grow = schedule.alpha(top) / schedule.alpha(s)
        noise = safe_sqrt(schedule.sigma(top) ** 2 - (grow * schedule.sigma(s)) ** 2)

        def once(x, j):
            x = expand(grow, x) * x + expand(noise, x) * normal(fold(key, 1 + j), x.shape, x.dtype)

            def down(x, step):
                return Heun().step(denoise, schedule, x, step, (), None)[0], None

            steps = Now(jnp.arange(self.steps), inner[:-1], inner[1:], inner_plan)
            return lax.scan(down, x, steps)[0], None

        x = lax.cond(crossed, lambda: lax.scan(once, x, jnp.arange(self.rounds))[0], lambda: x)
        return x, state, prediction
