"""Guidance inside `sample`: CFG++ and the solvers, memories, saved evaluations, one program for all numbers."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Bent, Diagonal, jitted_sample

import jdiff
from jdiff import grid, guidance, solvers
from jdiff.core.pytrees import noun, per_sample
from jdiff.process.forward import q_sample

SCHEDULE, KEY = jdiff.Cosine(), jax.random.key(1)
TIMES = grid.log_snr(SCHEDULE, 8)[1:]
X = np.asarray(jdiff.prior(SCHEDULE, KEY, (5, 2)))
C, U = Diagonal(SCHEDULE, 0.8, 0.1), Bent(SCHEDULE)
MOMENTUM = guidance.apg(C, U, 3.0, momentum=-0.6, limit=2.0)


def run(denoise, solver=None, key=None, times=TIMES, x=X, **settings):
    return jitted_sample()(solver or solvers.DDIM(), denoise, SCHEDULE, x, times, key, **settings)


# ---------------------------------------------------------------- CFG++


def test_cfg_pp_under_ddim_is_cfg_of_a_growing_weight():
    """w r_t / (r_t - r_s) with r = sigma/alpha, at each step of the grid."""
    with jax.enable_x64(True):
        times = grid.log_snr(SCHEDULE, 8)[1:]
        c, u = Diagonal(SCHEDULE, 0.8, 0.1), Bent(SCHEDULE)
        r = SCHEDULE.sigma(times) / SCHEDULE.alpha(times)
        weights = 0.6 * r[:-1] / (r[:-1] - r[1:])
        x = np.asarray(X, float)
        x0, path = run(guidance.cfg_pp(c, u, 0.6), times=times, x=x, path=True)

        @jax.jit
        def step(x, t, s, w):
            return q_sample(SCHEDULE, *(f := guidance.cfg(c, u, w).predict(x, t))[:1], s, f.eps)

        for i in range(6):
            before = x if i == 0 else path[i - 1]
            np.testing.assert_allclose(path[i], step(before, times[i], times[i + 1], weights[i]), rtol=1e-9)
        np.testing.assert_allclose(x0, guidance.cfg(c, u, 0.6)(path[-1], times[-1]), rtol=1e-12)


PLUS = guidance.cfg_pp(C, U, 0.6)
MIXING = {
    "ddim": solvers.DDIM(0.5), "ddpm": solvers.DDPM(), "euler": solvers.Euler(), "ancestral": solvers.EulerAncestral(),
    "em": solvers.EulerMaruyama(), "over euler": solvers.Ancestral(solvers.Euler()),
    "churn": solvers.Churn(solvers.Euler(), 5.0), "one node": solvers.LMS(1), "first order": solvers.DPMSolver(1),
}  # fmt: skip
REFUSED = {
    "heun": solvers.Heun(), "rk4": solvers.RK4(), "2m": solvers.DPMpp2M(), "3m": solvers.DPMpp3M(),
    "2s": solvers.DPMpp2S(), "unipc": solvers.UniPC(), "unipc 1": solvers.UniPC(1), "sa": solvers.SASolver(),
    "lms": solvers.LMS(), "deis": solvers.DEIS(), "pndm": solvers.PNDM(), "edm": solvers.EDMStochastic(),
    "dpm2a": solvers.DPM2Ancestral(), "ge": solvers.GradientEstimation(), "langevin": solvers.AnnealedLangevin(),
    "restart": solvers.Restart(solvers.Euler()), "pc": solvers.PredictorCorrector(solvers.DDIM()),
    "remember": solvers.Remember(solvers.Heun()),
}  # fmt: skip


@pytest.mark.parametrize("name", MIXING)
def test_solvers_that_mix_take_cfg_pp(name):
    """Its guided x_0 and its unconditional eps both change what they return."""
    with jax.disable_jit():
        plus, unconditional, guided = (
            jdiff.sample(MIXING[name], denoise, SCHEDULE, X, TIMES[2:5], KEY)
            for denoise in (PLUS, U, guidance.cfg(C, U, 0.6))
        )
    assert np.isfinite(plus).all()
    assert np.abs(plus - unconditional).max() > 1e-3 and np.abs(plus - guided).max() > 1e-3


@pytest.mark.parametrize("name", REFUSED)
def test_the_others_refuse_cfg_pp_wherever_it_is(name):
    inside = guidance.threshold(guidance.interval(PLUS, C, 0.1, 2.0), SCHEDULE)
    for denoise in (PLUS, inside):
        with pytest.raises(ValueError, match="would lose a half of CFG"):
            jdiff.sample(REFUSED[name], denoise, SCHEDULE, X, TIMES, KEY)


def test_what_has_no_ode_has_no_adaptive_steps():
    for denoise in (PLUS, MOMENTUM):
        with pytest.raises(ValueError, match="has no ODE"):
            jdiff.sample_adaptive(denoise, SCHEDULE, X)
    with pytest.raises(ValueError, match="remembers earlier steps"):
        jdiff.sample_parallel(solvers.DDIM(), MOMENTUM, SCHEDULE, X, TIMES)


def test_thresholding_of_cfg_pp_keeps_its_noise():
    x0, eps, _ = guidance.threshold(PLUS, SCHEDULE, 0.3).predict(X, 0.5)
    assert np.abs(x0).max() <= 0.3 < np.abs(PLUS(X, 0.5)).max()
    np.testing.assert_array_equal(eps, U.predict(X, 0.5).eps)


# ---------------------------------------------------------------- memory


def by_hand(solver, w=3.0, momentum=-0.6, limit=2.0, last=7):
    """APG with momentum, its loop written out: one average, made by the first evaluation of each step."""
    plan, state, average, x = solver.plan(SCHEDULE, TIMES[:last], last), solver.init(X), np.zeros_like(X), X
    path = []

    def apg(average, news):
        def denoise(y, t):
            c, u = C(y, t), U(y, t)
            d = c - u + momentum * average
            news.append(d)
            d = d * jnp.minimum(1, limit / jnp.linalg.norm(d, axis=1, keepdims=True))
            along = (d * c).sum(1, keepdims=True) / (c * c).sum(1, keepdims=True) * c
            return c + (w - 1) * (d - along)

        return jdiff.as_denoise(denoise, SCHEDULE)

    for i in range(last - 1):
        now = solvers.Now(i, TIMES[i], TIMES[i + 1], jax.tree.map(lambda a, i=i: a[i], plan))
        x, state, _ = solver.step(apg(average, news := []), SCHEDULE, x, now, state, None)
        average = news[0]
        path.append(x)
    return apg(average, [])(x, TIMES[last - 1]), jnp.stack(path)


@pytest.mark.parametrize("solver", [solvers.DDIM(), solvers.Heun(), solvers.DPMpp2M()], ids=["ddim", "heun", "2m"])
def test_momentum_rides_from_step_to_step(solver):
    expected = jax.jit(functools.partial(by_hand, solver))()
    chex.assert_trees_all_close(run(MOMENTUM, solver, path=True), expected, rtol=1e-4, atol=1e-4)
    still = run(guidance.apg(C, U, 3.0, limit=2.0), solver)
    assert np.abs(still - expected[0]).max() > 1e-2


def test_momentum_with_a_traced_number_of_steps_and_keys_of_each_sample():
    """One program for every n; rows depend on their own key; checkpointed gradients are finite."""
    sample = jax.jit(chex.assert_max_traces(lambda denoise, n: jdiff.sample(solvers.DDIM(), denoise, SCHEDULE, X, TIMES, n=n), n=1))  # noqa: E501  # fmt: skip
    for n, momentum in ((7, -0.6), (4, -0.3)):
        got = sample(guidance.apg(C, U, 3.0, momentum=momentum, limit=2.0), n)
        expected = jax.jit(functools.partial(by_hand, solvers.DDIM(), momentum=momentum, last=n))()[0]
        np.testing.assert_allclose(got, expected, rtol=1e-4, atol=1e-5)
    keys = jax.random.split(KEY, 5)
    whole = run(MOMENTUM, solvers.DDIM(1.0), keys)
    np.testing.assert_allclose(run(MOMENTUM, solvers.DDIM(1.0), keys[2:4], x=X[2:4]), whole[2:4], rtol=1e-4, atol=1e-5)

    def loss(numbers):
        w, momentum, limit, parallel = numbers
        denoise = guidance.apg(C, U, w, momentum=momentum, limit=limit, parallel=parallel)
        return jdiff.sample(solvers.DDIM(), denoise, SCHEDULE, X, TIMES).sum()

    chex.assert_tree_all_finite(jax.jit(jax.grad(loss))((3.0, -0.6, 2.0, 0.1)))


@noun
class Seen(jdiff.Denoise):
    """A denoiser with a memory: it says how many steps there were."""

    schedule: jdiff.Schedule

    def memory(self, x):
        return jnp.zeros_like(x[:, 0])

    def predict_with(self, x, t, memory):
        x0 = jnp.zeros_like(x) + memory[:, None]
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t)), memory + 1

    def predict(self, x, t):
        return self.predict_with(x, t, self.memory(x))[0]


SEEN = Seen(SCHEDULE)


@pytest.mark.parametrize(
    "around",
    [
        lambda d: d,
        lambda d: guidance.cfg(d, U, 1.0),
        lambda d: guidance.cfg(U, d, 0.0),
        lambda d: guidance.interval(d, U, 0.0, jnp.inf),
        lambda d: guidance.threshold(d, SCHEDULE, 100.0),
        lambda d: guidance.rescale(guidance.cfg(d, U, 1.0), U, 0.0),
        lambda d: guidance.compose(U, [(d, 1.0)]),
        lambda d: guidance.classifier(d, lambda x, t: x.sum(1), 0.0),
        lambda d: guidance.classifier_x0(d, lambda x: x.sum(1), 0.0),
        lambda d: guidance.zero_star(d, U, 1.0, zero_above=jnp.inf),
        lambda d: guidance.cached(d, 1),
        lambda d: guidance.cfg_pp(d, U, 1.0),
        lambda d: guidance.apg(d, U, 1.0, momentum=0.5),
        lambda d: guidance.cfg(guidance.threshold(guidance.cfg(U, d, 0.0), SCHEDULE, 100.0), U, 1.0),
    ],
    ids=lambda a: "",
)  # fmt: skip
def test_a_memory_passes_through_every_guidance(around):
    """The last evaluation of seven has seen six steps."""
    with jax.disable_jit():
        out = jdiff.sample(solvers.DDIM(), around(SEEN), SCHEDULE, X, TIMES)
    np.testing.assert_allclose(out, np.full_like(X, 6.0), rtol=1e-5)


def test_a_memory_stands_still_outside_an_interval():
    """It counts the guided steps alone."""
    low, high = guidance.interval_of_steps(SCHEDULE, TIMES, 0.2, 0.8)
    _, path = run(guidance.interval(SEEN, U, low, high), path=True)
    first, end = int(0.2 * 7), int(0.8 * 7)
    alone = np.asarray(path[first - 1])
    for i in range(first, end):
        x0 = np.full_like(X, i - first)
        eps = jdiff.eps_from(SCHEDULE, x0, alone, TIMES[i])
        alone = q_sample(SCHEDULE, x0, TIMES[i + 1], eps)
        np.testing.assert_allclose(path[i], alone, rtol=1e-4, atol=1e-5)


def test_no_memory_no_trace_of_it():
    """Without momentum the program of `sample` is that of the formula as a plain function."""
    text = [
        str(jax.make_jaxpr(lambda d: jdiff.sample(solvers.DDIM(), d, SCHEDULE, X, TIMES, checkpoint=False))(denoise))
        for denoise in (guidance.apg(C, U, 3.0), MOMENTUM)
    ]
    carried = [jaxpr.count("num_carry=1\n") for jaxpr in text]
    assert carried == [1, 0] and "num_carry=2\n" in text[1]


# ---------------------------------------------------------------- evaluations


def counted(calls, name, cond=0.0, params=1.0):
    """A denoiser of a small network that counts the rows it is called with, at run time."""

    def network(params, x, label, cond):
        jax.debug.callback(lambda: calls.append((name, x.shape[0])))
        return params * jnp.sin(x) * (1 + cond[:, None]) + 0.1 * label[:, None]

    return jdiff.denoiser(network, params, SCHEDULE, jdiff.targets.V(), jnp.full(5, cond)), network


def calls_of(denoise, calls, solver=None, times=TIMES):
    calls.clear()
    out = jax.block_until_ready(run(denoise, solver, times=times))
    jax.effects_barrier()
    return out, len(calls)


def test_evaluations():
    """What each method costs over seven evaluations, counted as it runs inside jit and scan."""
    calls = []
    c, network = counted(calls, "c", 0.3)
    u = jdiff.denoiser(network, c.params, SCHEDULE, jdiff.targets.V(), jnp.full(5, -0.2))
    guided = guidance.cfg(c, u, 3.0)
    low, high = guidance.interval_of_steps(SCHEDULE, TIMES, 0.3, 0.6)
    costs = {
        "conditional": (c, 7),
        "cfg": (guided, 14),
        "in one call": (guidance.cfg(c, u, 3.0, batched=True), 7),
        "interval": (guidance.interval(guided, c, low, high), 7 + 2),
        "every second": (guidance.cfg(c, guidance.cached(u, 2), 3.0), 7 + 4),
        "every third": (guidance.cfg(c, guidance.cached(u, 3), 3.0), 7 + 3),
        "rescaled": (guidance.rescale(guided, c, 0.7), 14),
        "rescaled apg": (guidance.rescale(guidance.apg(c, u, 3.0, momentum=-0.5), c, 0.7), 14),
        "rescaled interval": (guidance.interval(guidance.rescale(guided, c, 0.7), c, low, high), 7 + 2),
        "zeroed": (guidance.zero_star(c, u, 3.0, zero_above=high), 14 - 2 * 2),
        "classifier": (guidance.classifier(u, lambda x, t: -(x**2).sum(1), 3.0), 7),
        "of x_0, cheap": (guidance.classifier_x0(u, lambda x: -(x**2).sum(1), 3.0, std=0.5), 7),
    }
    made = {name: calls_of(denoise, calls) for name, (denoise, _) in costs.items()}
    assert {name: count for name, (_, count) in made.items()} == {name: count for name, (_, count) in costs.items()}
    np.testing.assert_allclose(made["in one call"][0], made["cfg"][0], rtol=1e-5, atol=1e-5)


def test_cached_is_the_x0_of_the_step_before():
    """Every second step written out."""
    with jax.disable_jit():
        got = jdiff.sample(solvers.DDIM(), guidance.cfg(C, guidance.cached(U, 2), 3.0), SCHEDULE, X, TIMES)
        x = X
        for i, t in enumerate(TIMES):
            kept = U(x, t) if i % 2 == 0 else kept  # noqa: F821
            guided = kept + 3.0 * (C(x, t) - kept)
            x = q_sample(SCHEDULE, guided, TIMES[i + 1], jdiff.eps_from(SCHEDULE, guided, x, t)) if i < 6 else guided
    np.testing.assert_allclose(got, x, rtol=1e-4, atol=1e-5)


def test_outside_its_interval_it_is_bitwise_the_conditional_model():
    """In every bit of x_0, eps and extra, at one time and at a time a sample."""

    def network(params, x, label, cond):
        return jnp.concatenate([jnp.sin(params * x) + label[:, None], jnp.full_like(x, params)], -1)

    c, u = (jdiff.denoiser(network, v, SCHEDULE, jdiff.targets.V(), learned_variance=True) for v in (0.5, -0.7))
    inside = guidance.interval(guidance.apg(c, u, 4.0, momentum=-0.5), c, 0.5, 1.0)
    both = jax.jit(lambda t: (inside.predict(X, t), c.predict(X, t), inside.guided.predict(X, t)))
    for t in (0.1, 0.8, jnp.linspace(0.7, 0.9, 5)):
        got, conditional, guided = both(t)
        chex.assert_trees_all_equal(got, conditional, strict=True)
        assert np.abs(got.x0 - guided.x0).max() > 1e-2
    got, _, guided = both(0.4)
    chex.assert_trees_all_equal(got, guided, strict=True)


def test_an_infinite_interval_has_no_upper_end():
    """Also where alpha is 0, and sigma/alpha infinite."""
    flow = jdiff.Flow()
    c, u = Diagonal(flow, 0.8, 0.1), Diagonal(flow, -0.5, 0.3)
    guided = guidance.cfg(c, u, 3.0)
    np.testing.assert_array_equal(guidance.interval(guided, c, 0.0, jnp.inf)(X, 1.0), guided(X, 1.0))
    times = grid.uniform(10)
    low, high = guidance.interval_of_steps(flow, times, 0.1, 0.5)
    inside = [np.allclose(guidance.interval(guided, c, low, high)(X, t), guided(X, t), atol=1e-6) for t in times]
    assert inside == [1 <= i < 5 for i in range(10)]


# ---------------------------------------------------------------- zeroed first steps


def test_zero_star_stands_still_above_its_level():
    """For a flow x_t itself is the prediction there, and Euler's step moves nothing."""
    flow = jdiff.Flow()
    c, u = Diagonal(flow, 0.8, 0.1), Diagonal(flow, -0.5, 0.3)
    denoise = guidance.zero_star(c, u, 3.0, zero_above=24.0)
    for t, still in ((1.0, True), (0.97, True), (0.95, False)):
        x0, eps, _ = denoise.predict(X, t)
        assert bool((np.abs(x0 - X).max() < 1e-6) & (np.abs(eps - X).max() < 1e-6)) is still
    rows = denoise.predict(X, jnp.array([1.0, 0.97, 0.95, 0.5, 0.1]))
    one = [denoise.predict(X[i : i + 1], t) for i, t in enumerate((1.0, 0.97, 0.95, 0.5, 0.1))]
    np.testing.assert_allclose(rows.x0, np.concatenate([p.x0 for p in one]), rtol=1e-5, atol=1e-6)


