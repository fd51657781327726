"""Targets, conditionings, levels, weights: conversions, published tables, laws."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, one_of

import jdiff
from jdiff import conditioning, levels, targets, weights
from jdiff.core.keys import BatchKey

TARGETS = {
    "x0": targets.X0(), "eps": targets.Eps(), "score": targets.Score(), "v": targets.V(),
    "velocity": targets.Velocity(), "edm": targets.EDM(0.7),
}  # fmt: skip
T = np.array([0.05, 0.4, 0.8])
PAIR = tuple(np.random.default_rng(0).normal(size=(2, 3, 4)))  # x_0 and eps


@jax.jit
def rates_at(schedule, t):
    return schedule.alpha(t), schedule.sigma(t)


@jax.jit
def there_and_back(schedule, x0, eps, t):
    """Of each target, (x_0, eps) -> (x_t, F) -> (x_0, eps)."""
    x = jdiff.q_sample(schedule, x0, t, eps)
    return {
        name: targets.solve(schedule, target, x, targets.aim(schedule, target, x0, eps, t), t)
        for name, target in TARGETS.items()
    }


@pytest.mark.parametrize("x64,tolerance", [(False, 2e-4), (True, 1e-10)])
@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_solve_inverts_aim(schedule, x64, tolerance):
    """Each error is measured against what it is a part of."""
    with jax.enable_x64(x64):
        x0, eps, t = (a.astype(np.float64 if x64 else np.float32) for a in (*PAIR, T))
        alpha, sigma = map(np.asarray, rates_at(one_of(schedule, MORE_SCHEDULES), t))
        noise = (sigma / alpha)[:, None]  # eps-like targets see x0 through x / alpha
        for name, got in there_and_back(one_of(schedule, MORE_SCHEDULES), x0, eps, t).items():
            got_x0, got_eps = map(np.asarray, got)
            assert np.max(np.abs(got_x0 - x0) / (1 + noise)) < tolerance, name
            assert np.max(np.abs(got_eps - eps) / (1 + 1 / noise)) < tolerance, name


@jax.jit
def off_by(schedule, x0, eps, t, error=0.1):
    """Of each target whose F is wrong by `error`: the error in x_0, and those in all targets."""
    x, errors = jdiff.q_sample(schedule, x0, t, eps), []
    for a in TARGETS.values():
        hat = targets.solve(schedule, a, x, targets.aim(schedule, a, x0, eps, t) + error, t)
        of_targets = [
            targets.aim(schedule, b, *hat, t) - targets.aim(schedule, b, x0, eps, t) for b in TARGETS.values()
        ]
        errors.append((hat[0] - x0, of_targets))
    return errors, [targets.c_out(schedule, a, t) for a in TARGETS.values()]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_converted_loss_is_the_scaled_loss(schedule):
    """For all pairs: an error of F in one target is an error of x_0 of c_out times it, hence of any other target."""
    with jax.enable_x64(True):
        errors, scales = jax.tree.map(np.asarray, off_by(one_of(schedule), *PAIR, T))
        for (of_x0, of_targets), scale in zip(errors, scales, strict=True):
            np.testing.assert_allclose(of_x0, 0.1 * scale[:, None] + 0 * of_x0, rtol=1e-6)
            for error, other in zip(of_targets, scales, strict=True):
                np.testing.assert_allclose(error, 0.1 * (scale / other)[:, None] + 0 * error, rtol=1e-5)


def test_edm_is_karras_table_1():
    with jax.enable_x64(True):
        schedule, t, sd = jdiff.EDM(), jnp.linspace(0.0, 1.0, 11), 0.5
        s = schedule.sigma(t)
        skip, out = sd**2 / (s**2 + sd**2), s * sd / np.sqrt(sd**2 + s**2)
        np.testing.assert_allclose(targets.c_skip(schedule, targets.EDM(sd), t), skip, rtol=1e-9)
        np.testing.assert_allclose(targets.c_out(schedule, targets.EDM(sd), t), out, rtol=1e-9)
        shown, label = conditioning.EDM(sd)(schedule, jnp.ones((11, 2)), t)
        np.testing.assert_allclose(shown[:, 0], 1 / np.sqrt(s**2 + sd**2), rtol=1e-9)
        np.testing.assert_allclose(label, np.log(s) / 4, rtol=1e-9)
        np.testing.assert_allclose(weights.EDM(sd)(schedule, targets.EDM(sd), t), 1, rtol=1e-9)


def by_clock(schedule, x0, eps, t, clock):
    """d x_t / d clock(t), by forward mode, for one t."""
    speed = jax.jvp(clock, (t,), (jnp.ones_like(t),))[1]
    return jax.jvp(lambda t: schedule.alpha(t) * x0 + schedule.sigma(t) * eps, (t,), (jnp.ones_like(t),))[1] / speed


def score(schedule, x0, eps, t):
    """grad log q(x_t | x_0), by reverse mode."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return jax.grad(lambda x: -0.5 * jnp.sum((x - alpha * x0) ** 2) / sigma**2)(alpha * x0 + sigma * eps)


