"""Guidance: the extrapolation, its conventions and its shapes."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Bent, Diagonal

import jdiff
from jdiff.guidance import cfg, interval, threshold

SCHEDULE = jdiff.VP()


def pair():
    return Diagonal(SCHEDULE, 0.6, 2.0), Bent(SCHEDULE)


X, T = jax.random.normal(jax.random.key(0), (3, 2)), jnp.array(0.4)


@pytest.mark.parametrize("w", [0, 1, 2.5])
def test_cfg_in_every_prediction(w):
    """u + w (c - u) in x_0 and in eps; w = 1 is the conditional, w = 0 the unconditional."""
    c, u = pair()
    guided = cfg(c, u, w)
    np.testing.assert_allclose(guided(X, T), (1 - w) * u(X, T) + w * c(X, T), rtol=1e-5, atol=1e-6)
    x0, eps, _ = guided.predict(X, T)
    np.testing.assert_allclose(x0, guided(X, T), rtol=1e-6)
    np.testing.assert_allclose(eps, jdiff.eps_from(SCHEDULE, x0, X, T), rtol=1e-4, atol=1e-5)


def test_weights_per_sample_and_of_time():
    c, u = pair()
    w = jnp.array([0.0, 1.0, 3.0])
    rows = [cfg(c, u, float(v))(X[i : i + 1], T)[0] for i, v in enumerate(w)]
    np.testing.assert_allclose(cfg(c, u, w)(X, T), jnp.stack(rows), rtol=1e-5, atol=1e-6)
    np.testing.assert_array_equal(cfg(c, u, w.astype(jnp.bfloat16))(X, T), cfg(c, u, w)(X, T))  # bfloat16 has these w
    rising = jax.tree_util.Partial(lambda a, t: 1 + a * t, 5.0)
    np.testing.assert_allclose(cfg(c, u, rising)(X, T), cfg(c, u, 3.0)(X, T), rtol=1e-5)
    with pytest.raises(ValueError, match="shape"):
        cfg(c, u, jnp.ones(2))(X, T)


def test_interval():
    """Guided inside (low, high] of sigma/alpha, conditional outside; also with a time per sample."""
    c, u = pair()
    guided, ratio = cfg(c, u, 3.0), float(SCHEDULE.sigma(T) / SCHEDULE.alpha(T))
    np.testing.assert_allclose(interval(guided, c, 0.5 * ratio, 2 * ratio)(X, T), guided(X, T), rtol=1e-6, atol=1e-6)
    np.testing.assert_allclose(interval(guided, c, 2 * ratio, 3 * ratio)(X, T), c(X, T), rtol=1e-6)
    times = jnp.array([0.1, 0.4, 0.9])
    mixed = interval(guided, c, 0.5 * ratio, 2 * ratio)(X, times)
    np.testing.assert_allclose(mixed[0], c(X, times)[0], rtol=1e-5)
    np.testing.assert_allclose(mixed[1], guided(X, times)[1], rtol=1e-5)
    np.testing.assert_allclose(mixed[2], c(X, times)[2], rtol=1e-5)


def test_interval_saves_evaluations():
    """Outside the interval the unconditional network is not called: counted at run time, inside jit."""
    count = []

    def network(params, x, label, cond):
        jax.debug.callback(lambda: count.append(1))
        return x

    c = jdiff.denoiser(network, (), SCHEDULE, jdiff.targets.V())
    guided = interval(cfg(c, c, 2.0), c, 0.2, 1.0)
    times = jdiff.grid.log_snr(SCHEDULE, 20)
    inside = int(((jnp.exp(-0.5 * jdiff.log_snr(SCHEDULE, times)) > 0.2) &
                  (jnp.exp(-0.5 * jdiff.log_snr(SCHEDULE, times)) <= 1.0)).sum())  # fmt: skip
    jax.block_until_ready(jax.jit(jdiff.sample)(jdiff.solvers.Euler(), guided, SCHEDULE, X, times))
    jax.effects_barrier()
    assert len(count) == 20 + inside


def test_interval_keeps_learned_variances():
    """`extra` is that of the denoiser that holds at t, and DDPM("learned") samples with it."""

    def network(params, x, label, cond):
        return jnp.concatenate([x, jnp.full_like(x, params)], -1)

    c, u = (jdiff.denoiser(network, v, SCHEDULE, jdiff.targets.V(), learned_variance=True) for v in (0.5, -0.5))
    for high, expected in ((1e6, u), (1e-6, c)):
        either = interval(cfg(u, c, 2.0), c, 0.0, high)
        chex.assert_trees_all_equal(either.predict(X, T).extra, expected.predict(X, T).extra, strict=True)
    times = jnp.array([0.1, 0.4, 0.9])
    ratio = float(SCHEDULE.sigma(T) / SCHEDULE.alpha(T))
    mixed = interval(cfg(u, c, 2.0), c, 0.5 * ratio, 2 * ratio).predict(X, times).extra
    chex.assert_trees_all_close(mixed, jnp.array([[0.5] * 2, [-0.5] * 2, [0.5] * 2]), rtol=1e-6)
    learned = jdiff.solvers.DDPM("learned")
    grid = jdiff.grid.log_snr(SCHEDULE, 4)
    always, plain = (
        jdiff.sample(learned, denoise, SCHEDULE, X, grid, jax.random.key(0))
        for denoise in (interval(c, c, 0.2, 1.0), c)
    )
    chex.assert_trees_all_close(always, plain, rtol=1e-6)
    without = jdiff.denoiser(lambda p, x, *_: x, (), SCHEDULE, jdiff.targets.V())
    assert interval(without, c, 0.0, 1.0).predict(X, T).extra is None
    with pytest.raises(ValueError, match="learned_variance=True"):
        jdiff.sample(learned, interval(without, c, 0.0, 1.0), SCHEDULE, X, grid, jax.random.key(0))


@pytest.mark.parametrize("quantile", [None, 0.8])
@pytest.mark.parametrize("schedule", [jdiff.VP(), jdiff.EDM(), jdiff.Flow()], ids=lambda s: type(s).__name__)
def test_threshold(schedule, quantile):
    """x_0 by its definition, the noise that goes with it, per sample; what is in range stays."""
    denoise = Bent(schedule)
    x, t = 3 * jax.random.normal(jax.random.key(1), (4, 2)), jnp.linspace(0.1, 0.9, 4) * schedule.t_max
    free, limit = np.asarray(denoise(x, t)), 0.3
    size = limit if quantile is None else np.maximum(np.quantile(np.abs(free), quantile, axis=1, keepdims=True), limit)
    expected = np.clip(free, -size, size) * (limit / size)
    assert (np.abs(free) > limit).any()
    x0, eps, _ = jax.jit(lambda x, t: threshold(denoise, schedule, limit, quantile).predict(x, t))(x, t)
    np.testing.assert_allclose(x0, expected, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(eps, jdiff.eps_from(schedule, x0, x, t), rtol=1e-4, atol=2e-5)
    loose = threshold(denoise, schedule, 100.0, quantile).predict(x, t)
    np.testing.assert_allclose(loose.x0, free, rtol=1e-6)
    np.testing.assert_allclose(loose.eps, denoise.predict(x, t).eps, rtol=1e-6, atol=1e-6)


def test_threshold_at_the_ends():
    """Finite where sigma = 0 and where alpha = 0, with its gradient; the data at sigma = 0, within range."""
    denoise = jdiff.denoiser(lambda params, x, label, cond: 2 * x, (), jdiff.Flow(), jdiff.targets.Velocity())
    for t in (0.0, 1.0):
        both = lambda x, t=t: threshold(denoise, jdiff.Flow(), 0.5).predict(x, t)[:2]  # noqa: E731
        gradient = jax.grad(lambda x: sum(jnp.sum(a) for a in both(x)))(X)  # noqa: B023
        assert all(np.isfinite(a).all() for a in (*both(X), gradient))
    x = jnp.array([[0.2, -0.7]])
    np.testing.assert_allclose(threshold(denoise, jdiff.Flow(), 0.5)(x, 0.0), [[0.2, -0.5]])


def test_errors():
    c, _ = pair()
    with pytest.raises(ValueError, match="a plain function does not say its schedule"):
        cfg(lambda x, t: x, lambda x, t: x, 2.0)(jnp.ones((2, 2)), 0.5)
    with pytest.raises(ValueError, match="low is one number"):
        interval(c, c, jnp.zeros(2), 1.0)
    with pytest.raises(ValueError, match="low < high"):
        interval(c, c, 2.0, 1.0)
    with pytest.raises(ValueError, match="limit must be positive"):
        threshold(c, SCHEDULE, 0.0)
    with pytest.raises(ValueError, match="above 0 and up to 1"):
        threshold(c, SCHEDULE, quantile=1.5)
    with pytest.raises(ValueError, match="limit is one number"):
        threshold(c, SCHEDULE, jnp.ones(3))


# ---------------------------------------------------------------- compositions

AROUND = {
    "cfg": lambda a, b: cfg(a, b, 2.0),
    "interval": lambda a, b: interval(a, b, 0.1, 5.0),
    "threshold": lambda a, b: threshold(a, SCHEDULE, 0.8),
}
BY_HAND = {
    "cfg": lambda a, b: b + 2 * (a - b),
    "interval": lambda a, b: a,  # sigma/alpha at T is inside
    "threshold": lambda a, b: jnp.clip(a, -0.8, 0.8),
}


@pytest.mark.parametrize("kind", ["denoisers", "functions", "one of each"])
def test_every_guidance_goes_around_every_other(kind):
    """Two deep, in both places, around denoisers and plain functions: the composition of the formulas."""
    c, u = pair()
    plain_c, plain_u = (lambda x, t: c(x, t)), (lambda x, t: u(x, t))
    a, b = {"denoisers": (c, u), "functions": (plain_c, plain_u), "one of each": (plain_c, u)}[kind]

    @jax.jit
    def both(x, t):
        made, expected = {}, {}
        for outer in AROUND:
            for inner in AROUND:
                for swapped in (False, True):
                    nested, formula = AROUND[inner](a, b), BY_HAND[inner](c(x, t), u(x, t))
                    pairs = ((b, nested), (u(x, t), formula)) if swapped else ((nested, b), (formula, u(x, t)))
                    name = f"{outer} of {inner}, {swapped}"
                    made[name] = jdiff.as_denoise(AROUND[outer](*pairs[0]), SCHEDULE).predict(x, t)
                    expected[name] = BY_HAND[outer](*pairs[1])
        return made, expected

    made, expected = both(X, T)
    assert np.abs(c(X, T)).max() > 0.8  # a threshold has something to do
    chex.assert_trees_all_close({k: v.x0 for k, v in made.items()}, expected, rtol=1e-5, atol=1e-5)
    noise = {k: jdiff.eps_from(SCHEDULE, v, X, T) for k, v in expected.items()}
    chex.assert_trees_all_close({k: v.eps for k, v in made.items()}, noise, rtol=1e-4, atol=1e-4)


def test_a_plain_function_inside_guidance_meets_the_schedule_of_the_sampler():
    """`sample` tells it, at any depth; the samples are those of the denoisers themselves."""
    c, u = pair()
    times = jdiff.grid.log_snr(SCHEDULE, 6)
    run = jax.jit(lambda denoise: jdiff.sample(jdiff.solvers.DDIM(), denoise, SCHEDULE, X, times))
    plain = cfg(threshold(lambda x, t: c(x, t), SCHEDULE), lambda x, t: u(x, t), 2.0)
    twice = cfg(cfg(lambda x, t: c(x, t), lambda x, t: u(x, t), 1.5), lambda x, t: u(x, t), 1.0)
    np.testing.assert_allclose(run(plain), run(cfg(threshold(c, SCHEDULE), u, 2.0)), rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(run(twice), run(cfg(c, u, 1.5)), rtol=1e-4, atol=1e-5)