# ---------------------------------------------------------------- classifiers


def test_a_classifier_of_clean_data_is_exact_where_it_can_be():
    """Gaussian data and log p(y | x_0) = b x_0: the data are again Gaussian, of mean m + C b."""
    with jax.enable_x64(True):
        b, m = jnp.array([0.7, -1.2]), jnp.array([0.3, -0.4])
        x = np.asarray(X, float)
        for covariance, settings in (
            (jnp.array([[0.5, 0.2], [0.2, 0.3]]), {}),
            (0.36 * jnp.eye(2), {}),
            (0.36 * jnp.eye(2), dict(std=0.6)),
        ):
            whole, tilted = (
                jdiff.oracle.Gaussian(mean, covariance).denoise(SCHEDULE) for mean in (m, m + covariance @ b)
            )
            guided = guidance.classifier_x0(whole, lambda x0: x0 @ b, 1.0, **settings)
            chex.assert_trees_all_close(guided.predict(x, 0.6), tilted.predict(x, 0.6), rtol=1e-9, atol=1e-9)


# ---------------------------------------------------------------- one program, vmap, gradients


@noun
class Slope:
    """log p(y | x_t) of a linear classifier."""

    b: jax.Array = per_sample(default=1.0)

    def __call__(self, x, t=0.0):
        return self.b * x.sum(1)