def unit_variance(schedule, x0, eps, t, sigma_data=0.7):
    """The F of unit variance that is not correlated with x_t, for x_0 of variance sigma_data^2."""
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    covariance = jnp.diag(jnp.asarray([sigma_data**2, 1.0]))
    of_x = jnp.stack([alpha, sigma])
    row = jnp.linalg.inv(covariance) @ jnp.stack([of_x[1], -of_x[0]])  # uncorrelated with x_t
    row = row / jnp.sqrt(row @ covariance @ row)
    return row[0] * x0 + row[1] * eps


# what each target is, said without its row
MEANING = {
    "x0": lambda schedule, x0, eps, t: x0,
    "eps": lambda schedule, x0, eps, t: eps,
    "score": score,
    "v": lambda schedule, *given: by_clock(
        schedule, *given, lambda t: jnp.arctan2(schedule.sigma(t), schedule.alpha(t))
    ),
    "velocity": lambda schedule, *given: by_clock(schedule, *given, lambda t: t),
    "edm": unit_variance,
}


@jax.jit
def said_and_done(schedule, x0, eps, t):
    got = {name: targets.aim(schedule, target, x0[None], eps[None], t)[0] for name, target in TARGETS.items()}
    return {name: mean(schedule, x0, eps, t) for name, mean in MEANING.items()}, got


@pytest.mark.parametrize("schedule", ["vp", "cosine", "flow", "edm"])
def test_each_target_is_what_it_says(schedule):
    """As a derivative of the path or of the density, or by its variance."""
    assert MEANING.keys() == TARGETS.keys()
    with jax.enable_x64(True):
        expected, got = said_and_done(one_of(schedule), *(a[0] for a in PAIR), 0.4)
    if schedule in ("flow", "edm"):  # v is the derivative by the angle where the variance is preserved
        del expected["v"], got["v"]
    chex.assert_trees_all_close(got, expected, rtol=1e-9, atol=1e-12)


def test_relations():
    x0, eps = (a.astype(np.float32) for a in PAIR)
    np.testing.assert_allclose(targets.aim(jdiff.Flow(), targets.Velocity(), x0, eps, T), eps - x0, rtol=1e-6)
    schedule = jdiff.Cosine()
    minus_v = -targets.aim(schedule, targets.V(), x0, eps, T)
    np.testing.assert_allclose(targets.aim(schedule, targets.EDM(1.0), x0, eps, T), minus_v, rtol=1e-4, atol=1e-5)
    out = eps * 1.2345
    np.testing.assert_array_equal(targets.solve(jdiff.VP(), targets.Eps(), x0, out, T)[1], out)  # bit for bit
    np.testing.assert_array_equal(targets.solve(jdiff.VP(), targets.X0(), x0, out, T)[0], out)
    with pytest.raises(ValueError, match="the network's output has shape"):
        targets.solve(jdiff.VP(), targets.Eps(), x0, out[:, :1], T)


