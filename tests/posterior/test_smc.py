"""Particles against exact posteriors and evidences, resampling against its definition, numbers against SciPy."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Diagonal
from scipy.stats import chi2, norm

import jdiff
from jdiff import posterior
from jdiff.core.arrays import as_time
from jdiff.core.pytrees import noun
from jdiff.posterior import potentials, resampling

MEANS, SPREAD = np.array([[1.0, -0.5], [-0.8, 0.6]], np.float32), 0.3
A, Y, STD = np.array([[1.0, 0.5]], np.float32), np.array([0.6], np.float32), 0.4


@noun
class Blobs(jdiff.Denoise):
    """The exact denoiser of two round Gaussians of equal weights, written out: it compiles in no time."""

    schedule: jdiff.Schedule

    def predict(self, x, t):
        t = as_time(t)
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        v = alpha**2 * SPREAD**2 + sigma**2
        away = x[:, None] - alpha * MEANS[None]
        r = jax.nn.softmax(-0.5 * (away**2).sum(-1) / v, axis=1)
        x0 = (r[..., None] * (MEANS[None] + alpha * SPREAD**2 / v * away)).sum(1)
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t))


def blobs():
    return jdiff.oracle.GaussianMixture(np.ones(2) / 2, MEANS, SPREAD**2 * np.stack([np.eye(2)] * 2))


def exact():
    """(log evidence, mean, second moment) of the posterior of the blobs."""
    std = np.sqrt((A @ A.T)[0, 0] * SPREAD**2 + STD**2)
    mean, covariance = blobs().posterior(A, Y, STD).moments()
    second = np.asarray(covariance) + np.outer(mean, mean)
    return np.log(norm(MEANS @ A[0], std).pdf(Y[0]).mean()), np.asarray(mean), second


def test_the_denoiser_of_this_test():
    x, t = jax.random.normal(jax.random.key(0), (4, 2)), jnp.asarray(0.4)
    np.testing.assert_allclose(Blobs(jdiff.VP())(x, t), blobs().denoise(jdiff.VP())(x, t), rtol=1e-4, atol=1e-5)


def summaries(keys, ess, base, **settings):
    """Log evidence, mean and second moment, effective sizes and resampled shares of a run for each key."""
    times = jdiff.grid.log_snr(base.schedule, 200)
    likelihood = posterior.likelihood(A, Y, STD)

    def one(key):
        p = posterior.smc(base, base.schedule, key, (128, 2), times, likelihood, ess=ess, std=0.8, **settings)
        return p.log_evidence, p.mean, p.covariance + p.mean[:, None] * p.mean[None], p.ess, p.resampled.mean()

    return jax.vmap(one)(keys)


def assert_right(found):
    """Z, Z E[x_0] and Z E[x_0 x_0^T], of which the estimates are unbiased at any n, within 3 standard errors.

    The steps themselves are right to 0.5%.
    """
    log_evidence, *moments = exact()
    ratio = np.exp(np.asarray(found[0], np.float64) - log_evidence)
    estimates = [ratio] + [ratio.reshape(-1, *[1] * (m.ndim - 1)) * np.asarray(m, np.float64) for m in found[1:3]]
    for values, expected in zip(estimates, [1.0, *moments], strict=True):
        error = values.std(0, ddof=1) / np.sqrt(len(values))
        assert (error < 0.05).all(), error
        assert (abs(values.mean(0) - expected) <= 3 * error + 0.005).all(), (values.mean(0), expected, error)


@pytest.mark.slow
def test_twisted_sampling_resampled_never_always_and_where_needed():
    """One program for the three: the evidence and the moments of the exact posterior, each time."""
    run = jax.jit(chex.assert_max_traces(lambda keys, ess: summaries(keys, ess, Blobs(jdiff.VP())), n=1))
    keys, shares = jax.random.split(jax.random.key(1), 64), []
    for ess in (0.0, 0.9, 1.0):
        found = run(keys, ess)
        assert_right(found)
        shares.append(float(found[4].mean()))
    assert shares[0] == 0 and 0 < shares[1] < 0.5 and shares[2] == 1, shares


@pytest.mark.slow
@pytest.mark.parametrize(
    "potential,way",
    [
        (potentials.difference, resampling.stratified),
        (potentials.difference, resampling.multinomial),
        (potentials.maximum, resampling.residual),
        (potentials.total, resampling.systematic),
    ],
)
def test_steering_without_gradients(potential, way):
    """Free steps with each potential and each resampling, on the schedule that starts from alpha = 0.

    The sum of 200 log-likelihoods is none; a 200th of each is on the way, and the end corrects that.
    """
    base, likelihood = Blobs(jdiff.Flow()), posterior.likelihood(A, Y, STD)
    share = 200 if potential is potentials.total else 1
    settings = dict(proposal=base, potential=potential, resampling=way, twist=lambda x0, t: likelihood(x0) / share)
    keys = jax.random.split(jax.random.key(2), 64)
    assert_right(jax.jit(lambda keys: summaries(keys, 0.5, base, **settings))(keys))


@pytest.mark.slow
def test_any_proposal_and_twist():
    """MMPS moves them, and a wrong, weaker likelihood weighs them on the way: the end corrects both."""
    base = Blobs(jdiff.VP())
    proposal = posterior.mmps(base, A, Y, STD)
    weak = posterior.likelihood(A, Y, 3 * STD)
    keys = jax.random.split(jax.random.key(3), 64)
    published = posterior.twisted(base, posterior.likelihood(A, Y, STD), iterations=0)
    for settings in (
        dict(proposal=proposal),
        dict(proposal=published),
        dict(proposal=proposal, twist=lambda x0, t: weak(x0)),
    ):
        assert_right(jax.jit(lambda keys, settings=settings: summaries(keys, 0.5, base, **settings))(keys))


def test_few_steps_are_exact_on_round_gaussians():
    """With the std of N(m, std^2 I) each step is exact: evidence and moments of a run of 6 steps, per number of y."""
    m, std, noise, y = np.float32([0.4, -0.3]), 0.7, np.float32([0.5, 1.0]), np.float32([0.9, 0.2])
    schedule = jdiff.VP()
    data = jdiff.oracle.Gaussian(m, std**2 * np.eye(2, dtype=np.float32))
    base, times = Diagonal(schedule, m[None], std**2), jdiff.grid.log_snr(schedule, 6)
    keys = jax.random.split(jax.random.key(4), 256)

    def one(key):
        likelihood = posterior.likelihood(np.eye(2, dtype=np.float32), y, noise)
        p = posterior.smc(base, schedule, key, (64, 2), times, likelihood, proposal=base, mean=m, std=std)
        return p.log_evidence, p.mean

    found, mean = jax.jit(jax.vmap(one))(keys)
    total = np.sqrt(std**2 + noise**2)
    ratio = np.exp(np.asarray(found, np.float64) - norm(m, total).logpdf(y).sum())
    expected = data.posterior(np.diag(1 / noise), y / noise, 1.0).mean
    for values, right in ((ratio[:, None], 1.0), (ratio[:, None] * np.asarray(mean), expected)):
        error = values.std(0, ddof=1) / 16
        assert (abs(values.mean(0) - right) <= 3 * error).all() and error.max() < 0.01, (values.mean(0), right, error)


# ---------------------------------------------------------------- what goes in and out

SCHEDULE = jdiff.Flow()
BASE, TIMES, KEY = Diagonal(SCHEDULE), jdiff.grid.uniform(5), jax.random.key(0)
REWARD = lambda x0: -((x0 - 0.5) ** 2).sum(1) / 0.1  # noqa: E731


def run(key=KEY, log_likelihood=REWARD, n=16, denoise=BASE, times=TIMES, **settings):
    return jax.jit(lambda key: posterior.smc(denoise, SCHEDULE, key, (n, 2), times, log_likelihood, **settings))(key)


def test_what_a_run_returns():
    """Weights that sum to 1, ancestors and effective sizes that fit the resampling, draws, moments by hand."""
    p = run(ess=0.8)
    w = np.exp(np.asarray(p.log_weights, np.float64))
    np.testing.assert_allclose(w.sum(), 1, rtol=1e-5)
    np.testing.assert_allclose(p.ess[-1], 1 / (w**2).sum(), rtol=1e-4)
    np.testing.assert_allclose(p.mean, w @ np.asarray(p.x), rtol=1e-4)
    np.testing.assert_allclose(p.covariance, np.cov(p.x.T, aweights=w, ddof=0), rtol=1e-3, atol=1e-6)
    np.testing.assert_array_equal(np.asarray(p.ess[:-1]) <= 0.8 * 16, p.resampled)
    still = np.asarray(p.ancestors)[~np.asarray(p.resampled)]
    np.testing.assert_array_equal(still, np.broadcast_to(np.arange(16), still.shape))
    assert p.resampled.any() and not p.resampled.all() and p.saved == 0
    assert {tuple(row) for row in np.asarray(p.draw(KEY)).tolist()} <= {tuple(row) for row in np.asarray(p.x).tolist()}


def test_weights_are_only_those_of_the_end_where_nothing_is_resampled():
    """Free steps, never resampled: plain importance sampling, whatever the potential was on the way."""
    for potential in (potentials.difference, potentials.maximum, potentials.total):
        p = run(ess=0.0, proposal=BASE, potential=potential)
        reward = np.asarray(REWARD(p.x), np.float64)
        expected = reward - np.log(np.exp(reward).sum())
        np.testing.assert_allclose(p.log_weights, expected, rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(p.log_evidence, np.log(np.exp(reward).mean()), rtol=1e-4, atol=1e-4)


def test_rewards_that_have_no_gradient_and_likelihoods_of_zero():
    """A step function steers; where the likelihood is 0 for all, so is the evidence, and nothing is nan."""
    inside = lambda x0: jnp.where(x0[:, 0] > 0.5, 0.0, -jnp.inf)  # noqa: E731
    p = run(log_likelihood=inside, n=64, proposal=BASE, twist=lambda x0, t: 2 * x0[:, 0])
    kept = np.asarray(p.x)[:, 0] > 0.5
    assert kept.any() and not kept.all()
    np.testing.assert_array_equal(np.isfinite(p.log_weights), kept)
    never = run(log_likelihood=lambda x0: jnp.full(len(x0), -jnp.inf), proposal=BASE)
    assert never.log_evidence == -jnp.inf
    np.testing.assert_allclose(never.log_weights, -np.log(16), rtol=1e-6)
    chex.assert_tree_all_finite((never.x, never.mean, never.ess))


def test_gradients_and_half_precision():
    """Finite from alpha = 0, also by settings; particles of half precision have weights of float32."""

    def total(m, noise):
        p = run(denoise=Diagonal(SCHEDULE, m), log_likelihood=posterior.likelihood(np.eye(2), np.ones(2), noise), n=8)
        return p.log_evidence + p.mean.sum()

    chex.assert_tree_all_finite(jax.jit(jax.value_and_grad(total, (0, 1)))(0.3, 0.5))
    half = lambda x, t: BASE(x, t).astype(jnp.bfloat16).astype(x.dtype)  # noqa: E731
    p = run(denoise=half)
    assert p.log_weights.dtype == jnp.float32
    chex.assert_tree_all_finite((p.x, p.log_weights, p.log_evidence))


def test_over_8_devices():
    """Particles over devices, with resampling across them, are those of one device."""
    mesh = jdiff.parallel.mesh()
    rows = jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec("data"))
    one, eight = (
        jax.jit(lambda key, sharding=s: run(key, ess=1.0, n=64, sharding=sharding))(KEY) for s in (None, rows)
    )
    assert len(eight.x.sharding.device_set) == 8
    chex.assert_trees_all_close(one, jax.device_get(eight), rtol=1e-4, atol=1e-5)


def test_one_time():
    """A grid of one time is importance sampling from the prior's denoised noise."""
    p = run(times=TIMES[:1])
    chex.assert_shape((p.ess, p.counts, p.ancestors), ((1,), (1,), (0, 16)))
    np.testing.assert_allclose(p.log_evidence, np.log(np.exp(np.asarray(REWARD(p.x), float)).mean()), rtol=1e-5)