@noun
class Line:
    """A weight that is a function of t."""

    a: float

    def __call__(self, t):
        return 1 + self.a * t


def all_methods(v, schedule=SCHEDULE):
    """Each method, with every number of it a function of v, from 0.2 to 0.8."""
    c, u, d = Diagonal(schedule, 0.8, v), Bent(schedule), Diagonal(schedule, -v, 0.3)
    return {
        "cfg": guidance.cfg(c, u, 1 + v),
        "cfg of t": guidance.cfg(c, u, Line(v)),
        "autoguidance": guidance.autoguidance(c, u, 1 + v),
        "interval": guidance.interval(guidance.cfg(c, u, 1 + v), c, 0.5 * v, 2 * v),
        "rescale": guidance.rescale(guidance.cfg(c, u, 1 + v), c, v),
        "threshold": guidance.threshold(guidance.cfg(c, u, 1 + v), schedule, v, 0.5 + 0.5 * v),
        "apg": guidance.apg(c, u, 1 + v, parallel=v, momentum=-v, limit=v),
        "cfg_pp": guidance.cfg_pp(c, u, v),
        "tcfg": guidance.tcfg(c, u, 1 + v),
        "zero_star": guidance.zero_star(c, u, 1 + v, zero_above=5 * v),
        "classifier": guidance.classifier(c, Slope(v), v),
        "classifier_x0": guidance.classifier_x0(c, Slope(v), v),
        "classifier_x0 of std": guidance.classifier_x0(c, Slope(v), v, std=v),
        "compose": guidance.compose(u, [(c, v), (d, -v)]),
        "cached": guidance.cfg(c, guidance.cached(u, jnp.round(1 + 2 * v) if isinstance(v, jax.Array) else 2), 1 + v),
    }