# ---------------------------------------------------------------- conditionings


@jax.jit
def shown(schedule, t):
    """(c_in, label) at t, alpha and sigma there, and d label / dt at 1."""
    slope = jax.grad(lambda u: conditioning.LogSNR()(schedule, jnp.ones((1, 1)), u)[1][0])(1.0)
    return conditioning.LogSNR(0.5)(schedule, jnp.ones((9, 1)), t), schedule.alpha(t), schedule.sigma(t), slope


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_the_input_has_unit_variance(schedule):
    """Var(c_in x_t) = 1 for data of standard deviation sigma_data; labels stay in [-2.5, 2.5] up to t = 1."""
    t = np.linspace(MORE_SCHEDULES[schedule].t_min, 1.0, 9, dtype=np.float32)
    (c_in, label), alpha, sigma, slope = jax.tree.map(np.asarray, shown(one_of(schedule, MORE_SCHEDULES), t))
    np.testing.assert_allclose(c_in[:, 0] ** 2 * ((alpha * 0.5) ** 2 + sigma**2), 1, rtol=1e-5)
    assert (np.diff(label) >= 0).all() and np.abs(label).max() <= 2.5
    assert np.isfinite(slope)


def test_indices_and_other_labels():
    x, knots = jnp.ones((1000, 1)), jnp.arange(1, 1001) / 1000
    np.testing.assert_array_equal(conditioning.Index(1000)(jdiff.VP(), x, knots)[1], np.arange(1000))
    fractional = conditioning.Index(1000, fractional=True)(jdiff.VP(), x[:1], 0.5004)[1]
    np.testing.assert_allclose(fractional, 499.4, rtol=1e-5)
    np.testing.assert_allclose(conditioning.Continuous()(jdiff.VP(), x[:1], 0.5)[1], 499.5)
    np.testing.assert_allclose(conditioning.Sigma()(jdiff.VE(), x[:1], 1.0)[1], 50, rtol=1e-5)


def test_labels_are_dropped_at_the_rate_by_position():
    labels = jnp.zeros(20_000, jnp.int32)
    dropped = conditioning.drop_labels(jax.random.key(0), labels, 0.1, 10)
    assert set(np.unique(dropped)) == {0, 10}
    np.testing.assert_allclose((dropped == 10).mean(), 0.1, atol=0.01)
    np.testing.assert_array_equal(conditioning.drop_labels(jax.random.key(0), labels[:50], 0.1, 10), dropped[:50])


# ---------------------------------------------------------------- levels

LEVELS = {
    "uniform": levels.Uniform(), "knots": levels.Knots(100), "antithetic": levels.Antithetic(100),
    "log_normal": levels.LogNormal(), "logit_normal": levels.LogitNormal(),
}  # fmt: skip


@pytest.mark.parametrize("law", LEVELS)
def test_slices_of_the_global_batch_draw_what_the_whole_does(law):
    law = LEVELS[law]

    @jax.jit
    def both(key):
        parts = [law(BatchKey(key, start, 16), 4, jdiff.EDM()) for start in (0, 4, 8, 12)]
        return law(key, 16, jdiff.EDM()), jnp.concatenate(parts)

    whole, parts = both(jax.random.key(3))
    np.testing.assert_array_equal(parts, whole)


