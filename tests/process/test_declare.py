"""Classes of a user's own: one decorator makes each what the library asks for, and one line names it where it lacks."""

import dataclasses
import math
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import grid, guidance, losses, oracle, sde, solvers, targets

KEY, X = jax.random.key(0), np.ones((3, 2), np.float32)


@jdiff.schedule
class Power:
    """alpha = 1 - t^p, sigma = t^p: `Flow` on another clock, and `Flow` itself for p = 1."""

    power: float = 2.0

    def alpha(self, t):
        return 1 - t**self.power

    def sigma(self, t):
        return t**self.power


class Undecorated:
    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t


class Inherited(jdiff.Schedule):
    alpha, sigma = Undecorated.alpha, Undecorated.sigma


# ---------------------------------------------------------------- schedules


def test_a_class_of_two_methods_is_a_schedule():
    """With p = 1 all that the library makes of it is what it makes of Flow, and with any p it is Flow at t^p."""
    own, flow, t = Power(1), jdiff.Flow(), np.linspace(0.05, 1, 8, dtype=np.float32)
    assert isinstance(own, jdiff.Schedule) and repr(Power(3)) == "Power(power=3.0)" and Power().replace(power=1) == own
    assert pickle.loads(pickle.dumps(own)) == own and jax.tree.leaves(own) == [1.0]
    names = ("t_min", "t_max", "last_time", "bounded", "has_kinks")
    assert [getattr(own, name) for name in names] == [getattr(flow, name) for name in names]
    value = jdiff.log_snr(flow, t)
    for p in (1.0, 2.0, 3.0):
        np.testing.assert_allclose(jdiff.log_snr(Power(p), t ** (1 / p)), value, rtol=1e-4, atol=1e-5)
        np.testing.assert_allclose(jdiff.time_of(Power(p), value), t ** (1 / p), rtol=1e-5)
    denoise, times = oracle.Gaussian([1.0, -1.0], np.eye(2)).denoise, grid.log_snr(flow, 5)
    run = lambda s: jdiff.sample(solvers.DDIM(), denoise(s), s, X, times)  # noqa: E731
    np.testing.assert_allclose(run(own), run(flow), rtol=1e-5)
    np.testing.assert_allclose(jdiff.Shifted(own, 3).alpha(t), jdiff.Shifted(flow, 3).alpha(t), atol=1e-6)


def test_its_numbers_are_leaves():
    """One program for all numbers, a vmap over several, and d alpha / d p = -t^p log t."""
    program = jax.jit(chex.assert_max_traces(jdiff.log_snr, n=1))
    for p in (1.0, 2, np.float64(3)):
        np.testing.assert_allclose(program(Power(p), 0.5), 2 * np.log(2.0**p - 1), rtol=1e-5)
    several = jax.vmap(lambda s: s.alpha(jnp.float32(0.5)))(Power(jnp.array([1.0, 2.0])))
    np.testing.assert_allclose(several, [0.5, 0.75])
    slope = jax.grad(lambda p: Power(p).alpha(jnp.float32(0.5)))(2.0)
    np.testing.assert_allclose(slope, -0.25 * np.log(0.5), rtol=1e-6)


def test_a_class_says_its_own_domain():
    """By class attributes, by fields and by its own time_at; `super()` and the class's own check work."""

    @jdiff.schedule
    class Exploding(jdiff.Schedule):
        rate: float = 8.0
        t_min = 0.0
        bounded = True
        last_time = float("inf")

        def check(self):
            if self.rate <= 0:
                raise ValueError("rate must be positive")

        def alpha(self, t):
            return jnp.ones_like(t)

        def sigma(self, t):
            return 0.01 * jnp.exp(self.rate * t)

        def time_at(self, alpha, sigma):
            return jnp.log(100 * sigma / alpha) / self.rate

    @jdiff.schedule
    class Slower(Exploding):
        t_max: float = 0.5

        def sigma(self, t):
            return super().sigma(t)

    own = Exploding()
    assert (own.t_min, own.bounded, own.last_time, Slower().t_max) == (0.0, True, float("inf"), 0.5)
    np.testing.assert_allclose(jdiff.time_of(own, jdiff.log_snr(own, jnp.array([0.0, 0.5]))), [0.0, 0.5], atol=1e-6)
    with pytest.raises(ValueError, match="rate must be positive"):
        Slower(rate=-1.0)
    with pytest.raises(ValueError, match="Exploding is bounded"):
        jdiff.Shifted(own, 2.0)