def sample_all(v):
    return {name: jdiff.sample(solvers.DDIM(), d, SCHEDULE, X, TIMES[2:5]) for name, d in all_methods(v).items()}


@pytest.mark.slow
def test_one_program_for_twenty_settings_of_every_number():
    many = jax.jit(chex.assert_max_traces(sample_all, n=1))
    settings = np.linspace(0.2, 0.8, 20, dtype=np.float32)
    results = [many(v) for v in settings]
    chex.assert_tree_all_finite(results)
    swept = jax.jit(jax.vmap(sample_all))(settings[::9])
    for i, j in enumerate(range(0, 20, 9)):
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i], swept), results[j], rtol=1e-4, atol=1e-5)
    gradient = jax.jit(jax.jacrev(lambda v: {k: jnp.sum(a) for k, a in sample_all(v).items()}))(settings[7])
    chex.assert_tree_all_finite(gradient)
    assert all(np.abs(g) > 1e-4 for g in gradient.values()), gradient


def test_at_pure_noise_all_is_finite():
    """Where alpha = 0 too, with the derivatives by x and by every number."""

    @jax.jit
    def end(v):
        def total(v, x):
            made = {name: denoise.predict(x, 1.0)[:2] for name, denoise in all_methods(v, jdiff.Flow()).items()}
            return jax.tree.map(jnp.sum, made), made

        return jax.jacrev(total, argnums=(0, 1), has_aux=True)(v, jnp.asarray(X))

    chex.assert_tree_all_finite(end(0.4))


