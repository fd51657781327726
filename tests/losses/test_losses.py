"""Losses: every choice is finite, Bayes risks, uncertainty, hybrid, self-conditioning."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SCHEDULES, Diagonal

import jdiff
from jdiff import coupling, levels, losses, parallel, targets, train, weights
from jdiff.core.keys import BatchKey, normal, split

KEY = jax.random.key(6)
TABLE = jdiff.discrete(jdiff.betas.linear(100, 1e-3, 0.2))
ALL_SCHEDULES = SCHEDULES | {"discrete": TABLE}
TARGETS = (targets.X0(), targets.Eps(), targets.Score(), targets.V(), targets.Velocity(), targets.EDM())
WEIGHTS = (
    weights.Flat(), weights.Simple(), weights.EDM(), weights.MinSNR(), weights.P2(), weights.Sigmoid(),
    weights.Likelihood(),
)  # fmt: skip
AWARE = levels.LossAware(bins=4)
LEVELS = (
    levels.Uniform(), levels.Independent(), levels.Knots(100), levels.Antithetic(100), levels.LogNormal(),
    levels.LogitNormal(), AWARE.at(dict(losses=jnp.ones((4, 10)).at[1].set(30.0), count=jnp.full(4, 10.0))),
)  # fmt: skip
PARAMS = {"w": jnp.array([[0.5, -0.2], [0.1, 0.8]]), "b": jnp.array([0.1, -0.1]), "p": 0.3 * jnp.eye(2)}


def apply(params, x, label, cond):
    """A network of the plane; with self-conditioning it looks at the estimate too."""
    h = x[:, :2] @ params["w"] + params["b"][None] + jnp.tanh(label)[:, None]
    return jnp.tanh(h if x.shape[1] == 2 else h + x[:, 2:] @ params["p"])


def data(n=12):
    return jnp.tanh(normal(jax.random.key(8), (n, 2)))


# ---------------------------------------------------------------- every combination

EACH = 6  # rows of each level and weight


def all_levels(key, n, schedule):
    """All laws one after the other, in one batch."""
    return jnp.concatenate([law(k, n // len(LEVELS), schedule) for law, k in zip(LEVELS, split(key, 7), strict=True)])


def all_weights(schedule, target, t):
    """Row i is weighed by the weight i modulo their number."""
    table = jnp.stack([weight(schedule, target, t) for weight in WEIGHTS])
    return table[jnp.arange(len(t)) % len(WEIGHTS), jnp.arange(len(t))]


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_every_target_weight_and_level_is_finite(name):
    """The loss of each row, and its gradient, for all 6 x 7 x 7 choices on this schedule; self-conditioned, or not."""
    schedule, n = ALL_SCHEDULES[name], EACH * len(LEVELS) * len(WEIGHTS)

    @jax.jit
    def gradients(params, x0, rate):
        def one(target):
            def loss(params):
                how = dict(schedule=schedule, target=target, levels=all_levels, weight=all_weights)
                return losses.denoising(apply, params, KEY, x0, self_conditioning=rate, **how)

            grads, aux = jax.grad(loss, has_aux=True)(params)
            return aux, grads

        return [one(target) for target in TARGETS]

    for rate in (0.0, 0.5):
        for (aux, grads), target in zip(gradients(PARAMS, data(n), rate), TARGETS, strict=True):
            assert set(aux) == {"t", "each"} and aux["t"].shape == aux["each"].shape == (n,)
            bad = ~np.isfinite(aux["each"])
            assert not bad.any(), (target, [WEIGHTS[i % 7] for i in np.flatnonzero(bad)], aux["t"][bad])
            assert all(np.isfinite(leaf).all() for leaf in jax.tree.leaves(grads)), target
            assert (aux["t"] >= schedule.t_min - 1e-6).all() and (aux["t"] <= schedule.t_max).all()


@pytest.mark.parametrize("name", ALL_SCHEDULES)
def test_the_best_network_has_the_bayes_risk(name):
    """With the exact denoiser of N(m, c) as network: E |F - F*|^2 = Var[x_0 | x_t] / c_out^2 at each t."""
    schedule, c, n = ALL_SCHEDULES[name], 0.4, 20_000
    x0 = 0.3 + c**0.5 * normal(jax.random.key(3), (n, 1))
    exact = Diagonal(schedule, 0.3, c)
    law = levels.Independent(max(0.05, schedule.t_min), 0.9)
    for target in (targets.Eps(), targets.V(), targets.EDM()):

        def best(params, x, t, cond, target=target):
            return targets.aim(schedule, target, *exact.predict(x, t)[:2], t)

        how = dict(conditioning=jdiff.conditioning.Continuous(1.0), levels=law)
        _, aux = losses.denoising(best, None, KEY, x0, schedule=schedule, target=target, **how)
        alpha, sigma = schedule.alpha(aux["t"]), schedule.sigma(aux["t"])
        risk = c * sigma**2 / (alpha**2 * c + sigma**2) / targets.c_out(schedule, target, aux["t"]) ** 2
        np.testing.assert_allclose((aux["each"] / risk).mean(), 1, atol=0.05)  # chi^2_1: 0.01 is one deviation


# ---------------------------------------------------------------- uncertainty


def pair(params, x, label, cond):
    return apply(params, x, label, cond), params["u"] + 0 * label


def test_uncertainty_is_least_at_the_log_of_the_error():
    """L(u) = e exp(-u) + u: L(log e) = 1 + log e, L' = 0 and L'' = 1 there."""
    how = dict(schedule=jdiff.EDM(), target=targets.EDM(), weight=weights.EDM(), levels=levels.LogNormal())

    @jax.jit
    def each(u):
        return losses.uncertain(pair, PARAMS | {"u": u}, KEY, data(), **how)

    loss, aux = each(jnp.full(12, 0.7))
    plain, plain_aux = jax.jit(lambda p: losses.denoising(apply, p, KEY, data(), **how))(PARAMS)
    np.testing.assert_allclose(aux["error"], plain_aux["each"], rtol=1e-5)
    np.testing.assert_allclose(aux["t"], plain_aux["t"], rtol=1e-6)
    np.testing.assert_allclose(loss, (aux["error"] * np.exp(-0.7) + 0.7).mean(), rtol=1e-6)
    best = jnp.log(aux["error"])
    np.testing.assert_allclose(each(best)[1]["each"], 1 + best, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(jax.grad(lambda u: each(u)[0])(best), 0, atol=1e-6)
    curvature = jax.hessian(lambda u: each(u)[0])(best)
    np.testing.assert_allclose(curvature, np.eye(12) / 12, atol=1e-6)
    # the gradient of the network is that of the error over e^u
    slope = jax.jit(jax.grad(lambda p: losses.uncertain(pair, p, KEY, data(), **how)[0]))
    grads = slope(PARAMS | {"u": jnp.full(12, 0.7)})
    plain = jax.jit(jax.grad(lambda p: losses.denoising(apply, p, KEY, data(), **how)[0]))(PARAMS)
    np.testing.assert_allclose(grads["w"], plain["w"] * np.exp(-0.7), rtol=1e-4, atol=1e-6)


def test_uncertainty_of_edm2():
    model = jdiff.models.EDM2UNet(channels=8, multipliers=(1,), blocks=1, attention=(), head_channels=8)
    x0 = jnp.tanh(normal(KEY, (4, 4, 4, 1)))
    params = jax.jit(model.init)(KEY, x0, jnp.zeros(4))

    def net(params, x, label, cond):
        return model.apply(params, x, label, cond, return_logvar=True)

    how = dict(schedule=jdiff.EDM(), target=targets.EDM(), levels=levels.LogNormal(), weight=weights.EDM())
    loss, aux = jax.jit(lambda p: losses.uncertain(net, p, KEY, x0, **how))(params)
    label = jnp.log(jdiff.EDM().sigma(aux["t"])) / 4
    np.testing.assert_allclose(aux["u"], jax.jit(net)(params, x0, label, None)[1], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, (aux["error"] * np.exp(-aux["u"]) + aux["u"]).mean(), rtol=1e-5)


def test_uncertainty_needs_a_pair():
    how = dict(schedule=jdiff.EDM(), target=targets.EDM())
    with pytest.raises(
        ValueError, match=r"uncertain: the network returned \(12, 2\); expected F \(12, 2\) and u \(12,\)"
    ):
        losses.uncertain(apply, PARAMS, KEY, data(), **how)
    with pytest.raises(ValueError, match="expected F"):
        losses.uncertain(lambda p, x, label, cond: (x, x), PARAMS, KEY, data(), **how)


# ---------------------------------------------------------------- hybrid


def halves(params, x, label, cond):
    return jnp.concatenate([apply(params, x, label, cond), jnp.tanh(x[:, :2] @ params["v"])], -1)


HALVES = PARAMS | {"v": jnp.array([[0.3, 0.2], [-0.4, 0.5]])}


@pytest.mark.parametrize("target", [targets.Eps(), targets.V()])
def test_hybrid_is_simple_plus_the_bound(target):
    """Each part is its own loss; only the variance's parameters feel the bound, and only the mean's the error."""
    how = dict(schedule=TABLE, target=target, conditioning=jdiff.conditioning.Index(100))

    @jax.jit
    def both(params):
        return jax.value_and_grad(lambda p: losses.hybrid(halves, p, KEY, data(), **how), has_aux=True)(params)

    (loss, aux), grads = both(HALVES)
    np.testing.assert_allclose(np.round(aux["t"] * 100), aux["t"] * 100, atol=1e-4)
    law = dict(how, levels=levels.Knots(100))
    plain_grads, plain_aux = jax.jit(jax.grad(lambda p: losses.denoising(apply, p, KEY, data(), **law), has_aux=True))(
        PARAMS
    )
    np.testing.assert_allclose(aux["simple"], plain_aux["each"], rtol=1e-5)
    for name in ("w", "b"):
        np.testing.assert_allclose(grads[name], plain_grads[name], rtol=1e-4, atol=1e-6)

    eps = normal(split(KEY)[1], (12, 2))
    x = jdiff.q_sample(TABLE, data(), aux["t"], eps)
    options = dict(conditioning=how["conditioning"], learned_variance=True)

    def bound(params):
        denoise = jdiff.denoiser(halves, params, TABLE, target, **options)
        return 100 * losses.vlb_terms(denoise, TABLE, data(), x, aux["t"])

    np.testing.assert_allclose(aux["vlb"], jax.jit(bound)(HALVES), rtol=1e-4)
    np.testing.assert_allclose(aux["each"], aux["simple"] + 1e-3 * aux["vlb"], rtol=1e-6)
    np.testing.assert_allclose(loss, aux["each"].mean(), rtol=1e-6)
    slope = jax.jit(jax.grad(lambda p: 1e-3 * bound(p).mean()))(HALVES)
    np.testing.assert_allclose(grads["v"], slope["v"], rtol=1e-3, atol=1e-7)


def test_hybrid_learns_the_best_variance():
    """Trained on the bound alone, a wide Gaussian's variance at each knot becomes that of its exact reverse step."""
    c, T = 1.0, 10
    schedule = jdiff.discrete(jdiff.betas.linear(T, 0.05, 0.6))
    x0 = c**0.5 * normal(jax.random.key(2), (4000, 1))

    def net(params, t, label, cond):
        exact = Diagonal(schedule, 0.0, c)(t, label)
        k = jnp.round(label * T).astype(int) - 1
        return jnp.concatenate([exact, params[k][:, None]], -1)

    def loss(params, i):
        how = dict(schedule=schedule, target=targets.X0(), conditioning=jdiff.conditioning.Continuous(1.0))
        return losses.hybrid(net, params, jax.random.fold_in(KEY, i), x0, vlb=1.0, bins=None, **how)[0]

    tx = optax.adam(0.05)

    @jax.jit
    def fit(params):
        def step(i, carry):
            params, state = carry
            updates, state = tx.update(jax.grad(loss)(params, i), state)
            return optax.apply_updates(params, updates), state

        return jax.lax.fori_loop(0, 200, step, (params, tx.init(params)))[0]

    # for N(0, 1) the reverse step has variance beta_k: v = 1, o = 1, at every knot
    np.testing.assert_allclose(fit(jnp.zeros(T)), 1, atol=0.25)


def test_hybrid_errors():
    with pytest.raises(ValueError, match="hybrid: VP has no steps"):
        losses.hybrid(halves, HALVES, KEY, data(), schedule=jdiff.VP(), target=targets.Eps())
    with pytest.raises(ValueError, match="the network returned"):
        losses.hybrid(apply, PARAMS, KEY, data(), schedule=TABLE, target=targets.Eps())


# ---------------------------------------------------------------- self-conditioning

HOW = dict(schedule=jdiff.Flow(), target=targets.Velocity())


def test_the_share_sees_its_own_estimate_and_the_rest_zeros():
    """Row by row: what the network is shown beside x_t is 0 or the x_0 of its first pass."""
    seen = []

    def spy(params, x, label, cond):
        seen.append(x)
        return apply(params, x, label, cond)

    _, aux = losses.denoising(spy, PARAMS, KEY, data(400), self_conditioning=0.5, **HOW)
    first, second = seen
    np.testing.assert_array_equal(first[:, 2:], 0)
    np.testing.assert_array_equal(first[:, :2], second[:, :2])
    eps = normal(split(KEY)[1], (400, 2))
    x = jdiff.q_sample(HOW["schedule"], data(400), aux["t"], eps)
    denoise = jdiff.denoiser(apply, PARAMS, *HOW.values(), self_conditioning=True)
    estimate = denoise(x, aux["t"])
    shown = np.abs(second[:, 2:]).sum(1) > 0
    np.testing.assert_allclose(second[:, 2:], np.where(shown[:, None], estimate, 0), rtol=1e-4, atol=1e-5)
    assert 0.4 < shown.mean() < 0.6
    # the loss is that of the denoiser shown the same thing
    out = targets.aim(*HOW.values(), *denoise.predict(x, aux["t"], second[:, 2:])[:2], aux["t"])
    want = ((out - targets.aim(*HOW.values(), data(400), eps, aux["t"])) ** 2).mean(1)
    np.testing.assert_allclose(aux["each"], want, rtol=1e-3, atol=1e-5)


def test_self_conditioning_off_is_zeros_and_its_gradient_stops():
    def fixed(params, x, label, cond):
        return apply(params | {"p": 0 * params["p"]}, x, label, cond)

    off, _ = losses.denoising(apply, PARAMS, KEY, data(), self_conditioning=0.0, **HOW)
    blind, _ = losses.denoising(apply, PARAMS, KEY, data(), **HOW)
    np.testing.assert_allclose(off, blind, rtol=1e-6)
    np.testing.assert_allclose(
        losses.denoising(fixed, PARAMS, KEY, data(), self_conditioning=1.0, **HOW)[0], blind, rtol=1e-6
    )

    def by_hand(params, frozen):
        t, eps = levels.Uniform()(split(KEY)[0], 12, HOW["schedule"]), normal(split(KEY)[1], (12, 2))
        x = jdiff.q_sample(HOW["schedule"], data(), t, eps)
        make = functools.partial(jdiff.denoiser, schedule=HOW["schedule"], target=HOW["target"], self_conditioning=True)
        previous = make(apply, frozen)(x, t)
        out = targets.aim(*HOW.values(), *make(apply, params).predict(x, t, previous)[:2], t)
        return ((out - targets.aim(*HOW.values(), data(), eps, t)) ** 2).mean()

    got = jax.grad(lambda p: losses.denoising(apply, p, KEY, data(), self_conditioning=1.0, **HOW)[0])(PARAMS)
    want = jax.grad(by_hand)(PARAMS, PARAMS)
    for a, b in zip(jax.tree.leaves(got), jax.tree.leaves(want), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="self_conditioning is the share"):
        losses.denoising(apply, PARAMS, KEY, data(), self_conditioning=1.5, **HOW)


def everything(params, key, x0, cond, law=None):
    """Hybrid, self-conditioned, with chosen noise: all choices at once."""
    how = dict(schedule=TABLE, target=targets.Eps(), weight=weights.MinSNR(), coupling=coupling.Nearest(2))
    return losses.hybrid(halves, params, key, x0, self_conditioning=0.5, levels=law, **how)


def test_all_choices_at_once_by_position_and_on_devices():
    x0, compiled = data(16), jax.jit(everything)
    _, whole = compiled(HALVES, KEY, x0, None)
    parts = [compiled(HALVES, BatchKey(KEY, jnp.asarray(i), 16), x0[i : i + 4], None)[1] for i in (0, 4, 8, 12)]
    for name in whole:
        np.testing.assert_allclose(jnp.concatenate([p[name] for p in parts]), whole[name], rtol=1e-4, atol=1e-6)

    tx = optax.adam(1e-2)
    plain = train.make_train_step(everything, tx, 0.9)
    one, _ = jax.jit(plain)(train.init_state(HALVES, tx), KEY, x0)
    mesh = parallel.mesh()
    sharded, _ = jax.jit(plain)(
        parallel.replicate(mesh, train.init_state(HALVES, tx)), KEY, parallel.shard_batch(mesh, x0)
    )
    mapped = jax.pmap(
        train.make_train_step(everything, tx, 0.9, axis_name="data", accumulate=2),
        axis_name="data",
        in_axes=(0, None, 0),
    )
    mapped, _ = mapped(parallel.stack(train.init_state(HALVES, tx)), KEY, x0.reshape(8, 2, 2))
    for other in (sharded, parallel.unstack(mapped)):
        for a, b in zip(jax.tree.leaves(other.params), jax.tree.leaves(one.params), strict=True):
            np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-5)