def test_a_table_of_numbers():
    """An array among the fields, of any length: also of the length of the times at which the class is tried."""

    @jdiff.schedule
    class Table:
        values: jax.Array

        def _read(self, t):
            return jnp.interp(t, jnp.linspace(0, 1, len(self.values)), self.values)

        def alpha(self, t):
            return jnp.sqrt(jax.nn.sigmoid(self._read(t)))

        def sigma(self, t):
            return jnp.sqrt(jax.nn.sigmoid(-self._read(t)))

    for length in (2, 9, 20):
        np.testing.assert_allclose(jdiff.log_snr(Table(jnp.linspace(8, -8, length)), 0.25), 4, rtol=1e-4)
        with pytest.raises(ValueError, match=r"Table: log\(alpha\^2 / sigma\^2\) must fall"):
            Table(jnp.linspace(-8, 8, length))


def made(alpha=Undecorated.alpha, sigma=Undecorated.sigma, bases=(), **others):
    return jdiff.schedule(type("Own", bases, dict(alpha=alpha, sigma=sigma) | others))


NOT_SCHEDULES = [
    (lambda: made(sigma=None), "Own has no method sigma; a schedule has the methods alpha(self, t) and sigma(self, t)"),
    (lambda: made(alpha=1.0), "Own has no method alpha"),
    (lambda: jdiff.schedule(type("Own", (jdiff.Schedule,), {})), "Own has no method alpha"),
    (lambda: made(__init__=lambda self: None), "Own has an __init__ of its own; declare what it is given as fields"),
    (lambda: made(__post_init__=lambda self: None), "Own has an __post_init__ of its own"),
    (lambda: jdiff.schedule(Power), "Power is a dataclass already; leave the other decorator out"),
    (lambda: jdiff.noun(dataclasses.dataclass(type("Own", (), {}))), "Own is a dataclass already"),
    (lambda: jdiff.schedule(Power()), "@jdiff.schedule stands above a class; got an object, a Power"),
    (made(alpha=lambda self, t: 1.0), "Own: alpha(t) has shape () for t of shape (9,); expected the shape of t"),
    (made(sigma=lambda self, t: t[None]), "Own: sigma(t) has shape (1,) for t of shape ()"),
    (made(sigma=lambda self, t: (t, t)), "Own: sigma(t) has shape None for t of shape ()"),
    (made(sigma=lambda self, t: math.sin(t)), "Own: sigma fails for an array t that JAX traces (Concretization"),
    (made(sigma=lambda self, t: np.sin(t)), "Own: sigma fails for an array t that JAX traces (TracerArray"),
    (made(sigma=lambda self, t: t if t > 0.5 else 2 * t), "use jax.numpy, and jnp.where for branches"),
    (made(sigma=lambda self, t: jnp.nan * t), "Own: sigma(0.001) = nan; expected a finite number, 0 or more"),
    (made(alpha=lambda self, t: 1 - 2 * t), "Own: alpha(0.501) = -0.001; expected a finite number, 0 or more"),
    (
        made(Undecorated.sigma, Undecorated.alpha),  # time the other way round, as in much of flow matching
        "Own: log(alpha^2 / sigma^2) must fall from t = 0, data, to t = 1, noise; it is -13.8 at t = 0.001",
    ),
    (made(t_min=0.0), "Own: sigma is 0 at t_min = 0, where it must be more than 0; set t_min = 0.001"),
    (made(t_max=2.0), "Own: times lie between 0 and 1, but t_min = 0.001 and t_max = 2.0"),
    (made(t_min=0.5, t_max=0.2), "Own: times lie between 0 and 1, but t_min = 0.5 and t_max = 0.2"),
    (made(time_at=lambda self, alpha, sigma: sigma), None),  # of Flow, sigma is the time
    (made(time_at=lambda self, alpha, sigma: alpha), "Own: time_at gives 0.999 for alpha and sigma of t = 0.001"),
]


@pytest.mark.parametrize("make,words", NOT_SCHEDULES, ids=[f"{i}: {w}"[:40] for i, (_, w) in enumerate(NOT_SCHEDULES)])
def test_one_line_says_why_a_class_is_no_schedule(make, words):
    """When it is declared, or when the first object is made."""
    if words is None:
        make()
        return
    with pytest.raises((TypeError, ValueError)) as caught:
        make()
    assert words in str(caught.value) and len(str(caught.value).splitlines()) == 1