def test_denoisers_made_outside_of_jit_are_its_arguments():
    """The nouns themselves, their numbers concrete: 20 settings, one trace of `sample`."""
    made = jax.jit(chex.assert_max_traces(lambda d: jdiff.sample(solvers.DDIM(), d, SCHEDULE, X, TIMES[2:4]), n=15))
    for v in np.linspace(0.2, 0.8, 20):
        for denoise in all_methods(float(v)).values():
            made(denoise)


def test_weights_of_each_sample():
    """(B,) in every method: each row is that of its own number."""
    w = np.array([0.0, 0.3, 0.5, 0.9, 1.0], np.float32)
    make = {
        "cfg": lambda w: guidance.cfg(C, U, w),
        "apg": lambda w: guidance.apg(C, U, w),
        "cfg_pp": lambda w: guidance.cfg_pp(C, U, w),
        "tcfg": lambda w: guidance.tcfg(C, U, w),
        "zero_star": lambda w: guidance.zero_star(C, U, w),
        "classifier": lambda w: guidance.classifier(U, Slope(1.0), w),
        "classifier_x0": lambda w: guidance.classifier_x0(U, Slope(1.0), w),
        "compose": lambda w: guidance.compose(U, [(C, w)]),
    }
    for name, method in make.items():
        rows = np.concatenate([method(float(v))(X[i : i + 1], 0.5) for i, v in enumerate(w)])
        np.testing.assert_allclose(method(w)(X, 0.5), rows, rtol=1e-5, atol=1e-5, err_msg=name)


