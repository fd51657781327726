"""Multistep methods: one evaluation a step, and a polynomial through the predictions of the steps before.

A corrector (UniC, Adams-Moulton) integrates the last step again with the new prediction as one more node. Its change of
x is a sum over the same predictions, so that predictor and corrector together are one linear multistep method with
other weights: the plan adds them up, and a step costs the same.
"""

from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.pytrees import noun, static
from jdiff.solvers import polynomial, stages
from jdiff.solvers.base import Mix, check_order, is_positive, mix, nearly_noise, steps_before
from jdiff.solvers.polynomial import DATA, NOISE_BY_RATIO, Rule

SHORT_GRID = 15  # below so many times, the last steps take lower orders: Lu et al. 2022, arXiv:2211.01095, appendix


class Start(NamedTuple):
    """How the first `count` steps are made, one by one."""

    rule: Rule
    tableau: tuple
    count: int
    two_nodes: object = None


class MultistepPlan(NamedTuple):
    """The first-order part of every step, the weights of what came before (N - 1, H), and the start's stages."""

    first: Mix
    weights: Array
    start: tuple
    before: Array  # how many earlier steps of the same path there are


@noun
class Multistep:
    """x_s = alpha_s x_0 + sigma_s exp(-eta h) eps + sum_j W_j (p_j - p_0) + sigma_s sqrt(1 - exp(-2 eta h)) z.

    `nodes` predictions are interpolated (see `polynomial`), fewer at the start, and at the end of a grid of fewer than
    `low_order_below` times. `corrector` > 0 corrects each step with so many of the old predictions and the new one. Orders above 2
    are reached only with a `start` of that order: low-order first steps leave an error of second order behind. After
    each of the plan's `breaks` the method starts again: predictions of another path are never used.
    """

    eta: Number | None = None
    nodes: int = static(2)
    rule: Rule = static(DATA)
    two_nodes: object = static(None)
    corrector: int = static(0)
    start: Start | None = static(None)
    low_order_below: int = static(SHORT_GRID)

    def check(self):
        check_order("Multistep", self.nodes)
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self):
        return is_positive(self.eta)

    @property
    def order(self):
        return 1 if self.stochastic else min(self.nodes, self.rule.highest_order)

    @property
    def memory(self) -> int:
        """How many past predictions a step needs."""
        return max(self.nodes, self.corrector) if self.corrector else self.nodes - 1

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        eta = 0.0 if self.eta is None else self.eta
        h = polynomial.half_log_snr(schedule, s) - polynomial.half_log_snr(schedule, t)
        sigma = schedule.sigma(s)
        first = Mix(schedule.alpha(s), sigma * jnp.exp(-eta * h), sigma * safe_sqrt(-jnp.expm1(-2 * eta * h)))
        start = ()
        if self.start is not None:
            start = stages.plan(self.start.rule, self.start.tableau, schedule, t, s, None, self.start.two_nodes)
        before = steps_before(breaks, len(t))
        return MultistepPlan(first, self._weights(schedule, times, n, 1 + eta, before), start, before)

    def _weights(self, schedule, times, n, k, before):
        """What each step adds of (p_j - p_0), for the H predictions before it: predictor, and last step's corrector."""
        t, s = times[:-1], times[1:]
        i = jnp.arange(len(t))
        c = self.rule.coordinate(schedule, times)
        no_signal = nearly_noise(schedule, times)
        back = i[:, None] - jnp.arange(max(self.nodes, self.corrector))[None]
        nodes, exists = c[jnp.maximum(back, 0)], back >= (i - before)[:, None]
        usable = exists & ~no_signal[jnp.maximum(back, 0)] | (back == i[:, None])
        room = jnp.where(n < self.low_order_below, n - i, nodes.shape[-1])
        among = jnp.arange(nodes.shape[-1])[None] < jnp.minimum(self.nodes, room)[:, None]
        predictor = polynomial.weights(
            self.rule, schedule, t, s, c[:-1], c[1:], nodes, usable & among, k, self.two_nodes
        )
        if not self.corrector:
            return predictor[:, 1 : self.nodes]
        among = jnp.arange(nodes.shape[-1])[None] < jnp.minimum(self.corrector, room)[:, None]
        with_new = jnp.concatenate([c[1:, None], nodes], 1)
        usable = jnp.concatenate([~no_signal[1:, None], usable & among], 1)
        corrector = polynomial.weights(self.rule, schedule, t, s, c[:-1], c[1:], with_new, usable, k, self.two_nodes)
        change = corrector - jnp.pad(predictor, ((0, 0), (1, 0)))  # of x_s, over (new, present, past ...)
        first = 1 if self.start is None else self.start.count + 1
        last = jnp.where((before >= first)[:, None], jnp.roll(change, 1, 0), 0)
        carried = self.rule.retained(schedule, t, s, k)[:, None] * last
        return jnp.pad(predictor, ((0, 0), (0, 1)))[:, 1:] + carried[:, 1:]

    def init(self, x):
        return jnp.zeros_like(x, shape=(self.memory, *x.shape))

    def step(self, denoise, schedule, x, now, state, key):
        first = denoise.predict(x, now.t)
        present = self.rule.pick(first)

        def multistep():
            y = mix(now.plan.first, first, x, key if self.eta is not None else None)
            for j in range(self.memory):
                y = y + expand(now.plan.weights[j], x) * (state[j] - present)
            return y

        def single_step():
            start = self.start
            return stages.advance(start.rule, start.tableau, now.plan.start, denoise, x=x, t=now.t, first=first)

        y = multistep() if self.start is None else lax.cond(now.plan.before < self.start.count, single_step, multistep)
        state = jnp.concatenate([present[None], state[:-1]]) if self.memory else state
        return y, state, first


def starting(name: str, start: str, order: int, rule: Rule, two_nodes=None) -> Start | None:
    """The `Start` that a user names: "low_order", the literature's, or "single_step", of the method's own order."""
    if start not in ("low_order", "single_step"):
        raise ValueError(f"{name}: unknown start {start!r}; one of low_order, single_step")
    if start == "low_order" or order == 1:
        return None
    # a step of fourth order leaves an error of fifth behind, for three evaluations and not nine or sixteen
    if order in (4, 5):
        return Start(NOISE_BY_RATIO, stages.RUNGE_KUTTA, order - 1)
    return Start(rule, stages.of_order(order), order - 1, two_nodes)