DENOISE = oracle.Gaussian([0.0, 0.0], np.eye(2)).denoise(jdiff.Flow())
ASKED = {
    "sample": lambda s: jdiff.sample(solvers.DDIM(), lambda x, t: x, s, X, grid.uniform(3)),
    "invert": lambda s: jdiff.invert(solvers.DDIM(), lambda x, t: x, s, X, grid.uniform(3)),
    "sample_parallel": lambda s: jdiff.sample_parallel(solvers.DDIM(), lambda x, t: x, s, X, grid.uniform(3)),
    "denoiser": lambda s: jdiff.denoiser(lambda p, x, label, cond: x, {}, s, targets.Eps()),
    "loss": lambda s: losses.denoising(
        lambda p, x, label, cond: x, {}, KEY, X, schedule=s, target=targets.Eps()
    ),
    "prior": lambda s: jdiff.prior(s, KEY, (3, 2)),
    "q_sample": lambda s: jdiff.q_sample(s, X, 0.5, X),
    "q_posterior": lambda s: jdiff.q_posterior(s, X, X, 0.5, 0.2),
    "eps_from": lambda s: jdiff.eps_from(s, X, X, 0.5),
    "log_snr": lambda s: jdiff.log_snr(s, 0.5),
    "time_of": lambda s: jdiff.time_of(s, 0.5),
    "as_denoise": lambda s: jdiff.as_denoise(lambda x, t: x, s),
    "Shifted": lambda s: jdiff.Shifted(s),
    "oracle": lambda s: oracle.Gaussian([0.0, 0.0], np.eye(2)).denoise(s)(X, 0.5),
    "threshold": lambda s: guidance.threshold(lambda x, t: x, s),
    "score": lambda s: sde.score(lambda x, t: x, s, X, 0.5),
    "forward": lambda s: sde.forward(s, 0.5),
    "reverse": lambda s: sde.reverse(lambda x, t: x, s)(X, 0.5),
    "flow": lambda s: sde.probability_flow(lambda x, t: x, s)(X, 0.5),
    "grid.log_snr": lambda s: grid.log_snr(s, 4),
    "grid.karras": lambda s: grid.karras(s, 4),
    "grid.of_sigmas": lambda s: grid.of_sigmas(s, [1.0, 0.5]),
    "aim": lambda s: targets.aim(s, targets.Velocity(), X, X, 0.5),
    "solve": lambda s: targets.solve(s, targets.Velocity(), X, X, 0.5),
}  # fmt: skip


@pytest.mark.parametrize("call", ASKED.values(), ids=ASKED)
def test_without_the_decorator_one_line_names_it(call):
    """Wherever a schedule is asked for, of a class with the methods alone and of one that inherits."""
    for cls in (Undecorated, Inherited):
        with pytest.raises(TypeError, match=f"^{cls.__name__} is no schedule yet: decorate the class with @jdiff.sche"):
            call(cls())


# ---------------------------------------------------------------- targets, solvers, conditionings, guidance


@jdiff.noun
class Scaled:
    """A target: eps times a number."""

    scale: float = 1.0

    def row(self, schedule, t):
        return targets.Row(jnp.zeros_like(t), self.scale * jnp.ones_like(t))


@jdiff.noun
class Step:
    """A solver: DDIM's deterministic step, by hand."""

    order = 1
    stochastic = False

    def plan(self, schedule, times, n, breaks=None):
        return ()

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        return schedule.alpha(now.s) * prediction.x0 + schedule.sigma(now.s) * prediction.eps, state, prediction


@jdiff.noun
class Shown:
    """A conditioning: x times a number, and t."""

    scale: float = 1.0

    def __call__(self, schedule, x, t):
        return self.scale * x, jnp.broadcast_to(t, x.shape[:1])


@jdiff.noun
class Shrunk:
    """A guidance: an estimate of x_0 times a number."""

    base: jdiff.Denoise
    scale: float = 1.0

    def __call__(self, x, t):
        return self.scale * self.base(x, t)


def bare(noun, **fields):
    """An object of the same methods, of a class that is no noun."""
    methods = {name: value for name, value in vars(noun).items() if callable(value) and name in METHODS}
    return type("Bare", (), methods | dict(order=1, stochastic=False) | fields)()


METHODS = ("row", "plan", "init", "step", "__call__", "predict")


def network(params, x, label, cond):
    return params * x + label[:, None]