def test_momentum_under_self_conditioning():
    """The estimate that each step is shown is the guided one, and the average rides beside it."""

    def network(params, x, label, cond):
        return jnp.tanh(params * x[:, :2] + 0.5 * x[:, 2:] + cond[:, None])

    def shown(cond):
        return jdiff.denoiser(network, 0.7, SCHEDULE, jdiff.targets.V(), jnp.full(5, cond), self_conditioning=True)

    c, u = shown(0.4), shown(-0.1)
    got = run(guidance.apg(c, u, 3.0, momentum=-0.6, parallel=1.0), solvers.Remember(solvers.DDIM()), path=True)[1]

    @jax.jit
    def loop():
        x, previous, average, path = X, jnp.zeros_like(X), jnp.zeros_like(X), []
        for t, s in zip(TIMES[:-1], TIMES[1:], strict=True):
            a, b = (d.predict(x, t, previous) for d in (c, u))
            average = a.x0 - b.x0 - 0.6 * average
            previous = a.x0 + 2.0 * average
            x = q_sample(SCHEDULE, previous, s, jdiff.eps_from(SCHEDULE, previous, x, t))
            path.append(x)
        return jnp.stack(path)

    np.testing.assert_allclose(got, loop(), rtol=1e-4, atol=1e-5)


