"""Single-step exponential methods: stages inside a step, each the integral of a polynomial through the ones before.

A tableau is a tuple of stages. Stage k stands at c_t + u (c_s - c_t) and integrates from t the polynomial through the
predictions of the stages named in `nodes` (0 is x_t itself), or takes their mean with `weights`. The last has u = 1.
"""

from typing import NamedTuple

import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.keys import normal, part
from jdiff.core.pytrees import noun, static
from jdiff.process.prediction import Prediction
from jdiff.solvers import polynomial
from jdiff.solvers.base import Mix, check_order, is_positive, mix, nearly_noise
from jdiff.solvers.polynomial import DATA, NOISE, Rule, midpoint


class Stage(NamedTuple):
    """Where a stage stands, and which predictions it uses how."""

    u: float
    nodes: tuple[int, ...]
    weights: tuple[float, ...] | None = None


FIRST = (Stage(1.0, (0,)),)
SECOND = (Stage(1 / 2, (0,)), Stage(1.0, (0, 1)))
THIRD = (Stage(1 / 3, (0,)), Stage(2 / 3, (0, 1)), Stage(1.0, (0, 2)))
TRAPEZOID = (Stage(1.0, (0,)), Stage(1.0, (0, 1), (1 / 2, 1 / 2)))
RUNGE_KUTTA = (
    Stage(1 / 2, (0,)),
    Stage(1 / 2, (1,), (1.0,)),
    Stage(1.0, (2,), (1.0,)),
    Stage(1.0, (0, 1, 2, 3), (1 / 6, 1 / 3, 1 / 3, 1 / 6)),
)


def collocation(order: int) -> tuple[Stage, ...]:
    """A tableau of any order: `order` points across the step, each sweep over them raising the order by one.

    Spectral deferred correction (Dutt et al. 2000): (order - 1)^2 evaluations besides the first.
    """
    places = [j / (order - 1) for j in range(order)]
    newest, stages = {0: 0}, []
    for _ in range(order - 1):
        for j in range(1, order):
            stages.append(Stage(places[j], tuple(newest.values())))
            newest[j] = len(stages)
    return (*stages, Stage(1.0, tuple(newest.values())))


def of_order(order: int) -> tuple[Stage, ...]:
    """The tableau that starts a multistep method of this order."""
    return (FIRST, SECOND, THIRD)[order - 1] if order <= 3 else collocation(order)


class StagePlan(NamedTuple):
    """One stage of every step: its time, its first-order part, W_j of its nodes, and the noise of its stretch."""

    t: Array
    first: Mix
    weights: Array
    kept: Array
    fresh: Array


def plan(rule: Rule, tableau, schedule, t, s, eta=None, two_nodes=None) -> tuple[StagePlan, ...]:
    """The coefficients of all stages of the steps from t (N,) to s (N,)."""
    k = 1.0 if eta is None else 1 + eta
    no_signal = nearly_noise(schedule, t)
    c_t, c_s = rule.coordinate(schedule, t), rule.coordinate(schedule, s)
    places = jnp.asarray([0.0, *(stage.u for stage in tableau)], c_t.dtype)
    nodes = c_t[:, None] + places[None] * (c_s - c_t)[:, None]
    out, before = [], t
    for stage, place in zip(tableau, nodes.T[1:], strict=True):
        here = s if stage.u == 1 else rule.time(schedule, place)
        c_here = c_s if stage.u == 1 else place
        if stage.weights is None:
            usable = (jnp.asarray(stage.nodes) == 0)[None] | ~no_signal[:, None]
            weights = polynomial.weights(
                rule, schedule, t, here, c_t, c_here, nodes[:, list(stage.nodes)], usable, k, two_nodes
            )
        else:
            total = jnp.where(no_signal, 0, rule.total(schedule, t, here, k))
            weights = total[:, None] * jnp.asarray(stage.weights, total.dtype)[None]
        zero = jnp.zeros_like(t)
        kept, fresh, keep_eps = zero, zero, 1.0
        if eta is not None:
            h = [polynomial._step(schedule, a, here) for a in (t, before)]
            keep_eps = jnp.exp(-eta * h[0])
            kept = rule.retained(schedule, before, here, k)
            fresh = schedule.sigma(here) * safe_sqrt(-jnp.expm1(-2 * eta * h[1]))
        out.append(
            StagePlan(here, Mix(schedule.alpha(here), schedule.sigma(here) * keep_eps, zero), weights, kept, fresh)
        )
        before = here
    return tuple(out)


