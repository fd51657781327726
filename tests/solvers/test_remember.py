"""Self-conditioned sampling: the loop written out, one evaluation each, all solvers."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jitted_sample

import jdiff
from jdiff import solvers
from jdiff.core.keys import fold, normal
from jdiff.denoisers.network import remember
from jdiff.process.forward import q_sample

KEY, SCHEDULE, TARGET = jax.random.key(2), jdiff.VP(), jdiff.targets.V()
TIMES = jdiff.grid.uniform(6)
PARAMS = {"w": np.float32([[0.5, -0.2], [0.1, 0.8]]), "p": np.float32([[0.2, 0.1], [-0.3, 0.4]])}
X = np.random.default_rng(2).normal(size=(5, 2)).astype(np.float32)


def apply(params, x, label, cond):
    h = x[:, :2] @ params["w"] + jnp.tanh(label)[:, None] + x[:, 2:] @ params["p"]
    return jnp.tanh(h if cond is None else h + cond[:, None])


def denoiser(params=PARAMS, cond=None, network=apply):
    return jdiff.denoiser(network, params, SCHEDULE, TARGET, cond, self_conditioning=True)


def loop(predict):
    """DDIM written out, each prediction given the one before: (states, the last estimate before the end)."""

    def step(carry, ends):
        x, previous = carry
        x0, eps, _ = predict(x, ends[0], previous)
        x = q_sample(SCHEDULE, x0, ends[1], eps)
        return (x, x0), x

    (_, previous), path = jax.lax.scan(step, (X, jnp.zeros_like(X)), (TIMES[:-1], TIMES[1:]))
    return path, previous


def test_each_step_sees_the_estimate_of_the_one_before():
    @jax.jit
    def by_hand():
        path, previous = loop(denoiser().predict)
        return path, denoiser().predict(path[-1], TIMES[-1], previous).x0

    path, end = by_hand()
    got = jitted_sample()(solvers.Remember(solvers.DDIM()), denoiser(), SCHEDULE, X, TIMES, path=True)
    chex.assert_trees_all_close(got, (end, path), rtol=1e-5, atol=1e-5)
    without = jitted_sample()(solvers.DDIM(), denoiser(), SCHEDULE, X, TIMES, path=True)[1]
    assert np.abs(path - without).max() > 0.05  # it matters


def test_under_guidance_both_networks_see_the_guided_estimate():
    labels, no_labels = np.full(5, 0.7, np.float32), np.full(5, -0.2, np.float32)

    def predict(x, t, previous):
        a, b = (denoiser(cond=cond).predict(x, t, previous) for cond in (labels, no_labels))
        return jax.tree.map(lambda a, b: b + 2.0 * (a - b), a, b)

    guided = jdiff.guidance.cfg(denoiser(cond=labels), denoiser(cond=no_labels), 2.0)
    _, path = jitted_sample()(solvers.Remember(solvers.DDIM()), guided, SCHEDULE, X, TIMES, path=True)
    np.testing.assert_allclose(path, jax.jit(lambda: loop(predict)[0])(), rtol=1e-5, atol=1e-5)
    inside = jdiff.guidance.interval(guided, denoiser(cond=labels), 0.5, 2.0)
    assert np.isfinite(jitted_sample()(solvers.Remember(solvers.Heun()), inside, SCHEDULE, X, TIMES)).all()


ALL = {
    "ddim": solvers.DDIM(), "ddpm": solvers.DDPM(), "heun": solvers.Heun(), "unipc": solvers.UniPC(3),
    "dpmpp3m": solvers.DPMpp3M(start="single_step"), "churn": solvers.EDMStochastic(), "dpmppsde": solvers.DPMppSDE(),
    "rk4": solvers.RK4(), "dpmpp2m": solvers.DPMpp2M(), "deis": solvers.DEIS(), "pndm": solvers.PNDM(),
    "lms": solvers.LMS(), "sa": solvers.SASolver(), "em": solvers.EulerMaruyama(), "dpm2a": solvers.DPM2Ancestral(),
    "restart": solvers.Restart(rounds=1, steps=2), "corrector": solvers.PredictorCorrector(solvers.EulerMaruyama()),
}  # fmt: skip


@pytest.mark.parametrize("name", ALL)
def test_a_network_that_does_not_look_is_sampled_as_ever(name):
    """With weights 0 on the estimate, `Remember` changes nothing, and no solver evaluates once more.

    Operation by operation: nothing is compiled for one solver alone, and every evaluation is counted.
    """
    calls, inattentive = [], PARAMS | {"p": np.zeros((2, 2), np.float32)}

    def counted(params, x, label, cond):
        calls.append(x.shape)
        return apply(params, x, label, cond)

    def run(solver):
        calls.clear()
        x0 = jdiff.sample(solver, denoiser(inattentive, network=counted), SCHEDULE, X, TIMES[:5], KEY)
        return x0, len(calls)

    with jax.disable_jit():
        (plain, evaluations), (remembered, as_many) = run(ALL[name]), run(solvers.Remember(ALL[name]))
    assert evaluations == as_many
    chex.assert_trees_all_close(remembered, plain, rtol=1e-5, atol=1e-6)
    remember_all = solvers.Remember(ALL[name])
    assert (remember_all.order, remember_all.stochastic) == (ALL[name].order, ALL[name].stochastic)


def test_within_a_step_later_evaluations_see_the_first():
    """Heun written out: the second evaluation is shown the first's estimate, and so is the next step's first."""
    denoise = denoiser()

    @jax.jit
    def by_hand(x):
        previous, plan = jnp.zeros_like(x), solvers.Heun().plan(SCHEDULE, TIMES, len(TIMES))

        def step(carry, now):
            x, previous = carry
            first = denoise.predict(x, now.t, previous).x0

            def shown(y, t):
                return denoise.predict(y, t, previous if y is x else first).x0

            x, _, prediction = solvers.Heun().step(jdiff.as_denoise(shown, SCHEDULE), SCHEDULE, x, now, (), None)
            return (x, first), (x, prediction.x0, first)

        steps = solvers.Now(jnp.arange(len(TIMES) - 1), TIMES[:-1], TIMES[1:], plan)
        return jax.lax.scan(step, (x, previous), steps)[1]

    expected, returned, first = by_hand(X)
    chex.assert_trees_all_close(returned, first, rtol=1e-5, atol=1e-6)
    path = jitted_sample()(solvers.Remember(solvers.Heun()), denoise, SCHEDULE, X, TIMES, path=True)[1]
    chex.assert_trees_all_close(path, expected, rtol=1e-4, atol=1e-5)


def test_transformations():
    """One program for other parameters and step counts, vmap over settings, gradients through all steps."""

    def sample(params, n=None, times=TIMES):
        return jdiff.sample(solvers.Remember(solvers.DDIM(0.0)), denoiser(params), SCHEDULE, X, times, n=n)

    @jax.jit
    def others(params):
        def loss(params):
            x0 = sample(params)
            return (x0**2).sum(), x0

        both = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), params)
        return jax.grad(loss, has_aux=True)(params), jax.vmap(sample)(both)[0], sample(params, times=TIMES[:4])

    (gradients, x0), one_of_two, short = others(PARAMS)
    chex.assert_tree_all_finite(gradients)
    assert np.abs(gradients["p"]).max() > 1e-3
    chex.assert_trees_all_close(one_of_two, x0, rtol=1e-5, atol=1e-5)
    traced = jax.jit(chex.assert_max_traces(sample, n=1))
    traced(jax.tree.map(lambda a: 0.5 * a, PARAMS), 6)
    chex.assert_trees_all_close(traced(PARAMS, 4), short, rtol=1e-5, atol=1e-6)


def test_a_denoiser_shows_what_it_is_told():
    x, before = X, 0.3 * X
    plain = denoiser()
    np.testing.assert_array_equal(plain(x, 0.5), plain.predict(x, 0.5, jnp.zeros_like(x)).x0)
    np.testing.assert_array_equal(remember(plain, before)(x, 0.5), plain.predict(x, 0.5, before).x0)
    assert np.abs(plain(x, 0.5) - remember(plain, before)(x, 0.5)).max() > 1e-3
    assert plain.previous is None


def test_errors():
    x = X
    other = jdiff.denoiser(lambda p, x, label, cond: x @ p["w"], PARAMS, SCHEDULE, TARGET)
    with pytest.raises(ValueError, match="no denoiser made with self_conditioning=True"):
        jdiff.sample(solvers.Remember(solvers.DDIM()), other, SCHEDULE, x, TIMES)
    with pytest.raises(ValueError, match="shown no earlier estimate"):
        other.predict(x, 0.5, x)
    with pytest.raises(ValueError, match="the earlier estimate has shape"):
        denoiser().predict(x, 0.5, x[:, :1])


def test_around_a_solver_with_a_loop_of_its_own():
    """AnnealedLangevin written out: a step begins with the last step's first estimate, the rest of it sees its own."""
    solver, denoise, keys = solvers.AnnealedLangevin(steps=3), denoiser(), jax.random.split(KEY, 5)

    @jax.jit
    def by_hand(x):
        def step(carry, now):
            x, previous = carry
            sigma, step_keys = SCHEDULE.sigma(now.s), fold(keys, now.i)
            x, shown = now.plan * x, previous
            for j in range(3):
                prediction = denoise.predict(x, now.s, shown)
                if j == 0:
                    previous = shown = prediction.x0
                x = x - 0.1 * sigma * prediction.eps + jnp.sqrt(0.2) * sigma * normal(fold(step_keys, j), x.shape)
            return (x, previous), x

        plan = solver.plan(SCHEDULE, TIMES, len(TIMES))
        steps = solvers.Now(jnp.arange(len(TIMES) - 1), TIMES[:-1], TIMES[1:], plan)
        return jax.lax.scan(step, (x, jnp.zeros_like(x)), steps)[1]

    path = jitted_sample()(solvers.Remember(solver), denoise, SCHEDULE, X, TIMES, keys, path=True)[1]
    chex.assert_trees_all_close(path, by_hand(X), rtol=1e-4, atol=1e-4)