# ---------------------------------------------------------------- resampling and numbers

WAYS = [resampling.systematic, resampling.stratified, resampling.multinomial, resampling.residual]


@pytest.mark.parametrize("way", WAYS, ids=lambda way: way.__name__)
def test_copies_are_n_times_the_weight_on_average(way):
    """Also of weights that are 0 or not normalised, and of fewer particles; whole parts are kept."""
    weights, draws = np.array([0.1, 0.0, 0.45, 0.05, 0.4, 0.0]), 20_000
    log_weights = jnp.log(jnp.asarray(7 * weights, jnp.float32))
    keys = jax.random.split(jax.random.key(0), draws)
    for n in (6, 4):
        index = np.asarray(jax.jit(jax.vmap(lambda key, n=n: way(key, log_weights, n)[:n]))(keys))
        copies = np.stack([(index == i).sum(1) for i in range(6)], 1)
        error = copies.std(0) / np.sqrt(draws)
        assert (abs(copies.mean(0) - n * weights) <= 4 * error + 1e-6).all(), (copies.mean(0), n * weights)
        if way is not resampling.multinomial and way is not resampling.stratified:
            assert (copies >= np.floor(n * weights - 1e-6)).all()


def test_resampling_at_its_ends():
    """One particle with all weight, the last ones with none, many of equal weights: nothing out of range."""
    n = 200_000

    @jax.jit
    def draw(key, *log_weights):
        return [[way(key, w) for w in log_weights] for way in WAYS]

    equal = np.zeros(n, np.float32)
    for one, many, last in draw(
        KEY, np.float32([-np.inf, 0, -np.inf]), equal, np.where(np.arange(n) < n - 1000, 0, -np.inf)
    ):
        np.testing.assert_array_equal(one, 1)
        assert many.min() >= 0 and many.max() < n and last.max() < n - 1000