def advance(rule: Rule, tableau, plan, denoise, *, x, t, first: Prediction, key=None, noisy=False) -> Array:
    """x_s, from the first prediction on; with `noisy`, stage noises follow one path: each adds to the one before."""
    known, before = [rule.pick(first)], t
    noise = jnp.zeros_like(x)
    for i, (stage, now) in enumerate(zip(tableau, plan, strict=True)):
        y = mix(now.first, first, x, None)
        for place, node in enumerate(stage.nodes):
            if node:
                y = y + expand(now.weights[place], x) * (known[node] - known[0])
        if noisy:
            fresh = expand(now.fresh, x)
            if key is None:
                z = jnp.where(fresh == 0, 0, jnp.nan).astype(x.dtype)
            else:
                z = normal(part(key, before, now.t, i), x.shape, x.dtype)
            noise = expand(now.kept, x) * noise + fresh * z
            before, y = now.t, y + noise
        if i < len(tableau) - 1:
            known.append(rule.pick(denoise.predict(y, now.t)))
    return y


@noun
class SingleStep:
    """Any tableau as a solver; `eta` None is the probability-flow ODE, a number the SDE with that much fresh noise."""

    eta: Number | None = None
    nominal: int = static(2)
    rule: Rule = static(DATA)
    tableau: tuple = static(SECOND)
    two_nodes: object = static(None)

    def check(self):
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self):
        return is_positive(self.eta)

    @property
    def order(self):
        return 1 if self.stochastic else self.nominal

    def between(self, schedule, t, s):
        """The plan of steps from t (N,) to s (N,), wherever they are."""
        return plan(self.rule, self.tableau, schedule, t, s, self.eta, self.two_nodes)

    def plan(self, schedule, times, n, breaks=None):
        return self.between(schedule, times[:-1], times[1:])

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        first = denoise.predict(x, now.t)
        x_s = advance(
            self.rule, self.tableau, now.plan, denoise, x=x, t=now.t, first=first, key=key, noisy=self.eta is not None
        )
        return x_s, state, first


def DPMSolver(order: int = 3) -> SingleStep:
    """DPM-Solver-1, -2 or -3: exponential Runge-Kutta methods in log-SNR on eps, `order` evaluations a step.

    Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2. Raises ValueError for another order.
    """
    check_order("DPMSolver", order, 3)
    return SingleStep(None, order, NOISE, of_order(order), midpoint if order == 2 else None)


def DPM2() -> SingleStep:
    """k-diffusion's DPM2: an Euler step to the middle in log-SNR, and a whole step with the eps found there.

    It is DPM-Solver-2 under its other name.  Karras et al. 2022, arXiv:2206.00364, appendix D.
    """
    return DPMSolver(2)


def DPMpp2S() -> SingleStep:
    """DPM-Solver++(2S): as DPM2, on x_0.  Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r = 1/2."""
    return SingleStep(None, 2, DATA, SECOND, midpoint)


def DPMppSDE(eta: Number = 1.0) -> SingleStep:
    """DPM-Solver++ SDE: DPM-Solver++(2S) of the SDE with fresh noise of share 1 - exp(-2 eta h) in each stretch.

    The middle's noise is part of the step's, as on one Brownian path.  Lu et al. 2022, arXiv:2211.01095, section 5;
    Crowson's k-diffusion.
    """
    return SingleStep(eta, 2, DATA, SECOND, midpoint)