@pytest.mark.slow
def test_a_loss_aware_hybrid_trains():
    """Nichol & Dhariwal's own recipe, the law learnt from the whole loss: one program, before it is full and after."""
    law = levels.LossAware(T=100, bins=10, history=2)
    tx = optax.adam(1e-2)
    step = jax.jit(train.make_train_step(losses.loss_aware(everything, law, TABLE), tx, 0.9))
    state = train.init_state(HALVES, tx, {"levels": law.init()})
    for _ in range(12):
        state, aux = step(state, KEY, data(32))
    assert np.isfinite(aux["loss"]) and step._cache_size() == 1
    shares = np.asarray(law.shares(state.extra["levels"]))
    size = np.sqrt((np.asarray(state.extra["levels"]["losses"]) ** 2).mean(1))
    np.testing.assert_allclose(shares, 0.999 * size / size.sum() + 0.0001, rtol=1e-5)


def test_settings_are_traced_and_vmap():
    """A new rate, vlb or weight is no new program."""

    @jax.jit
    def loss(rate, vlb, gamma):
        how = dict(schedule=TABLE, target=targets.Eps(), weight=weights.MinSNR(gamma))
        return losses.hybrid(halves, HALVES, KEY, data(), self_conditioning=rate, vlb=vlb, **how)[0]

    values = [loss(rate, vlb, gamma) for rate, vlb, gamma in ((0.5, 1e-3, 5.0), (1.0, 0.1, 1.0))]
    assert loss._cache_size() == 1 and np.isfinite(values).all() and values[0] != values[1]
    many = jax.vmap(loss)(jnp.array([0.5, 1.0]), jnp.array([1e-3, 0.1]), jnp.array([5.0, 1.0]))
    np.testing.assert_allclose(many, values, rtol=1e-5)