def test_kld_counts_are_chi_square_quantiles():
    for z, confidence in ((2.326, 0.99), (1.645, 0.95)):
        k = np.arange(3, 400)
        expected = chi2.ppf(confidence, k - 1) / (2 * 0.05)
        np.testing.assert_allclose(posterior.kld_count(k, 0.05, z), expected, rtol=0.01)
    np.testing.assert_array_equal(posterior.kld_count(np.array([0, 1])), 1)


NOISE = 0.05


def narrow(key, adapt, n=1024):
    """Data N(0, 1) seen with a noise that leaves the posterior a twentieth as wide."""
    schedule = jdiff.VP()
    base, times = Diagonal(schedule, 0.0, 1.0), jdiff.grid.log_snr(schedule, 40, lowest=-4.0)
    likelihood = posterior.likelihood(np.eye(1, dtype=np.float32), np.float32([0.5]), NOISE)
    return posterior.smc(base, schedule, key, (n, 1), times, likelihood, ess=1.0, std=1.0, adapt=adapt)


@pytest.mark.slow
def test_fewer_particles_where_the_posterior_narrows():
    """At most half of the particles on average, the evidence still right, and the error within what was asked for.

    The error is the Kullback-Leibler distance of the weighted histogram to the posterior over the bins at the end.
    """
    keys = jax.random.split(jax.random.key(5), 128)
    adapt = posterior.KLD(error=0.05, n_bins=60, n_min=32)
    fixed, adapted = (jax.jit(jax.vmap(lambda key, a=a: narrow(key, a)))(keys) for a in (None, adapt))
    truth, exact, edges = (
        norm(0, np.sqrt(1 + NOISE**2)).logpdf(0.5),
        norm(0.5 / (1 + NOISE**2), NOISE / np.sqrt(1 + NOISE**2)),
        np.linspace(-3, 3, 61),
    )
    for p in (fixed, adapted):
        ratio = np.exp(np.asarray(p.log_evidence, np.float64) - truth)
        assert abs(ratio.mean() - 1) <= 3 * ratio.std(ddof=1) / np.sqrt(128) + 0.01, ratio.mean()
        weights, x = np.exp(np.asarray(p.log_weights, np.float64)), np.asarray(p.x)[..., 0]
        found = np.stack([np.histogram(a, edges, weights=w)[0] for a, w in zip(x, weights, strict=True)])
        right = np.diff(exact.cdf(edges))[None]
        distance = np.where(found > 0, found * np.log(np.where(found > 0, found, 1) / np.maximum(right, 1e-300)), 0)
        # 99% for independent particles, and these have ancestors in common
        assert (distance.sum(1) < 0.05).mean() >= 0.95, distance.sum(1)
    share = adapted.counts.mean() / fixed.counts.mean()
    assert share <= 0.5 and adapted.counts.min() >= 32, (share, adapted.counts.mean(0))


