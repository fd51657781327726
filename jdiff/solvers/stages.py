"""Single-step exponential methods: stages inside a step, each the integral of a polynomial through the ones before.

A tableau is a tuple of stages. Each stands at c_t + u (c_s - c_t) and integrates from t the polynomial through the
predictions of the stages named in `nodes` (0 is x_t itself), or takes their mean with `weights`. The last has u = 1.
"""

from collections.abc import Callable
from typing import NamedTuple

import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, expand, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.keys import part
from jdiff.core.pytrees import Noun, noun, prints_as_call, static
from jdiff.process.prediction import Prediction
from jdiff.solvers import polynomial
from jdiff.solvers.base import Mix, check_order, is_positive, mix, nearly_noise, scaled_noise
from jdiff.solvers.polynomial import DATA, NOISE, Rule, midpoint, step_size


class Stage(NamedTuple):
    """One stage of a tableau.

    Attributes:
        u: where it stands, as a share of the step's length in the rule's coordinate.
        nodes: the stages whose predictions it uses, 0 being x_t.
        weights: what their mean weighs each with; None for the integral of the polynomial through them.
    """

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

    Args:
        order: 2 or more.

    Returns:
        The tableau, of (order - 1)^2 evaluations besides the first.

    Reference:
        Spectral deferred correction, Dutt, Greengard & Rokhlin 2000.
    """
    shares = [j / (order - 1) for j in range(order)]
    newest, stages = {0: 0}, []  # newest: the last stage that was made at each point
    for _ in range(order - 1):
        for j in range(1, order):
            stages.append(Stage(shares[j], tuple(newest.values())))
            newest[j] = len(stages)
    return (*stages, Stage(1.0, tuple(newest.values())))


def tableau_of_order(order: int) -> tuple[Stage, ...]:
    """The tableau of an order, 1 or more: DPM-Solver's up to 3, collocation beyond."""
    return (FIRST, SECOND, THIRD)[order - 1] if order <= 3 else collocation(order)


class StagePlan(NamedTuple):
    """One stage of every step, each array (N,) but the weights.

    Attributes:
        t: the time at which the stage stands.
        first_order: the coefficients of its first-order part.
        weights: W_j of its nodes, (N, J).
        noise_kept: what is kept of the noise of the stage before.
        noise_scale: the standard deviation of the noise drawn since the stage before.
    """

    t: Array
    first_order: Mix
    weights: Array
    noise_kept: Array
    noise_scale: Array


def plan_stages(rule: Rule, tableau, schedule, t, s, *, eta=None, two_nodes=None) -> tuple[StagePlan, ...]:
    """The coefficients of all stages of the steps from t to s.

    Args:
        rule: what is interpolated, and how it is weighed.
        tableau: the stages.
        schedule: the noise schedule.
        t: where the steps begin, (N,).
        s: where they end, (N,).
        eta: None for the ODE, else a number: the SDE with fresh noise of share 1 - exp(-2 eta h).
        two_nodes: as in `polynomial.weights`.

    Returns:
        One plan a stage.
    """
    rate = 1.0 if eta is None else 1 + eta
    no_signal = nearly_noise(schedule, t)
    c_t, c_s = rule.coordinate(schedule, t), rule.coordinate(schedule, s)
    shares = jnp.asarray([0.0, *(stage.u for stage in tableau)], c_t.dtype)
    nodes = c_t[:, None] + shares[None] * (c_s - c_t)[:, None]
    zero = jnp.zeros_like(t)
    plans, t_before = [], t
    for stage, c in zip(tableau, nodes.T[1:], strict=True):
        # The end of the step is s itself, and not what the coordinate's inverse rounds it to.
        t_stage, c_stage = (s, c_s) if stage.u == 1 else (rule.time(schedule, c), c)
        if stage.weights is None:
            usable = (jnp.asarray(stage.nodes) == 0)[None] | ~no_signal[:, None]
            weights = polynomial.weights(
                rule, schedule, t, t_stage,
                c_t=c_t, c_s=c_stage, nodes=nodes[:, list(stage.nodes)], usable=usable, rate=rate, two_nodes=two_nodes,
            )  # fmt: skip
        else:
            total = jnp.where(no_signal, 0, rule.total(schedule, t, t_stage, rate))
            weights = total[:, None] * jnp.asarray(stage.weights, total.dtype)[None]
        noise_kept, noise_scale, eps_kept = zero, zero, jnp.ones_like(t)
        if eta is not None:
            h, h_before = step_size(schedule, t, t_stage), step_size(schedule, t_before, t_stage)
            eps_kept = jnp.exp(-eta * h)
            noise_kept = rule.retained(schedule, t_before, t_stage, rate)
            noise_scale = schedule.sigma(t_stage) * safe_sqrt(-jnp.expm1(-2 * eta * h_before))
        first_order = Mix(schedule.alpha(t_stage), schedule.sigma(t_stage) * eps_kept, zero)
        plans.append(StagePlan(t_stage, first_order, weights, noise_kept, noise_scale))
        t_before = t_stage
    return tuple(plans)