def test_a_noun_with_the_methods_is_a_target_a_solver_a_conditioning_and_guidance():
    """Under one jit, for all their numbers; with scale 1 they are the library's own."""
    assert isinstance(Scaled(), targets.Target) and isinstance(Step(), solvers.Solver)
    flow, times = jdiff.Flow(), grid.uniform(4)

    @jax.jit
    @chex.assert_max_traces(n=1)
    def run(solver, target, conditioning, scale):
        denoise = jdiff.denoiser(network, 0.5, flow, target, conditioning=conditioning)
        return jdiff.sample(solver, Shrunk(denoise, scale), flow, 0.5 * X, times)

    for scale in (1.0, 2.0, 0.5):
        run(Step(), Scaled(scale), Shown(scale), scale)
    shown = lambda schedule, x, t: (x, jnp.broadcast_to(t, x.shape[:1]))  # noqa: E731
    denoise = jdiff.denoiser(network, 0.5, flow, targets.Eps(), conditioning=shown)
    want = jax.jit(jdiff.sample)(solvers.DDIM(), denoise, flow, 0.5 * X, times)  # a function goes through jit, too
    np.testing.assert_allclose(run(Step(), Scaled(), Shown(), 1.0), want, rtol=1e-5, atol=1e-6)


def test_without_noun_one_line_names_it():
    solver, target, denoise = bare(Step), bare(Scaled, scale=1.0), bare(type(DENOISE), schedule=jdiff.Flow())
    with pytest.raises(TypeError, match="^solver is a Bare, which is no pytree; decorate its class with @jdiff.noun$"):
        jdiff.sample(solver, DENOISE, jdiff.Flow(), X, grid.uniform(3))
    with pytest.raises(TypeError, match="^target is a Bare, which is no pytree; decorate its class with @jdiff.noun$"):
        jdiff.denoiser(network, {}, jdiff.Flow(), target)
    with pytest.raises(TypeError, match="^target is a Bare, which is no pytree"):
        losses.denoising(network, {}, KEY, X, schedule=jdiff.Flow(), target=target)
    with pytest.raises(TypeError, match="^denoise is a Bare; .*; inherit from jdiff.Denoise, and predict"):
        jdiff.as_denoise(denoise, jdiff.Flow())

    class Inheriting(jdiff.Denoise):
        schedule = jdiff.Flow()

        def predict(self, x, t):
            return DENOISE.predict(x, t)

    with pytest.raises(TypeError, match="^Inheriting is no pytree; decorate the class with @jdiff.noun$"):
        guidance.cfg(Inheriting(), DENOISE, 2.0)
    decorated = jdiff.noun(type("Decorated", (jdiff.Denoise,), dict(schedule=jdiff.Flow(), predict=Inheriting.predict)))
    guided = guidance.cfg(decorated(), DENOISE, 2.0)
    np.testing.assert_allclose(guided(X, 0.5), DENOISE(X, 0.5), rtol=1e-6)


@jdiff.noun
class Sloppy:
    """A solver with a plan of one row too many."""

    order = 1
    stochastic = False

    def plan(self, schedule, times, n, breaks=None):
        return schedule.alpha(times)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        return x, state, prediction


@jdiff.noun
class Unfinished:
    """A solver that does not say whether it draws noise."""

    order = 1
    plan = init = step = Sloppy.plan


@pytest.mark.parametrize("run", [jdiff.sample, jdiff.invert], ids=["sample", "invert"])
def test_a_solver_with_a_wrong_plan_or_something_missing_is_told(run):
    data = jdiff.oracle.Gaussian([1.0], [[0.5]])
    flow, x, times = jdiff.Flow(), jnp.ones((2, 1)), jdiff.grid.uniform(5)
    with pytest.raises(ValueError, match=r"Sloppy: plan made an array \(5,\) for 4 steps; expected 4 rows"):
        run(Sloppy(), data.denoise(flow), flow, x, times)
    with pytest.raises(TypeError, match="is a Unfinished, which lacks stochastic; see jdiff.solvers.Solver"):
        run(Unfinished(), data.denoise(flow), flow, x, times)


def test_rounding_below_zero_is_named():
    with pytest.raises(ValueError, match=r"alpha\(1\) = -4.37e-08.*if that is rounding, take jnp.maximum\(..., 0\)"):

        @jdiff.schedule
        class Rounded:
            def alpha(self, t):
                return jnp.cos(jnp.pi / 2 * t)

            def sigma(self, t):
                return jnp.sin(jnp.pi / 2 * t)

        Rounded()
