"""Multistep methods: one evaluation a step, and a polynomial through the predictions of the steps before.

A corrector (UniC, Adams-Moulton) integrates the last step again with the new prediction as one more node. Its change of
x is a sum over the same predictions, so that predictor and corrector together are one linear multistep method with
other weights: the plan adds them up, and a step costs the same.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.names import choose
from jdiff.core.pytrees import Noun, noun, static
from jdiff.solvers import polynomial, stages
from jdiff.solvers.base import Mix, check_order, is_positive, mix, nearly_noise, steps_since_break
from jdiff.solvers.polynomial import DATA, NOISE_BY_RATIO, Rule

SHORT_GRID = 15  # below so many times, the last steps take lower orders: Lu et al. 2022, arXiv:2211.01095, appendix


class Start(NamedTuple):
    """How the first steps of a path are made.

    Attributes:
        rule: what their stages interpolate.
        tableau: their stages.
        steps: how many steps are made so.
        two_nodes: as in `polynomial.weights`.
    """

    rule: Rule
    tableau: tuple
    steps: int
    two_nodes: Callable | None = None


class MultistepPlan(NamedTuple):
    """What each step needs.

    Attributes:
        first_order: the coefficients of the first-order part.
        weights: what the H predictions before this one are weighed with, (N - 1, H).
        start: the stages of a step made by the method's `Start`; () without one.
        age: how many earlier steps of the same path there are, (N - 1,).
    """

    first_order: Mix
    weights: Array
    start: tuple
    age: Array


@noun
class Multistep(Noun):
    """A linear multistep method on x_0 or eps.

        x_s = alpha_s x_0 + sigma_s exp(-eta h) eps + sum_j W_j (p_j - p_0) + sigma_s sqrt(1 - exp(-2 eta h)) z

    with h the step in log(alpha/sigma), z ~ N(0, I), p_0 the prediction at x_t, p_j that of j steps before, and the
    weights W_j of `polynomial`. Fewer predictions are interpolated in the first steps of a path, and in the last steps
    of a short grid (see `low_order_below`). Orders above 2 are reached only with a `start` of that order, because first
    steps of low order leave an error of second order behind. After each of the plan's `breaks` the method starts again:
    predictions of another path are never used.

    Args:
        eta: None for the probability-flow ODE, else 0 or more: the SDE with fresh noise of share 1 - exp(-2 eta h).
        nodes: how many predictions are interpolated, the present one included; 1 or more.
        rule: what is interpolated, and how it is weighed.
        two_nodes: as in `polynomial.weights`.
        corrector: 0 for none, else with how many of the old predictions, beside the new one, each step is corrected.
        start: how the first steps are made; None for multistep ones of lower orders.
        low_order_below: on grids of fewer times than this, a step interpolates no more predictions than there are
            evaluations left: two in the last step, before the last denoise.

    Raises:
        ValueError: for fewer than one node, or an eta that is negative or not finite.
    """

    eta: Number | None = None
    nodes: int = static(default=2)
    rule: Rule = static(default=DATA)
    two_nodes: Callable | None = static(default=None)
    corrector: int = static(default=0)
    start: Start | None = static(default=None)
    low_order_below: int = static(default=SHORT_GRID)

    def check(self):
        check_order("Multistep", self.nodes)
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self) -> bool:
        return is_positive(self.eta)

    @property
    def order(self) -> int:
        return 1 if self.stochastic else int(min(self.nodes, self.rule.highest_order))

    @property
    def mixes(self):
        return self.nodes == 1 and not self.corrector

    @property
    def memory(self) -> int:
        """How many past predictions a step needs."""
        return max(self.nodes, self.corrector) if self.corrector else self.nodes - 1

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        eta = 0.0 if self.eta is None else self.eta
        h = polynomial.step_size(schedule, t, s)
        sigma = schedule.sigma(s)
        first_order = Mix(schedule.alpha(s), sigma * jnp.exp(-eta * h), sigma * safe_sqrt(-jnp.expm1(-2 * eta * h)))
        start = ()
        if self.start is not None:
            start = stages.plan_stages(
                self.start.rule, self.start.tableau, schedule, t, s, two_nodes=self.start.two_nodes
            )
        age = steps_since_break(breaks, len(t))
        return MultistepPlan(first_order, self._weights(schedule, times, n, 1 + eta, age), start, age)

    def _weights(self, schedule, times, n, rate, age):
        """What each step adds of (p_j - p_0) for the H predictions before it, (N - 1, H).

        It is the predictor of this step, and the correction of the last one, carried through this step.
        """
        t, s = times[:-1], times[1:]
        i = jnp.arange(len(t))
        c = self.rule.coordinate(schedule, times)
        no_signal = nearly_noise(schedule, times)
        width = max(self.nodes, self.corrector)
        node = i[:, None] - jnp.arange(width)[None]  # the index of the time of each prediction
        nodes, exists = c[jnp.maximum(node, 0)], node >= (i - age)[:, None]
        usable = exists & ~no_signal[jnp.maximum(node, 0)] | (node == i[:, None])
        room = jnp.where(n < self.low_order_below, n - i, width)  # the order that is left at the end of a short grid

        def first(count):
            """Which of the nodes are the first `count`, or as many as there is room for."""
            return jnp.arange(width)[None] < jnp.minimum(count, room)[:, None]

        def weights(nodes, usable):
            return polynomial.weights(
                self.rule, schedule, t, s,
                c_t=c[:-1], c_s=c[1:], nodes=nodes, usable=usable, rate=rate, two_nodes=self.two_nodes,
            )  # fmt: skip

        predictor = weights(nodes, usable & first(self.nodes))
        if not self.corrector:
            return predictor[:, 1 : self.nodes]
        with_new = jnp.concatenate([c[1:, None], nodes], 1)
        corrector = weights(with_new, jnp.concatenate([~no_signal[1:, None], usable & first(self.corrector)], 1))
        change = corrector - jnp.pad(predictor, ((0, 0), (1, 0)))  # of x_s, over (new, present, past ...)
        # The step before must have been one of this method, and of this path.
        oldest = 1 if self.start is None else self.start.steps + 1
        change_before = jnp.where((age >= oldest)[:, None], jnp.roll(change, 1, 0), 0)
        carried = self.rule.retained(schedule, t, s, rate)[:, None] * change_before
        return jnp.pad(predictor, ((0, 0), (0, 1)))[:, 1:] + carried[:, 1:]

    def init(self, x):
        return jnp.zeros_like(x, shape=(self.memory, *x.shape))

    def step(self, denoise, schedule, x, now, state, key):
        first = denoise.predict(x, now.t)
        present = self.rule.pick(first)

        def multistep():
            y = mix(now.plan.first_order, first, x, key if self.eta is not None else None)
            for j in range(self.memory):
                y = y + expand(now.plan.weights[j], x) * (state[j] - present)
            return y

        def single_step():
            start = self.start
            return stages.advance(start.rule, start.tableau, now.plan.start, denoise, x=x, t=now.t, first=first)

        x_s = multistep() if self.start is None else lax.cond(now.plan.age < self.start.steps, single_step, multistep)
        state = jnp.concatenate([present[None], state[:-1]]) if self.memory else state
        return x_s, state, first


def choose_start(name: str, start: str, order: int, rule: Rule, two_nodes=None) -> Start | None:
    """The `Start` that a user names.

    Args:
        name: the solver's, for the error.
        start: "low_order", the literature's, or "single_step", of the method's own order.
        order: the order of the method.
        rule: the rule of the method.
        two_nodes: as in `polynomial.weights`.

    Returns:
        The start; None for multistep steps of lower orders.

    Raises:
        ValueError: for another name.
    """
    single_step = choose(f"start of {name}", start, {"low_order": False, "single_step": True})
    if not single_step or order == 1:
        return None
    # RK4 has order 4, which leaves an error of order 5 behind in one step: enough for both orders, and for three
    # evaluations instead of collocation's nine or sixteen.
    if order in (4, 5):
        return Start(NOISE_BY_RATIO, stages.RUNGE_KUTTA, steps=order - 1)
    return Start(rule, stages.tableau_of_order(order), steps=order - 1, two_nodes=two_nodes)
