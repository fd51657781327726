"""Targets, conditionings, levels, weights: conversions, published tables, laws."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES

import jdiff
from jdiff import conditioning, levels, targets, weights
from jdiff.core.keys import BatchKey

TARGETS = {
    "x0": targets.X0(), "eps": targets.Eps(), "score": targets.Score(), "v": targets.V(),
    "velocity": targets.Velocity(), "edm": targets.EDM(0.7),
}  # fmt: skip
T = jnp.array([0.05, 0.4, 0.8])


def pair(dtype=jnp.float32):
    keys = jax.random.split(jax.random.key(0))
    return [jax.random.normal(k, (3, 4), dtype) for k in keys]


@pytest.mark.parametrize("x64,tolerance", [(False, 2e-4), (True, 1e-10)])
@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_solve_inverts_aim(schedule, x64, tolerance):
    """(x_0, eps) -> (x_t, F) -> (x_0, eps), each error measured against what it is a part of."""
    with jax.enable_x64(x64):
        schedule = MORE_SCHEDULES[schedule]
        x0, eps = pair(jnp.float64 if x64 else jnp.float32)
        t = jnp.array([0.05, 0.4, 0.8])
        for name, target in TARGETS.items():
            x, F = jdiff.q_sample(schedule, x0, t, eps), targets.aim(schedule, target, x0, eps, t)
            got_x0, got_eps = targets.solve(schedule, target, x, F, t)
            noise = (schedule.sigma(t) / schedule.alpha(t))[:, None]  # eps-like targets see x0 through x / alpha
            assert float(jnp.max(jnp.abs(got_x0 - x0) / (1 + noise))) < tolerance, name
            assert float(jnp.max(jnp.abs(got_eps - eps) / (1 + 1 / noise))) < tolerance, name


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_converted_loss_is_the_scaled_loss(schedule):
    """For all pairs: an error of F in one target is an error of x_0 of c_out times it, hence of any other target."""
    with jax.enable_x64(True):
        schedule, T = SCHEDULES[schedule], np.array([0.05, 0.4, 0.8])
        x0, eps = pair(jnp.float64)
        x = jdiff.q_sample(schedule, x0, T, eps)
        for a in TARGETS.values():
            out = targets.aim(schedule, a, x0, eps, T) + 0.1
            hat = targets.solve(schedule, a, x, out, T)
            np.testing.assert_allclose(hat[0] - x0, 0.1 * targets.c_out(schedule, a, T)[:, None] + 0 * x0, rtol=1e-6)
            for b in TARGETS.values():
                error = targets.aim(schedule, b, *hat, T) - targets.aim(schedule, b, x0, eps, T)
                scale = targets.c_out(schedule, a, T) / targets.c_out(schedule, b, T)
                np.testing.assert_allclose(error, 0.1 * scale[:, None] + 0 * x0, rtol=1e-5)


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


def test_each_target_is_what_it_says():
    """As a derivative of the path or of the density, or by its variance."""
    assert MEANING.keys() == TARGETS.keys()
    with jax.enable_x64(True):
        x0, eps = (a[0] for a in pair(jnp.float64))
        for schedule in (jdiff.VP(), jdiff.Cosine(), jdiff.Flow(), jdiff.EDM()):
            for name, target in TARGETS.items():
                if name == "v" and isinstance(schedule, (jdiff.Flow, jdiff.EDM)):
                    continue  # v is the derivative by the angle where the variance is preserved
                t = jnp.float64(0.4)
                expected = MEANING[name](schedule, x0, eps, t)
                got = targets.aim(schedule, target, x0[None], eps[None], t)[0]
                np.testing.assert_allclose(got, expected, rtol=1e-9, atol=1e-12, err_msg=name)


def test_relations():
    x0, eps = pair()
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


@pytest.mark.parametrize("schedule", MORE_SCHEDULES)
def test_the_input_has_unit_variance(schedule):
    """Var(c_in x_t) = 1 for data of standard deviation sigma_data; labels stay in [-2.5, 2.5] up to t = 1."""
    schedule = MORE_SCHEDULES[schedule]
    t = jnp.linspace(schedule.t_min, 1.0, 9)
    c_in, label = conditioning.LogSNR(0.5)(schedule, jnp.ones((9, 1)), t)
    variance = c_in[:, 0] ** 2 * ((schedule.alpha(t) * 0.5) ** 2 + schedule.sigma(t) ** 2)
    np.testing.assert_allclose(variance, 1, rtol=1e-5)
    assert (np.diff(label) >= 0).all() and np.abs(label).max() <= 2.5
    slope = jax.grad(lambda u: conditioning.LogSNR()(schedule, jnp.ones((1, 1)), u)[1][0])(1.0)
    assert jnp.isfinite(slope)


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
    key, law = jax.random.key(3), LEVELS[law]
    whole = law(key, 16, jdiff.EDM())
    parts = [law(BatchKey(key, start, 16), 4, jdiff.EDM()) for start in (0, 4, 8, 12)]
    np.testing.assert_array_equal(jnp.concatenate(parts), whole)


def test_laws():
    from scipy.stats import kstest, norm

    n, key = 4000, jax.random.key(1)
    t = levels.Uniform(0.2, 0.7)(key, n, jdiff.VP())
    counts, _ = np.histogram(t, n, (0.2, 0.7))
    assert (counts <= 2).all() and (t >= 0.2).all() and (t < 0.7).all()  # one a stratum, up to rounding
    k = np.round(levels.Knots(100)(key, n, jdiff.VP()) * 100).astype(int)
    np.testing.assert_array_equal(np.bincount(k)[1:], n // 100 + 0 * np.arange(100))
    k = np.round(levels.Antithetic(100)(key, n, jdiff.VP()) * 100).astype(int) - 1
    np.testing.assert_array_equal(k[: n // 2] + k[n // 2 :], 99)
    assert kstest(k[: n // 2] / 100 + 0.005, "uniform").pvalue > 1e-3
    t = levels.LogNormal(-1.2, 1.2)(key, n, jdiff.Flow())
    assert kstest(-jdiff.log_snr(jdiff.Flow(), t) / 2, norm(-1.2, 1.2).cdf).pvalue > 1e-3
    t = np.asarray(levels.LogitNormal(0.3, 0.8)(key, n, jdiff.VP()), np.float64)
    assert kstest(np.log(t / (1 - t)), norm(0.3, 0.8).cdf).pvalue > 1e-3


# ---------------------------------------------------------------- weights


def test_min_snr_for_every_target():
    """min(s, g)/s for eps, min(s, g) for x0, min(s, g)/(s + 1) for v: arXiv:2303.09556."""
    schedule, g = jdiff.VP(), 5.0
    s = np.exp(np.asarray(jdiff.log_snr(schedule, T)))
    for name, expected in (("eps", np.minimum(s, g) / s), ("x0", np.minimum(s, g)), ("v", np.minimum(s, g) / (s + 1))):
        np.testing.assert_allclose(weights.MinSNR(g)(schedule, TARGETS[name], T), expected, rtol=1e-4)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_mean_the_same_for_every_target(schedule):
    """w c_out^-2, the weight of an error in x_0, does not depend on the target."""
    with jax.enable_x64(True):
        schedule, T = SCHEDULES[schedule], np.array([0.05, 0.4, 0.8])
        for weight in (
            weights.Simple(), weights.EDM(), weights.MinSNR(), weights.P2(), weights.Sigmoid(), weights.Likelihood(),
        ):  # fmt: skip
            in_x0 = [weight(schedule, a, T) / targets.c_out(schedule, a, T) ** 2 for a in TARGETS.values()]
            for other in in_x0[1:]:
                np.testing.assert_allclose(other, in_x0[0], rtol=1e-7)
        np.testing.assert_allclose(weights.Simple()(schedule, targets.Eps(), T), 1, rtol=1e-9)
        np.testing.assert_allclose(weights.Flat()(schedule, targets.V(), T), 1)
        _, g2 = jdiff.sde.forward(schedule, T)
        np.testing.assert_allclose(weights.Likelihood()(schedule, targets.Score(), T), g2, rtol=1e-7)


@pytest.mark.parametrize("schedule", [jdiff.Flow(), jdiff.Cosine()])
def test_weights_at_pure_noise(schedule):
    """Finite where alpha = 0, with finite derivatives: 0 for v, 1 for the simple weight of eps."""
    one = jnp.float32(1)
    for weight in (weights.Simple(), weights.MinSNR(), weights.P2(), weights.Sigmoid(), weights.Likelihood()):
        for target in (targets.V(), targets.Velocity(), targets.X0()):
            value, slope = jax.value_and_grad(lambda t, w=weight, a=target: w(schedule, a, t))(one)
            assert float(value) < 1e-6 and jnp.isfinite(slope)
    np.testing.assert_allclose(weights.Simple()(schedule, targets.Eps(), one), 1, rtol=1e-5)