def advance(rule: Rule, tableau, plans, denoise, *, x, t, first: Prediction, key=None, noisy=False) -> Array:
    """x_s, from the first prediction on.

    Args:
        rule: what is interpolated.
        tableau: the stages.
        plans: one slice of what `plan_stages` returned.
        denoise: the denoiser.
        x: x_t, (B, ...).
        t: the time of x.
        first: the prediction at x_t.
        key: for the noise, as in `Solver.step`.
        noisy: whether noise is drawn. That of all stages follows one path: each adds to the one before.

    Returns:
        x_s, (B, ...).
    """
    predictions, t_before = [rule.pick(first)], t
    noise = jnp.zeros_like(x)
    for i, (stage, plan) in enumerate(zip(tableau, plans, strict=True)):
        y = mix(plan.first_order, first, x, None)
        for j, node in enumerate(stage.nodes):
            if node:
                y = y + expand(plan.weights[j], x) * (predictions[node] - predictions[0])
        if noisy:
            stretch_key = None if key is None else part(key, t_before, plan.t, i)
            noise = expand(plan.noise_kept, x) * noise + scaled_noise(plan.noise_scale, x, stretch_key)
            t_before, y = plan.t, y + noise
        if i < len(tableau) - 1:
            predictions.append(rule.pick(denoise.predict(y, plan.t)))
    return y


@noun
class SingleStep(Noun):
    """Any tableau of stages as a solver.

    A stage at time t_k, with h from t to t_k and the weights W_j of `polynomial`, is

        x_k = alpha_k x_0 + sigma_k exp(-eta h) eps + sum_{j > 0} W_j (p_j - p_0) + (noise of share 1 - exp(-2 eta h)).

    Args:
        eta: None for the probability-flow ODE, else 0 or more: the SDE with that much fresh noise.
        ode_order: the order of the tableau for the ODE.
        rule: what is interpolated, and how it is weighed.
        tableau: the stages; the last has u = 1.
        two_nodes: as in `polynomial.weights`.

    Raises:
        ValueError: for an eta that is negative or not finite.
    """

    eta: Number | None = None
    ode_order: int = static(default=2)
    rule: Rule = static(default=DATA)
    tableau: tuple = static(default=SECOND)
    two_nodes: Callable | None = static(default=None)

    def check(self):
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self) -> bool:
        return is_positive(self.eta)

    @property
    def order(self) -> int:
        return 1 if self.stochastic else self.ode_order

    @property
    def mixes(self):
        return len(self.tableau) == 1

    def between(self, schedule, t, s):
        """The plan of steps from t (N,) to s (N,), wherever they are."""
        return plan_stages(self.rule, self.tableau, schedule, t, s, eta=self.eta, two_nodes=self.two_nodes)

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


@prints_as_call
def DPMSolver(order: int = 3) -> SingleStep:
    """DPM-Solver-1, -2 or -3: exponential Runge-Kutta methods in log-SNR on eps.

    With h the step in log(alpha/sigma), and m, m1, m2 the points at 1/2, 1/3 and 2/3 of it:

        order 1:  x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps(x_t)
        order 2:  x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps(x_m)
        order 3:  x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps(x_t)
                        - (3/2) sigma_s ((e^h - 1) / h - 1) (eps(x_m2) - eps(x_t))

    x_m and x_m1 are steps of order 1. x_m2 integrates the line through eps(x_t) and eps(x_m1), as x_s of order 3
    integrates the line through eps(x_t) and eps(x_m2).

    Args:
        order: 1, 2 or 3.

    Returns:
        The solver, of `order` evaluations a step.

    Raises:
        ValueError: for another order.

    Reference:
        Lu et al. 2022, arXiv:2206.00927, algorithms 1 and 2.
    """
    check_order("DPMSolver", order, 3)
    return SingleStep(
        ode_order=order, rule=NOISE, tableau=tableau_of_order(order), two_nodes=midpoint if order == 2 else None
    )


@prints_as_call
def DPM2() -> SingleStep:
    """DPM2 of k-diffusion: an Euler step to the middle in log-SNR, and a whole step with the eps found there.

        x_m = alpha_m x_0(x_t) + sigma_m eps(x_t),    sigma_m / alpha_m = sqrt((sigma_t / alpha_t) (sigma_s / alpha_s))
        x_s = (alpha_s / alpha_t) x_t - sigma_s (e^h - 1) eps(x_m)

    It is DPM-Solver-2 under its other name.

    Returns:
        The solver, of second order, with two evaluations a step.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, appendix D; Lu et al. 2022, arXiv:2206.00927, algorithm 1.
    """
    return DPMSolver(2)


@prints_as_call
def DPMpp2S() -> SingleStep:
    """DPM-Solver++(2S): a step of first order to the middle in log-SNR, and a whole step with the x_0 found there.

        x_m = (sigma_m / sigma_t) x_t + alpha_m (1 - e^(-h/2)) x_0(x_t)
        x_s = (sigma_s / sigma_t) x_t + alpha_s (1 - e^(-h)) x_0(x_m)

    Returns:
        The solver, of second order, with two evaluations a step.

    Reference:
        Lu et al. 2022, arXiv:2211.01095, algorithm 1 with r = 1/2.
    """
    return SingleStep(ode_order=2, rule=DATA, tableau=SECOND, two_nodes=midpoint)


@prints_as_call
def DPMppSDE(eta: Number = 1.0) -> SingleStep:
    """DPM-Solver++ SDE: DPM-Solver++(2S) for the SDE.

        x_s = (sigma_s / sigma_t) e^(-eta h) x_t + alpha_s (1 - e^(-(1 + eta) h)) x_0(x_m)
              + sigma_s sqrt(1 - e^(-2 eta h)) z,    z ~ N(0, I)

    x_m is a step of first order to the middle in log-SNR. Its noise is part of the whole step's noise, as on one
    Brownian path.

    Args:
        eta: 0 or more; 0 is `DPMpp2S`.

    Returns:
        The solver, of two evaluations a step.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Lu et al. 2022, arXiv:2211.01095, section 5; Crowson's k-diffusion, `sample_dpmpp_sde`.
    """
    return SingleStep(eta=eta, ode_order=2, rule=DATA, tableau=SECOND, two_nodes=midpoint)
