"""Self-conditioned sampling: the loop written out, one evaluation each, all solvers."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import jitted_sample

import jdiff
from jdiff import solvers
from jdiff.core.keys import normal
from jdiff.denoisers.network import remember
from jdiff.process.forward import q_sample

KEY, SCHEDULE, TARGET = jax.random.key(2), jdiff.VP(), jdiff.targets.V()
TIMES = jdiff.grid.uniform(6)
PARAMS = {"w": jnp.array([[0.5, -0.2], [0.1, 0.8]]), "p": jnp.array([[0.2, 0.1], [-0.3, 0.4]])}


def apply(params, x, label, cond):
    h = x[:, :2] @ params["w"] + jnp.tanh(label)[:, None] + x[:, 2:] @ params["p"]
    return jnp.tanh(h if cond is None else h + cond[:, None])


def denoiser(params=PARAMS, cond=None, network=apply):
    return jdiff.denoiser(network, params, SCHEDULE, TARGET, cond, self_conditioning=True)


def noise(n=5):
    return normal(KEY, (n, 2))


def loop(predict):
    """DDIM written out, each prediction given the one before; the states."""
    x, previous, path = noise(), jnp.zeros((5, 2)), []
    for t, s in zip(TIMES[:-1], TIMES[1:], strict=True):
        x0, eps, _ = predict(x, t, previous)
        x, previous = q_sample(SCHEDULE, x0, s, eps), x0
        path.append(x)
    return jnp.stack(path), previous


def test_each_step_sees_the_estimate_of_the_one_before():
    want, previous = loop(denoiser().predict)
    x0, path = jitted_sample()(solvers.Remember(solvers.DDIM()), denoiser(), SCHEDULE, noise(), TIMES, path=True)
    np.testing.assert_allclose(path, want, rtol=1e-5, atol=1e-5)
    blind = jitted_sample()(solvers.DDIM(), denoiser(), SCHEDULE, noise(), TIMES, path=True)[1]
    assert np.abs(path - blind).max() > 0.05  # it matters
    last = denoiser().predict(want[-1], TIMES[-1], previous).x0
    np.testing.assert_allclose(x0, last, rtol=1e-5, atol=1e-5)


def test_under_guidance_both_networks_see_the_guided_estimate():
    c, u = jnp.full(5, 0.7), jnp.full(5, -0.2)

    def predict(x, t, previous):
        a, b = (denoiser(cond=cond).predict(x, t, previous) for cond in (c, u))
        return jax.tree.map(lambda a, b: b + 2.0 * (a - b), a, b)

    guided = jdiff.guidance.cfg(denoiser(cond=c), denoiser(cond=u), 2.0)
    _, path = jitted_sample()(solvers.Remember(solvers.DDIM()), guided, SCHEDULE, noise(), TIMES, path=True)
    np.testing.assert_allclose(path, loop(predict)[0], rtol=1e-5, atol=1e-5)
    inside = jdiff.guidance.interval(guided, denoiser(cond=c), 0.5, 2.0)
    assert np.isfinite(jitted_sample()(solvers.Remember(solvers.Heun()), inside, SCHEDULE, noise(), TIMES)).all()


FEW = {
    "ddim": solvers.DDIM(), "ddpm": solvers.DDPM(), "heun": solvers.Heun(), "unipc": solvers.UniPC(3),
    "dpmpp3m": solvers.DPMpp3M(start="single_step"), "churn": solvers.EDMStochastic(), "dpmppsde": solvers.DPMppSDE(),
}  # fmt: skip
MORE = {
    "rk4": solvers.RK4(), "dpmpp2m": solvers.DPMpp2M(), "deis": solvers.DEIS(), "pndm": solvers.PNDM(),
    "lms": solvers.LMS(), "sa": solvers.SASolver(), "em": solvers.EulerMaruyama(), "restart": solvers.Restart(),
    "dpm2a": solvers.DPM2Ancestral(), "corrector": solvers.PredictorCorrector(solvers.EulerMaruyama()),
}  # fmt: skip
ALL = FEW | MORE


@pytest.mark.parametrize("name", [*FEW, *(pytest.param(name, marks=pytest.mark.slow) for name in MORE)])
def test_a_network_that_does_not_look_is_sampled_as_ever(name):
    """With weights 0 on the estimate, `Remember` changes nothing, and no solver evaluates once more."""
    calls, results = [], []

    def counted(params, x, label, cond):
        calls.append(x.shape)
        return apply(params | {"p": 0 * params["p"]}, x, label, cond)

    for solver in (ALL[name], solvers.Remember(ALL[name])):
        calls.clear()
        results.append((jdiff.sample(solver, denoiser(network=counted), SCHEDULE, noise(), TIMES, KEY), len(calls)))
        assert (solver.order, solver.stochastic) == (ALL[name].order, ALL[name].stochastic)
    np.testing.assert_allclose(results[0][0], results[1][0], rtol=1e-5, atol=1e-6)
    assert results[0][1] == results[1][1]


def test_within_a_step_later_evaluations_see_the_first():
    """Heun written out: the second evaluation is shown the first's estimate, and so is the next step's first."""
    denoise, x, previous = denoiser(), noise(), jnp.zeros((5, 2))
    plan = solvers.Heun().plan(SCHEDULE, TIMES, len(TIMES))
    for i, (t, s) in enumerate(zip(TIMES[:-1], TIMES[1:], strict=True)):
        first = denoise.predict(x, t, previous).x0
        now = solvers.Now(i, t, s, jax.tree.map(lambda a, i=i: a[i], plan))

        def fixed(y, time, x=x, previous=previous, first=first):
            return denoise.predict(y, time, previous if y is x else first).x0

        x, _, prediction = solvers.Heun().step(jdiff.as_denoise(fixed, SCHEDULE), SCHEDULE, x, now, (), None)
        np.testing.assert_allclose(prediction.x0, first, rtol=1e-5, atol=1e-6)
        previous = first
    path = jitted_sample()(solvers.Remember(solvers.Heun()), denoise, SCHEDULE, noise(), TIMES, path=True)[1]
    np.testing.assert_allclose(path[-1], x, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_transformations():
    """One program for other parameters and step counts, vmap over settings, gradients through all steps."""
    solver, sample = solvers.Remember(solvers.DDIM(0.0)), jax.jit(lambda *a, n: jdiff.sample(*a, n=n))
    for scale in (1.0, 0.5):
        sample(solver, denoiser(jax.tree.map(lambda a, s=scale: s * a, PARAMS)), SCHEDULE, noise(), TIMES, n=4)
    assert sample._cache_size() == 1
    one = jdiff.sample(solver, denoiser(), SCHEDULE, noise(), TIMES[:4])
    np.testing.assert_allclose(sample(solver, denoiser(), SCHEDULE, noise(), TIMES, n=4), one, rtol=1e-5, atol=1e-6)

    def loss(params):
        return (jdiff.sample(solver, denoiser(params), SCHEDULE, noise(), TIMES) ** 2).sum()

    grads = jax.jit(jax.grad(loss))(PARAMS)
    assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)) and np.abs(grads["p"]).max() > 1e-3
    both = jax.tree.map(lambda a: jnp.stack([a, 0.5 * a]), PARAMS)
    many = jax.vmap(lambda p: jdiff.sample(solver, denoiser(p), SCHEDULE, noise(), TIMES))(both)
    np.testing.assert_allclose(
        many[0], jdiff.sample(solver, denoiser(), SCHEDULE, noise(), TIMES), rtol=1e-5, atol=1e-5
    )


def test_a_denoiser_shows_what_it_is_told():
    x, before = noise(), 0.3 * noise()
    plain = denoiser()
    np.testing.assert_array_equal(plain(x, 0.5), plain.predict(x, 0.5, jnp.zeros_like(x)).x0)
    np.testing.assert_array_equal(remember(plain, before)(x, 0.5), plain.predict(x, 0.5, before).x0)
    assert np.abs(plain(x, 0.5) - remember(plain, before)(x, 0.5)).max() > 1e-3
    assert plain.previous is None


def test_errors():
    x = noise()
    other = jdiff.denoiser(lambda p, x, label, cond: x @ p["w"], PARAMS, SCHEDULE, TARGET)
    with pytest.raises(ValueError, match="no denoiser made with self_conditioning=True"):
        jdiff.sample(solvers.Remember(solvers.DDIM()), other, SCHEDULE, x, TIMES)
    with pytest.raises(ValueError, match="shown no earlier estimate"):
        other.predict(x, 0.5, x)
    with pytest.raises(ValueError, match="the earlier estimate has shape"):
        denoiser().predict(x, 0.5, x[:, :1])


def test_around_a_solver_with_a_loop_of_its_own():
    """AnnealedLangevin written out: a step begins with the last step's first estimate, the rest of it sees its own."""
    solver, denoise, x, previous = solvers.AnnealedLangevin(steps=3), denoiser(), noise(), jnp.zeros((5, 2))
    plan = solver.plan(SCHEDULE, TIMES, len(TIMES))
    keys = jax.random.split(KEY, 5)
    for i, s in enumerate(TIMES[1:]):
        sigma, step_keys = SCHEDULE.sigma(s), jax.vmap(lambda k, i=i: jax.random.fold_in(k, i))(keys)
        x, shown = plan[i] * x, previous
        for j in range(3):
            prediction = denoise.predict(x, s, shown)
            if j == 0:
                previous = shown = prediction.x0
            z = jax.vmap(lambda k, j=j: jax.random.normal(jax.random.fold_in(k, j), (2,)))(step_keys)
            x = x - 0.1 * sigma * prediction.eps + jnp.sqrt(0.2) * sigma * z
    path = jitted_sample()(solvers.Remember(solver), denoise, SCHEDULE, noise(), TIMES, keys, path=True)[1]
    np.testing.assert_allclose(path[-1], x, rtol=1e-4, atol=1e-4)