def test_plain_functions_meet_the_schedule_in_sample():
    """Around functions alone every method says so when it is called, and works in `sample`."""
    f, g = (lambda x, t: 0.5 * x), (lambda x, t: 0.3 * x + 0.1)
    made = [
        guidance.interval(f, g, 0.1, 2.0), guidance.zero_star(f, g, 2.0, zero_above=3.0), guidance.cached(f, 2),
        guidance.classifier(f, lambda x, t: x.sum(1), 2.0), guidance.classifier_x0(f, lambda x: x.sum(1), 2.0),
        guidance.rescale(guidance.apg(f, g, 2.0, momentum=-0.5), f, 0.7), guidance.compose(f, [(g, 2.0)]),
    ]  # fmt: skip
    for denoise in made:
        with pytest.raises(ValueError, match="a plain function does not say its schedule"):
            denoise(X, 0.5)
    for out in jax.jit(lambda: [jdiff.sample(solvers.DDIM(), d, SCHEDULE, X, TIMES[:3]) for d in made])():
        assert np.isfinite(out).all()


def test_momentum_upwards():
    """`invert` carries it too."""

    @jax.jit
    def loop():
        x, average, up = X, jnp.zeros_like(X), TIMES[::-1]
        for t, s in zip(up[:-1], up[1:], strict=True):
            average = C(x, t) - U(x, t) - 0.3 * average
            x0 = C(x, t) + 0.5 * average
            x = q_sample(SCHEDULE, x0, s, jdiff.eps_from(SCHEDULE, x0, x, t))
        return x

    denoise = guidance.apg(C, U, 1.5, momentum=-0.3, parallel=1.0)
    got = jax.jit(lambda: jdiff.invert(solvers.DDIM(), denoise, SCHEDULE, X, TIMES))()
    chex.assert_trees_all_close(got, loop(), rtol=1e-4, atol=1e-4)