def eagerly(log_likelihood=REWARD, key=KEY, shape=(16, 2), **settings):
    return posterior.smc(BASE, SCHEDULE, key, shape, TIMES[:2], log_likelihood, **settings)


BAD = [
    (
        lambda: eagerly(lambda x0: x0),
        "log_likelihood returned (16, 2) for x_0 (16, 2); expected one number each, (16,)",
    ),
    (
        lambda: eagerly(lambda x0: x0.sum()),
        "log_likelihood returned () for x_0 (16, 2); expected one number each, (16,)",
    ),
    (lambda: eagerly(lambda x0: jnp.nan * x0[:, 0], proposal=BASE), "smc: the weights are nan: log_likelihood or the"),
    (lambda: eagerly("reward"), "log_likelihood is 'reward'; expected a function from x_0 (n, ...) to (n,)"),
    (lambda: eagerly(key=0), "key is 0; expected a PRNG key: jax.random.key(seed)"),
    (lambda: eagerly(key=jax.random.split(KEY, 16)), "smc: keys have shape (16,); give one key, and vmap over several"),
    (lambda: eagerly(shape=16), "smc: shape is 16; expected (particles, ...), each 1 or more"),
    (lambda: eagerly(shape=(0, 2)), "smc: shape is (0, 2); expected (particles, ...), each 1 or more"),
    (lambda: eagerly(ess=1.5), "smc: ess is a share of the particles, from 0 to 1; got 1.5"),
    (lambda: eagerly(ess="half"), "smc: ess must be a number, 0 or more; got half"),
    (lambda: eagerly(eta=0.0), "smc: eta must be a number, positive; got 0.0"),
    (lambda: eagerly(eta=-1), "smc: eta must be a number, positive; got -1"),
    (lambda: eagerly(potential="max"), "potential is 'max'; expected a function of jdiff.posterior.potentials"),
    (lambda: eagerly(resampling="systematic"), "resampling is 'systematic'; expected a function of jdiff.posterior."),
    (lambda: eagerly(twist=3.0), "twist is 3.0; expected a function from x_0 (n, ...) and t to (n,)"),
    (lambda: eagerly(adapt=posterior.KLD), "adapt is the class KLD; expected posterior.KLD(...) or None"),
    (lambda: eagerly(proposal=3.0), "denoise is 3.0; expected a denoiser, or a function (x, t) ->"),
    (lambda: eagerly(proposal=Diagonal(jdiff.VP())), "denoisers and samplers must have one schedule"),
    (lambda: posterior.twisted(BASE, 3.0), "log_likelihood is 3.0; expected a function from x_0 (B, ...) to (B,)"),
    (
        lambda: eagerly(proposal=jdiff.guidance.cfg_pp(BASE, BASE, 0.5)),
        "smc: steps of CFG++ and of denoisers with a memo",
    ),
    (lambda: posterior.twisted(BASE, REWARD, iterations=-1), "twisted: iterations must be a whole number, 0 or more"),
    (lambda: eagerly(iterations=0.5), "smc: iterations must be a whole number, 0 or more; got 0.5"),
    (lambda: posterior.likelihood(A, Y, 0.0), "noise_std must be positive and finite"),
    (lambda: posterior.KLD(error=0.0), "KLD: error must be positive"),
    (lambda: posterior.KLD(low=1.0, high=0.0), "KLD: low must be below high, got 1.0 and 0.0"),
    (lambda: posterior.KLD(n_bins=1), "KLD: n_bins is a whole number, 2 or more; got 1"),
    (
        lambda: eagerly(adapt=posterior.KLD(project=lambda x: x[:, 0])),
        "KLD: project returned (16,) for (16, 2); expected",
    ),
]


@pytest.mark.parametrize("call,message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_calls(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
