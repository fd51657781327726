"""Losses: every choice is finite, Bayes risks, uncertainty, hybrid, self-conditioning."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import SCHEDULES, Diagonal, one_of
from networks import random_variables

import jdiff
from jdiff import config, coupling, levels, losses, parallel, targets, train, weights
from jdiff.core.keys import BatchKey, normal, split
from jdiff.core.pytrees import noun

KEY = jax.random.key(6)
TABLE = jdiff.discrete(jdiff.betas.linear(100, 1e-3, 0.2))
ALL_SCHEDULES = SCHEDULES | {"discrete": TABLE}
TARGETS = tuple(make() for make in config.TARGETS.values())
WEIGHTS = tuple(make() for make in config.WEIGHTS.values())
AWARE = levels.LossAware(bins=4)
LOSSES = np.array([1, 30, 1, 1], np.float32)[:, None] * np.ones((1, 10), np.float32)
LEVELS = (
    levels.Uniform(), levels.Independent(), levels.Knots(100), levels.Antithetic(100), levels.LogNormal(),
    levels.LogitNormal(), AWARE.at(dict(losses=LOSSES, count=np.full(4, 10, np.float32))),
)  # fmt: skip
PARAMS = jax.tree.map(
    lambda a: np.array(a, np.float32),
    {"w": [[0.5, -0.2], [0.1, 0.8]], "b": [0.1, -0.1], "p": [[0.3, 0.0], [0.0, 0.3]]},
    is_leaf=lambda a: isinstance(a, list),
)


def apply(params, x, label, cond):
    """A network of the plane; with self-conditioning it looks at the estimate too."""
    h = x[:, :2] @ params["w"] + params["b"][None] + jnp.tanh(label)[:, None]
    return jnp.tanh(h if x.shape[1] == 2 else h + x[:, 2:] @ params["p"])


def data(n=12):
    """In NumPy: nothing is compiled."""
    return np.tanh(np.random.default_rng(8).normal(size=(n, 2))).astype(np.float32)


# ---------------------------------------------------------------- every combination

EACH = 6  # rows of each level and weight
ROWS = EACH * len(LEVELS) * len(WEIGHTS)


@jax.jit
def all_levels(key, schedule):
    """Rows of all laws one after the other."""
    return jnp.concatenate(
        [law(k, ROWS // len(LEVELS), schedule) for law, k in zip(LEVELS, split(key, len(LEVELS)), strict=True)]
    )


@noun
class Given:
    """A law of t, or a weight, whose values were computed before."""

    values: object

    def __call__(self, *_):
        return self.values


def all_weights(schedule, target, t):
    """Row i is weighed by the weight i modulo their number."""
    table = np.stack([weight(schedule, target, t) for weight in WEIGHTS])
    return table[np.arange(len(t)) % len(WEIGHTS), np.arange(len(t))]


@jax.jit
def each_loss(params, schedule, target, t, weight, x0, share):
    """(the loss of each row, its gradient)."""

    def loss(params):
        how = dict(schedule=schedule, target=target, levels=Given(t), weight=Given(weight))
        return losses.denoising(apply, params, KEY, x0, self_conditioning=share, **how)

    gradients, aux = jax.grad(loss, has_aux=True)(params)
    return aux, gradients


@pytest.mark.parametrize("target", TARGETS, ids=lambda target: type(target).__name__)
def test_every_target_weight_and_level_is_finite(target):
    """The loss of each row, and its gradient, for all 7 x 7 x 7 schedules, weights and laws, self-conditioned or not.

    The weights are computed operation by operation: as a part of the program they would be most of it.
    """
    for name, schedule in ALL_SCHEDULES.items():
        t = all_levels(KEY, one_of(name, ALL_SCHEDULES))
        assert (t >= schedule.t_min - 1e-6).all() and (t <= schedule.t_max).all()
        weight = all_weights(schedule, target, t)
        for share in (0.0, 0.5):
            aux, gradients = each_loss(PARAMS, one_of(name, ALL_SCHEDULES), target, t, weight, data(ROWS), share)
            chex.assert_shape([aux["t"], aux["each"]], (ROWS,))
            bad = ~np.isfinite(aux["each"])
            assert not bad.any(), (name, [WEIGHTS[i % len(WEIGHTS)] for i in np.flatnonzero(bad)], aux["t"][bad])
            chex.assert_tree_all_finite(gradients)


@pytest.mark.parametrize(
    "target", [targets.Eps(), targets.V(), targets.EDM()], ids=lambda target: type(target).__name__
)
def test_the_best_network_has_the_bayes_risk(target):
    """With the exact denoiser of N(m, c) as network: E |F - F*|^2 = Var[x_0 | x_t] / c_out^2 at each t."""
    c, z = 0.4, np.random.default_rng(3).normal(size=(20_000, 1))

    @jax.jit
    def ratio(schedule, x0, t_min):
        exact = Diagonal(schedule, 0.3, c)

        def best(params, x, t, cond):
            return targets.aim(schedule, target, *exact.predict(x, t)[:2], t)

        how = dict(conditioning=jdiff.conditioning.Continuous(1.0), levels=levels.Independent(t_min, 0.9))
        _, aux = losses.denoising(best, None, KEY, x0, schedule=schedule, target=target, **how)
        alpha, sigma = schedule.alpha(aux["t"]), schedule.sigma(aux["t"])
        risk = c * sigma**2 / (alpha**2 * c + sigma**2) / targets.c_out(schedule, target, aux["t"]) ** 2
        return (aux["each"] / risk).mean()

    for name in ALL_SCHEDULES:
        value = ratio(one_of(name, ALL_SCHEDULES), np.float32(0.3 + c**0.5 * z), max(0.05, ALL_SCHEDULES[name].t_min))
        np.testing.assert_allclose(value, 1, atol=0.05, err_msg=name)  # chi^2_1: 0.01 is one deviation


# ---------------------------------------------------------------- uncertainty


def pair(params, x, label, cond):
    return apply(params, x, label, cond), params["u"] + 0 * label


def test_uncertainty_is_least_at_the_log_of_the_error():
    """L(u) = e exp(-u) + u: L(log e) = 1 + log e, L' = 0 and L'' = 1 there."""
    how = dict(schedule=jdiff.EDM(), target=targets.EDM(), weight=weights.EDM(), levels=levels.LogNormal())

    @jax.jit
    def uncertain(params):
        """((loss, aux), gradients, the second derivatives by u)."""

        def loss(params):
            return losses.uncertain(pair, params, KEY, data(), **how)

        def slope(u):
            return jax.grad(loss, has_aux=True)(params | {"u": u})[0]["u"]

        return *jax.value_and_grad(loss, has_aux=True)(params), jax.jacfwd(slope)(params["u"])

    @jax.jit
    @functools.partial(jax.value_and_grad, has_aux=True)
    def plain(params):
        return losses.denoising(apply, params, KEY, data(), **how)

    (loss, aux), gradients, _ = uncertain(PARAMS | {"u": np.full(12, 0.7, np.float32)})
    (_, plain_aux), plain_gradients = plain(PARAMS)
    np.testing.assert_allclose(aux["error"], plain_aux["each"], rtol=1e-5)
    np.testing.assert_allclose(aux["t"], plain_aux["t"], rtol=1e-6)
    np.testing.assert_allclose(loss, (aux["error"] * np.exp(-0.7) + 0.7).mean(), rtol=1e-6)
    # the gradient of the network is that of the error over e^u
    np.testing.assert_allclose(gradients["w"], plain_gradients["w"] * np.exp(-0.7), rtol=1e-4, atol=1e-6)
    best = np.log(aux["error"])
    (_, aux), gradients, curvature = uncertain(PARAMS | {"u": best})
    np.testing.assert_allclose(aux["each"], 1 + best, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(gradients["u"], 0, atol=1e-6)
    np.testing.assert_allclose(curvature, np.eye(12) / 12, atol=1e-6)


def test_uncertainty_of_edm2():
    model = jdiff.models.EDM2UNet(channels=8, multipliers=(1,), blocks=1, attention=(), head_channels=8)
    x0 = data(32).reshape(4, 4, 4, 1)
    variables = random_variables(model, x0, np.zeros(4, np.float32))

    def net(params, x, label, cond):
        return model.apply(params, x, label, cond, return_logvar=True)

    @jax.jit
    def both(variables):
        how = dict(schedule=jdiff.EDM(), target=targets.EDM(), levels=levels.LogNormal(), weight=weights.EDM())
        loss, aux = losses.uncertain(net, variables, KEY, x0, **how)
        return loss, aux, net(variables, x0, jnp.log(jdiff.EDM().sigma(aux["t"])) / 4, None)[1]

    loss, aux, u = both(variables)
    np.testing.assert_allclose(aux["u"], u, rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(loss, (aux["error"] * np.exp(-aux["u"]) + aux["u"]).mean(), rtol=1e-5)


def test_uncertainty_needs_a_pair():
    how = dict(schedule=jdiff.EDM(), target=targets.EDM())
    with pytest.raises(
        ValueError, match=r"uncertain: the network returned \(12, 2\); expected F \(12, 2\) and u \(12,\)"
    ):
        jax.eval_shape(lambda: losses.uncertain(apply, PARAMS, KEY, data(), **how))
    with pytest.raises(ValueError, match="expected F"):
        jax.eval_shape(lambda: losses.uncertain(lambda p, x, label, cond: (x, x), PARAMS, KEY, data(), **how))


# ---------------------------------------------------------------- hybrid


def halves(params, x, label, cond):
    return jnp.concatenate([apply(params, x, label, cond), jnp.tanh(x[:, :2] @ params["v"])], -1)


HALVES = PARAMS | {"v": np.array([[0.3, 0.2], [-0.4, 0.5]], np.float32)}


@pytest.mark.parametrize("target", [targets.Eps(), targets.V()])
def test_hybrid_is_simple_plus_the_bound(target):
    """Each part is its own loss; only the variance's parameters feel the bound, and only the mean's the error."""
    how = dict(schedule=TABLE, target=target, conditioning=jdiff.conditioning.Index(100))

    @jax.jit
    def all_losses(params):
        hybrid = jax.value_and_grad(lambda p: losses.hybrid(halves, p, KEY, data(), **how), has_aux=True)(params)
        law = dict(how, levels=levels.Knots(100))
        simple = jax.grad(lambda p: losses.denoising(apply, p, KEY, data(), **law), has_aux=True)(params)
        t = hybrid[0][1]["t"]
        x = jdiff.q_sample(TABLE, data(), t, normal(split(KEY)[1], (12, 2)))

        def bound(params):
            options = dict(conditioning=how["conditioning"], learned_variance=True)
            denoise = jdiff.denoiser(halves, params, TABLE, target, **options)
            terms = 100 * losses.vlb_terms(denoise, TABLE, data(), x, t)
            return 1e-3 * terms.mean(), terms

        return hybrid, simple, jax.grad(bound, has_aux=True)(params)

    ((loss, aux), gradients), (plain_gradients, plain_aux), (bound_gradients, terms) = all_losses(HALVES)
    np.testing.assert_allclose(np.round(aux["t"] * 100), aux["t"] * 100, atol=1e-4)
    np.testing.assert_allclose(aux["simple"], plain_aux["each"], rtol=1e-5)
    for name in ("w", "b"):
        np.testing.assert_allclose(gradients[name], plain_gradients[name], rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(aux["vlb"], terms, rtol=1e-4)
    np.testing.assert_allclose(aux["each"], aux["simple"] + 1e-3 * aux["vlb"], rtol=1e-6)
    np.testing.assert_allclose(loss, aux["each"].mean(), rtol=1e-6)
    np.testing.assert_allclose(gradients["v"], bound_gradients["v"], rtol=1e-3, atol=1e-7)


def test_hybrid_learns_the_best_variance():
    """Trained on the bound alone, a wide Gaussian's variance at each knot becomes that of its exact reverse step."""
    c, T = 1.0, 10
    schedule = jdiff.discrete(jdiff.betas.linear(T, 0.05, 0.6))
    x0 = c**0.5 * np.random.default_rng(2).normal(size=(4000, 1)).astype(np.float32)

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
    np.testing.assert_allclose(fit(np.zeros(T, np.float32)), 1, atol=0.25)


def test_hybrid_errors():
    with pytest.raises(ValueError, match="hybrid: VP has no steps"):
        losses.hybrid(halves, HALVES, KEY, data(), schedule=jdiff.VP(), target=targets.Eps())
    with pytest.raises(ValueError, match="the network returned"):
        jax.eval_shape(lambda: losses.hybrid(apply, PARAMS, KEY, data(), schedule=TABLE, target=targets.Eps()))


# ---------------------------------------------------------------- self-conditioning

HOW = dict(schedule=jdiff.Flow(), target=targets.Velocity())


def test_the_share_sees_its_own_estimate_and_the_rest_zeros():
    """Row by row: what the network is shown beside x_t is 0 or the x_0 of its first pass."""

    @jax.jit
    def loss_and_inputs(x0):
        inputs = []

        def recording(params, x, label, cond):
            inputs.append(x)
            return apply(params, x, label, cond)

        _, aux = losses.denoising(recording, PARAMS, KEY, x0, self_conditioning=0.5, **HOW)
        return aux, inputs

    @jax.jit
    def by_hand(x0, t, shown):
        """(the estimate of the first pass, the loss of each row) for what the second pass is shown."""
        eps = normal(split(KEY)[1], x0.shape)
        x = jdiff.q_sample(HOW["schedule"], x0, t, eps)
        denoise = jdiff.denoiser(apply, PARAMS, *HOW.values(), self_conditioning=True)
        out = targets.aim(*HOW.values(), *denoise.predict(x, t, shown)[:2], t)
        return denoise(x, t), ((out - targets.aim(*HOW.values(), x0, eps, t)) ** 2).mean(1)

    aux, (first, second) = loss_and_inputs(data(400))
    np.testing.assert_array_equal(first[:, 2:], 0)
    np.testing.assert_array_equal(first[:, :2], second[:, :2])
    shown = second[:, 2:]
    estimate, each = by_hand(data(400), aux["t"], shown)
    is_shown = np.abs(shown).sum(1) > 0
    np.testing.assert_allclose(shown, np.where(is_shown[:, None], estimate, 0), rtol=1e-4, atol=1e-5)
    assert 0.4 < is_shown.mean() < 0.6
    np.testing.assert_allclose(aux["each"], each, rtol=1e-3, atol=1e-5)


def test_self_conditioning_off_is_zeros_and_its_gradient_stops():
    def by_hand(params, frozen):
        t, eps = levels.Uniform()(split(KEY)[0], 12, HOW["schedule"]), normal(split(KEY)[1], (12, 2))
        x = jdiff.q_sample(HOW["schedule"], data(), t, eps)
        make = functools.partial(jdiff.denoiser, schedule=HOW["schedule"], target=HOW["target"], self_conditioning=True)
        previous = make(apply, frozen)(x, t)
        out = targets.aim(*HOW.values(), *make(apply, params).predict(x, t, previous)[:2], t)
        return ((out - targets.aim(*HOW.values(), data(), eps, t)) ** 2).mean()

    @jax.jit
    @jax.value_and_grad
    def loss(params, share):
        return losses.denoising(apply, params, KEY, data(), self_conditioning=share, **HOW)[0]

    without = jax.jit(lambda params: losses.denoising(apply, params, KEY, data(), **HOW)[0])(PARAMS)
    np.testing.assert_allclose(loss(PARAMS, 0.0)[0], without, rtol=1e-6)
    inattentive = PARAMS | {"p": np.zeros((2, 2), np.float32)}
    np.testing.assert_allclose(loss(inattentive, 1.0)[0], without, rtol=1e-6)
    chex.assert_trees_all_close(loss(PARAMS, 1.0)[1], jax.jit(jax.grad(by_hand))(PARAMS, PARAMS), rtol=1e-3, atol=1e-5)
    with pytest.raises(ValueError, match="self_conditioning is the share"):
        losses.denoising(apply, PARAMS, KEY, data(), self_conditioning=1.5, **HOW)


def everything(params, key, x0, cond, law=None):
    """Hybrid, self-conditioned, with chosen noise: all choices at once."""
    how = dict(schedule=TABLE, target=targets.Eps(), weight=weights.MinSNR(), coupling=coupling.Nearest(2))
    return losses.hybrid(halves, params, key, x0, self_conditioning=0.5, levels=law, **how)


def test_all_choices_at_once_by_position_and_on_devices():
    """The loss of each row is the same in one batch, sharded, and in slices, each on a device of its own."""

    def rows(key, x0):
        return everything(HALVES, key, x0, None)[1]

    x0 = data(16)
    whole = jax.device_get(jax.jit(rows)(KEY, x0))
    chex.assert_tree_shape_prefix(whole, (16,))
    sharded = jax.jit(rows)(KEY, parallel.shard_batch(parallel.mesh(), x0))
    keys = BatchKey(KEY, np.arange(0, 16, 2), 16)
    slices = jax.pmap(rows, in_axes=(keys.replace(key=None, start=0), 0))(keys, x0.reshape(8, 2, 2))
    for parts in (sharded, jax.tree.map(np.concatenate, jax.device_get(slices))):
        chex.assert_trees_all_close(jax.device_get(parts), whole, rtol=1e-4, atol=1e-6)


@pytest.mark.slow
def test_a_loss_aware_hybrid_trains():
    """Nichol & Dhariwal's own recipe, the law learnt from the whole loss: one program, before it is full and after."""
    law = levels.LossAware(T=100, bins=10, history=2)
    tx = optax.adam(1e-2)
    step = train.make_train_step(losses.loss_aware(everything, law, TABLE), tx, 0.9)
    step = jax.jit(chex.assert_max_traces(step, n=1))
    state = train.init_state(HALVES, tx, {"levels": law.init()})
    for _ in range(12):
        state, aux = step(state, KEY, data(32))
    assert np.isfinite(aux["loss"])
    shares = np.asarray(law.shares(state.extra["levels"]))
    size = np.sqrt((np.asarray(state.extra["levels"]["losses"]) ** 2).mean(1))
    np.testing.assert_allclose(shares, 0.999 * size / size.sum() + 0.0001, rtol=1e-5)


def test_new_settings_are_no_new_program():
    """A new rate, vlb or weight is no new program."""

    def loss(rate, vlb, gamma):
        how = dict(schedule=TABLE, target=targets.Eps(), weight=weights.MinSNR(gamma))
        return losses.hybrid(halves, HALVES, KEY, data(), self_conditioning=rate, vlb=vlb, **how)[0]

    one = jax.jit(chex.assert_max_traces(loss, n=1))
    settings = np.array([[0.5, 1e-3, 5.0], [1.0, 0.1, 1.0]], np.float32)
    values = np.array([one(*row) for row in settings])
    assert np.isfinite(values).all() and values[0] != values[1]
    np.testing.assert_allclose(jax.jit(jax.vmap(loss))(*settings.T), values, rtol=1e-5)