def test_laws():
    from scipy.stats import kstest, norm

    n = 4000

    @jax.jit
    def draws(key):
        log_normal = levels.LogNormal(-1.2, 1.2)(key, n, jdiff.Flow())
        return (
            levels.Uniform(0.2, 0.7)(key, n, jdiff.VP()),
            levels.Knots(100)(key, n, jdiff.VP()),
            levels.Antithetic(100)(key, n, jdiff.VP()),
            -jdiff.log_snr(jdiff.Flow(), log_normal) / 2,
            levels.LogitNormal(0.3, 0.8)(key, n, jdiff.VP()),
        )

    uniform, knots, antithetic, log_noise, logit_normal = map(np.asarray, draws(jax.random.key(1)))
    counts, _ = np.histogram(uniform, n, (0.2, 0.7))
    assert (counts <= 2).all() and (uniform >= 0.2).all() and (uniform < 0.7).all()  # one a stratum, up to rounding
    k = np.round(knots * 100).astype(int)
    np.testing.assert_array_equal(np.bincount(k)[1:], n // 100 + 0 * np.arange(100))
    k = np.round(antithetic * 100).astype(int) - 1
    np.testing.assert_array_equal(k[: n // 2] + k[n // 2 :], 99)
    assert kstest(k[: n // 2] / 100 + 0.005, "uniform").pvalue > 1e-3
    assert kstest(log_noise, norm(-1.2, 1.2).cdf).pvalue > 1e-3
    t = logit_normal.astype(np.float64)
    assert kstest(np.log(t / (1 - t)), norm(0.3, 0.8).cdf).pvalue > 1e-3


# ---------------------------------------------------------------- weights


def test_min_snr_for_every_target():
    """min(s, g)/s for eps, min(s, g) for x0, min(s, g)/(s + 1) for v: arXiv:2303.09556."""
    schedule, g = jdiff.VP(), 5.0
    s = np.exp(np.asarray(jdiff.log_snr(schedule, T)))
    for name, expected in (("eps", np.minimum(s, g) / s), ("x0", np.minimum(s, g)), ("v", np.minimum(s, g) / (s + 1))):
        np.testing.assert_allclose(weights.MinSNR(g)(schedule, TARGETS[name], T), expected, rtol=1e-4)


@jax.jit
def weighed(schedule, t):
    """What the weights make of an error in x_0, for each target; and the three that are known."""
    weighings = (
        weights.Simple(), weights.EDM(), weights.MinSNR(), weights.P2(), weights.Sigmoid(), weights.Likelihood(),
    )  # fmt: skip
    in_x0 = [[w(schedule, a, t) / targets.c_out(schedule, a, t) ** 2 for a in TARGETS.values()] for w in weighings]
    known = [
        weights.Simple()(schedule, targets.Eps(), t),
        weights.Flat()(schedule, targets.V(), t),
        weights.Likelihood()(schedule, targets.Score(), t),
    ]
    return jnp.asarray(in_x0), known, jdiff.sde.forward(schedule, t)[1]


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_mean_the_same_for_every_target(schedule):
    """w c_out^-2, the weight of an error in x_0, does not depend on the target."""
    with jax.enable_x64(True):
        in_x0, (simple, flat, likelihood), g2 = jax.tree.map(np.asarray, weighed(one_of(schedule), T))
    np.testing.assert_allclose(in_x0, np.broadcast_to(in_x0[:, :1], in_x0.shape), rtol=1e-7)
    np.testing.assert_allclose(simple, 1, rtol=1e-9)
    np.testing.assert_allclose(flat, 1)
    np.testing.assert_allclose(likelihood, g2, rtol=1e-7)


@pytest.mark.parametrize("schedule", [jdiff.Flow(), jdiff.Cosine()])
def test_weights_at_pure_noise(schedule):
    """Finite where alpha = 0, with finite derivatives: 0 for v, 1 for the simple weight of eps."""
    one = jnp.float32(1)
    for weight in (weights.Simple(), weights.MinSNR(), weights.P2(), weights.Sigmoid(), weights.Likelihood()):
        for target in (targets.V(), targets.Velocity(), targets.X0()):
            value, slope = jax.value_and_grad(lambda t, w=weight, a=target: w(schedule, a, t))(one)
            assert float(value) < 1e-6 and jnp.isfinite(slope)
    np.testing.assert_allclose(weights.Simple()(schedule, targets.Eps(), one), 1, rtol=1e-5)
