"""Averages of parameters, and the laws of their decay, against closed forms in float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import ema, train

LAWS = {
    "constant": ema.constant(0.9),
    "half_life": ema.half_life(300, 8),
    "warmup": ema.warmup(0.95, inv_gamma=2.0, power=0.75),
    "power": ema.power(0.2),
    "power_gamma": ema.power_gamma(6.94),
}


@pytest.mark.parametrize("law", LAWS)
def test_average_is_the_weighted_sum(law):
    """ema_n = prod keep_i p_0 + sum_i (1 - keep_i) prod_{j > i} keep_j p_i, for a random walk of 60 steps."""
    path = np.float32(np.cumsum(np.random.default_rng(0).normal(size=(61, 3)), axis=0))
    keep = np.asarray(jax.jit(jax.vmap(LAWS[law]))(np.arange(60)), np.float64)
    after = np.append(np.cumprod(keep[::-1])[::-1], 1.0)  # the product of keep_j over j >= i
    want = after[0] * path[0] + ((1 - keep) * after[1:]) @ path[1:].astype(np.float64)

    def body(average, xs):
        i, params = xs
        return ema.update(average, {"p": params}, LAWS[law](i)), None

    got, _ = jax.jit(lambda start, xs: jax.lax.scan(body, start, xs))({"p": path[0]}, (np.arange(60), path[1:]))
    chex.assert_trees_all_close(got, {"p": np.float32(want)}, rtol=1e-5, atol=1e-5, strict=True)


@pytest.mark.parametrize("ramp", [None, 0.05])
def test_half_life_does_not_depend_on_the_batch(ramp):
    """After 4,000 images: 2^-4 of the start without a ramp; with one, the same for any batch as both become small."""
    left = {}
    for batch in (1, 4, 40):
        decay = ema.half_life(1000, batch, ramp)
        steps = np.arange(2000 // batch, 6000 // batch)  # past the ramp, which ends at 1000 / 0.05 = 20,000 images
        left[batch] = np.prod(np.asarray(jax.jit(jax.vmap(decay))(steps), np.float64))
    if ramp is None:
        np.testing.assert_allclose(list(left.values()), 2.0**-4, rtol=1e-3)
    else:  # the integral of d(images) / (0.05 images) from 2,000 to 6,000: 2^(-20 log 3) = 3^(-20 log 2)
        np.testing.assert_allclose(left[1], 3.0 ** (-20 * np.log(2)), rtol=1e-2)
        np.testing.assert_allclose(left[4], left[1], rtol=0.05)


@pytest.mark.parametrize("sigma_rel,gamma", [(0.05, 16.97), (0.10, 6.94), (0.15, 3.56)])
def test_gamma_of_published(sigma_rel, gamma):
    """arXiv:2312.02696, section 3.1; and back, by eq. 123."""
    assert round(ema.gamma_of(sigma_rel), 2) == gamma
    for width in (1e-3, sigma_rel, 12**-0.5, 0.3, 0.3002):
        assert ema.sigma_rel_of(ema.gamma_of(width)) == pytest.approx(width, rel=1e-12)
    assert ema.gamma_of(12**-0.5) == pytest.approx(0, abs=1e-12)  # the plain mean: a uniform profile


@pytest.mark.parametrize("sigma_rel", [0.05, 0.1, 0.25])
def test_power_profile(sigma_rel):
    """What it keeps of step tau is the power profile's weight of [tau - 1, tau]; mean and width as in closed form."""
    n, gamma = 1000, ema.gamma_of(sigma_rel)

    def body(average, i):
        return ema.update(average, jax.nn.one_hot(i, n), ema.power(sigma_rel)(i)), None

    start = np.full(n, 7, np.float32)  # of which nothing stays
    weights, _ = jax.jit(lambda start: jax.lax.scan(body, start, jnp.arange(n)))(start)
    edges = np.arange(n + 1) / n
    np.testing.assert_allclose(weights, np.diff(edges ** (gamma + 1)), rtol=2e-4, atol=1e-9)
    weights, middle = np.asarray(weights, np.float64), (edges[1:] + edges[:-1]) / 2
    mean = weights @ middle
    np.testing.assert_allclose(mean, (gamma + 1) / (gamma + 2), rtol=1e-4)
    np.testing.assert_allclose(np.sqrt(weights @ (middle - mean) ** 2), sigma_rel, rtol=1e-4)


def test_power_after_a_million_steps():
    """The weight of the newest parameters, (gamma + 1) / t, to float32's rounding of numbers near 1."""
    for t in (10**3, 10**5, 10**6):
        new = 1 - float(ema.power(0.1)(t - 1))
        np.testing.assert_allclose(new, -np.expm1((1 + ema.gamma_of(0.1)) * np.log1p(-1 / t)), atol=6e-8)


def test_a_law_takes_any_number_for_a_step():
    for law in LAWS.values():
        assert law(7) == law(np.int64(7)) == law(jnp.int32(7)) == jax.jit(law)(7)
        assert law(7).dtype == jnp.float32


def test_average_keeps_its_own_dtype():
    average = ema.update({"p": jnp.zeros(2)}, {"p": jnp.full(2, 1.0, jnp.bfloat16)}, jnp.float32(0.75))
    assert average["p"].dtype == jnp.float32
    chex.assert_trees_all_equal(average, {"p": np.full(2, 0.25, np.float32)}, strict=True)


def test_the_average_is_of_the_new_parameters():
    """With decay 0 it is what the step has just made, projected: not what it started from."""
    import optax

    step = train.make_train_step(
        lambda params, key, data, cond: (params["p"].sum(), {}), optax.sgd(1.0), 0.0,
        project=lambda params: jax.tree.map(lambda a: a * 10, params),
    )  # fmt: skip
    state, _ = step(train.init_state({"p": jnp.ones(2)}, optax.sgd(1.0)), jax.random.key(0), jnp.ones((4, 1)))
    np.testing.assert_array_equal(state.ema["p"], [0, 0])
    state, _ = step(state, jax.random.key(0), jnp.ones((4, 1)))
    np.testing.assert_array_equal(state.ema["p"], [-10, -10])


@pytest.mark.parametrize(
    "law",
    [
        lambda: ema.constant(1.0),
        lambda: ema.constant(-0.1),
        lambda: ema.half_life(1000, 0),
        lambda: ema.half_life(1000, 8, ramp=0.0),
        lambda: ema.warmup(1.0),
        lambda: ema.warmup(0.99, inv_gamma=0.0),
        lambda: ema.warmup(0.99, power=-1.0),
        lambda: ema.power(0.0),
        lambda: ema.power(0.4),
        lambda: ema.power(float("nan")),
        lambda: ema.power_gamma(-1.0),
        lambda: ema.sigma_rel_of(-2.0),
    ],
)
def test_errors(law):
    with pytest.raises(ValueError, match="ema: .*(must be|positive)"):
        law()
