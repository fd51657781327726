"""log p against exact densities, its gradients, its estimators; data to latents and back; bits per dimension."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, Diagonal, mixture, one_of
from scipy.stats import norm

import jdiff

STATIC = ("trace", "probes", "probe_law", "method", "adjoint", "max_steps")
B, D = 5, 2


@pytest.fixture(autouse=True, scope="module")
def _needs_diffrax():
    pytest.importorskip("diffrax", reason="the adaptive extra is not installed")


@functools.cache
def measure():
    """`jax.jit(jdiff.log_likelihood)` as its users jit it."""
    return jax.jit(jdiff.log_likelihood, static_argnames=STATIC)


def gaussian():
    """A Gaussian as a mixture of the shape of `mixture()`: one program for both."""
    C = np.array([[0.5, 0.2], [0.2, 0.3]])
    return jdiff.oracle.GaussianMixture(np.full(2, 0.5), np.array([[0.3, -0.4]] * 2), np.stack([C, C]))


def moments(data):
    mean, C = data.moments()
    return dict(mean=mean, std=jnp.sqrt(jnp.diag(C)))


def of(name):
    return one_of(name) if name in SCHEDULES else MORE_SCHEDULES[name]


def assert_log_p_is_exact(name, data, **settings):
    schedule, x = of(name), data.sample(jax.random.key(0), B)
    log_p, info = measure()(data.denoise(schedule), schedule, x, trace="exact", **moments(data), **settings)
    exact = data.log_prob(schedule, x, schedule.t_min)
    assert info.success.all()
    np.testing.assert_allclose(log_p / D, exact / D, rtol=0, atol=1e-3)
    np.testing.assert_array_equal(info.stderr, 0)


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_p_of_a_mixture_is_exact(name):
    assert_log_p_is_exact(name, mixture())


@pytest.mark.parametrize("name", SCHEDULES)
def test_log_p_of_a_gaussian_is_exact(name):
    assert_log_p_is_exact(name, gaussian())


@pytest.mark.slow
@pytest.mark.parametrize("data", [mixture, gaussian])
@pytest.mark.parametrize("name", ["discrete", "zero_snr", "shifted"])
def test_log_p_on_tables_and_shifted_clocks_is_exact(name, data):
    assert_log_p_is_exact(name, data())


@pytest.mark.slow
def test_the_error_follows_the_tolerance():
    """In float64, down to what remains of the data at t_max."""
    with jax.enable_x64(True):
        schedule, data = jdiff.Flow(), mixture()
        x = data.sample(jax.random.key(0), B)
        exact, errors = data.log_prob(schedule, x, schedule.t_min), []
        for tol in (1e-3, 1e-5, 1e-7):
            log_p, _ = measure()(data.denoise(schedule), schedule, x, trace="exact", rtol=tol, atol=tol)
            errors.append(float(jnp.abs(log_p - exact).max()))
        assert errors[0] < 3e-2 and errors[1] < 3e-4 and errors[2] < 3e-6, errors


@pytest.mark.parametrize("name", ["vp", "ve"])
def test_the_prior_has_the_moments_of_the_data(name):
    """With N(0, sigma^2) at t_max log p is off by more than the solver's error."""
    schedule, data = of(name), mixture()
    x = data.sample(jax.random.key(0), B)
    run = functools.partial(measure(), data.denoise(schedule), schedule, x, trace="exact")
    exact = data.log_prob(schedule, x, schedule.t_min)
    nothing, right = dict(mean=jnp.zeros(D), std=jnp.zeros(D)), moments(data)
    wrong_by, right_by = (float(jnp.abs(run(**m)[0] - exact).max()) / D for m in (nothing, right))
    assert wrong_by > 8e-4 and wrong_by > 5 * right_by, (wrong_by, right_by)


@pytest.mark.slow
@pytest.mark.parametrize("law", ["rademacher", "gaussian"])
def test_probes(law):
    """A hundred probes are within 3 standard errors of the exact trace; single ones are unbiased over keys."""
    schedule, data = jdiff.VP(), mixture()
    denoise, x = data.denoise(schedule), data.sample(jax.random.key(0), B)
    run = functools.partial(measure(), denoise, schedule, probe_law=law)
    exact, _ = measure()(denoise, schedule, x, trace="exact")
    log_p, info = run(x, jax.random.key(1), probes=100)
    assert (jnp.abs(log_p - exact) < 3 * info.stderr + 1e-3).all() and (info.stderr > 1e-3).all()

    n = 2000  # keys
    alone, single = run(jnp.tile(x[:1], (n, 1)), jax.random.split(jax.random.key(2), n))
    assert jnp.isnan(single.stderr).all()
    spread = float(alone.std(ddof=1))
    assert abs(float(alone.mean() - exact[0])) < 3 * spread / np.sqrt(n) + 1e-3
    # the standard error that many probes state is the spread of single ones, over the root of their number
    np.testing.assert_allclose(float(info.stderr[0]) * 10, spread, rtol=0.35)


@pytest.mark.slow
@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve"])
def test_gradients(adjoint):
    """By the data and by the mixture's means: those of the exact density."""
    with jax.enable_x64(True):
        schedule, data = jdiff.VP(), mixture()
        x = data.sample(jax.random.key(0), 2)

        def by_flow(x, means):
            data = mixture().replace(means=means)
            settings = dict(trace="exact", adjoint=adjoint, rtol=1e-6, atol=1e-6) | moments(data)
            return jdiff.log_likelihood(data.denoise(schedule), schedule, x, **settings)[0].sum()

        def exact(x, means):
            return mixture().replace(means=means).log_prob(schedule, x, schedule.t_min).sum()

        got, expected = (jax.jit(jax.grad(f, (0, 1)))(x, data.means) for f in (by_flow, exact))
        chex.assert_trees_all_close(got, expected, atol=1e-3)


@pytest.mark.slow
def test_a_gradient_through_probes_is_that_of_their_mean():
    """The probes are fixed: forward mode, and reverse mode on every schedule with kinks too."""
    schedule = jdiff.discrete(jdiff.betas.linear(100))
    x, key = jnp.array([[0.2, -0.4], [0.5, 0.1]]), jax.random.key(0)

    def log_p(m, adjoint):
        settings = dict(probes=2, adjoint=adjoint, mean=m, std=0.4**0.5)
        return jdiff.log_likelihood(Diagonal(schedule, m), schedule, x, key, **settings)[0].sum()

    exact = jax.grad(lambda m: _diagonal_log_prob(schedule, m, x, schedule.t_min))(0.3)
    np.testing.assert_allclose(jax.jit(jax.grad(functools.partial(log_p, adjoint="checkpoint")))(0.3), exact, atol=1e-2)
    forward = jax.jit(jax.jacfwd(functools.partial(log_p, adjoint="forward")))(0.3)
    np.testing.assert_allclose(forward, exact, atol=1e-2)


def _diagonal_log_prob(schedule, m, x, t):
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    return jax.scipy.stats.norm.logpdf(x, alpha * m, jnp.sqrt(alpha**2 * 0.4 + sigma**2)).sum()


def test_rademacher_probes_of_a_diagonal_jacobian_are_exact():
    """v_i^2 = 1: on images, whose shape log p and the latents keep; a row does not know the others."""
    schedule = jdiff.Flow()
    x = 0.3 + 0.4**0.5 * jax.random.normal(jax.random.key(0), (3, 2, 2, 1))
    denoise, keys = Diagonal(schedule), jax.random.split(jax.random.key(1), 3)
    log_p, info = measure()(denoise, schedule, x, keys)
    alpha, sigma = schedule.alpha(schedule.t_min), schedule.sigma(schedule.t_min)
    exact = norm.logpdf(x, alpha * 0.3, np.sqrt(alpha**2 * 0.4 + sigma**2)).sum((1, 2, 3))
    np.testing.assert_allclose(log_p, exact, atol=4e-3)
    chex.assert_equal_shape([info.latent, x])
    other = x.at[1:].set(1.0)
    chex.assert_trees_all_close(measure()(denoise, schedule, other, keys)[0][0], log_p[0], rtol=1e-6)


@pytest.mark.slow
def test_labels_follow_their_samples():
    schedule, labels = jdiff.VP(), jnp.array([0, 5, 2])

    def apply(params, x, label, cond):
        return params * x + 0.1 * cond[:, None].astype(x.dtype)

    def run(labels, x):
        denoise = jdiff.denoiser(apply, jnp.float32(0.9), schedule, jdiff.targets.Eps(), labels)
        return measure()(denoise, schedule, x, trace="exact")[0]

    x = jax.random.normal(jax.random.key(0), (3, 2))
    together = run(labels, x)
    for i in range(3):
        chex.assert_trees_all_close(run(labels[i : i + 1], x[i : i + 1]), together[i : i + 1], rtol=1e-4)


def test_memory_of_an_exact_trace():
    """It does not hold the D x D numbers of a Jacobian: 4 times the size takes not 16 times the memory."""

    def temporary(side):
        schedule = jdiff.Flow()
        x = jax.ShapeDtypeStruct((1, side, side, 1), jnp.float32)
        run = jax.jit(lambda x: jdiff.log_likelihood(Diagonal(schedule), schedule, x, trace="exact", adjoint="forward"))
        return run.lower(x).compile().memory_analysis().temp_size_in_bytes

    assert temporary(32) < 6 * temporary(16)


def test_one_program_for_all_numbers():
    go = jax.jit(chex.assert_max_traces(jdiff.log_likelihood, n=1), static_argnames=STATIC)
    x = jnp.zeros((2, 2))
    for i in range(3):
        schedule = jdiff.VP(0.1 + i, 19.0 + i)
        settings = dict(t_max=0.9 + 0.01 * i, t_min=0.01 * (i + 1), mean=0.1 * i, std=0.3, rtol=0.1**i, atol=0.1**i)
        _, info = go(Diagonal(schedule, 0.1 * i), schedule, x, jax.random.key(i), max_steps=64, **settings)
        assert info.success.all()


# ---------------------------------------------------------------- latents


@functools.cache
def there_and_back():
    def run(denoise, schedule, x):
        latent, _ = jdiff.encode(denoise, schedule, x)
        return latent, *jdiff.decode(denoise, schedule, latent)

    return jax.jit(run)


@pytest.mark.parametrize("name", SCHEDULES)
def test_data_to_latents_and_back(name):
    """The latents are those of the exact flow, and what comes back is x to 1e-4."""
    schedule, data = of(name), jdiff.oracle.Gaussian(jnp.array([0.3, -0.4]), jnp.array([[0.5, 0.2], [0.2, 0.3]]))
    x = data.sample(jax.random.key(0), B)
    latent, again, info = there_and_back()(data.denoise(schedule), schedule, x)
    assert info.success.all()
    np.testing.assert_allclose(again, x, atol=1e-4)
    scale = float(schedule.sigma(schedule.t_max))
    np.testing.assert_allclose(latent / scale, data.flow(schedule, x, schedule.t_min, 1.0) / scale, atol=3e-4)


@pytest.mark.slow
def test_latents_of_a_table_and_of_a_mixture():
    """Of `log_likelihood`, of `encode`, and of `invert` on a fine grid; `sample_adaptive` makes the data of them."""
    schedule, data = jdiff.discrete(jdiff.betas.linear(1000)), mixture()
    denoise, x = data.denoise(schedule), data.sample(jax.random.key(0), B)
    latent, again, _ = there_and_back()(denoise, schedule, x)
    np.testing.assert_allclose(again, x, atol=1e-4)
    _, info = measure()(denoise, schedule, x, trace="exact")
    np.testing.assert_allclose(info.latent, latent, atol=1e-3)
    by_grid = jdiff.invert(jdiff.solvers.RK4(), denoise, schedule, x, jdiff.grid.log_snr(schedule, 400, lowest=-12.0))
    np.testing.assert_allclose(by_grid, latent, atol=2e-2)
    sampled, _ = jdiff.sample_adaptive(denoise, schedule, latent, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(sampled, denoise(x, schedule.t_min), atol=1e-3)


# ---------------------------------------------------------------- bits


def test_bits_of_known_laws():
    """A density that is even over the bins is the even law of 256 levels: 8 bits, however the bins lie."""
    assert float(jdiff.bits_per_dim(-3 * np.log(2), (3,))) == pytest.approx(8)
    assert float(jdiff.bits_per_dim(-3 * np.log(2 * 256 / 255), (3, 1), centred=True)) == pytest.approx(8)
    assert float(jdiff.bits_per_dim(3 * np.log(0.25), (3,), None)) == pytest.approx(2)
    chex.assert_trees_all_close(jdiff.bits_per_dim(jnp.zeros(2), 5, levels=2), jnp.zeros(2))


@pytest.mark.parametrize("centred", [False, True])
def test_dequantised_data_fill_their_bins(centred):
    """Each number keeps its bin, evenly: the mean of a bin is its middle, and bins touch."""
    u = np.repeat(np.array([[0, 7, 255]], np.uint8), 4000, 0)
    x = np.asarray(jdiff.dequantize(jax.random.key(0), u, centred=centred), np.float64)
    width = 2 / (255 if centred else 256)
    middle = u[0] / 127.5 - 1 if centred else (u[0] + 0.5) / 128 - 1
    assert (np.abs(x - middle) <= width / 2 + 1e-6).all()
    np.testing.assert_allclose(x.mean(0), middle, atol=4 * width / np.sqrt(12 * 4000))
    np.testing.assert_allclose(x.std(0), width / np.sqrt(12), rtol=0.05)


def test_many_draws_rise_to_the_probability():
    """Under a density that is steep within a bin: one draw bounds log P, many reach it, which SciPy knows."""
    u, draws, scale = np.full((4096, 1), 131, np.uint8), 64, 0.01
    keys = jax.random.split(jax.random.key(0), draws)
    x = jnp.stack([jdiff.dequantize(key, u) for key in keys])[..., 0]
    log_p = jax.scipy.stats.norm.logpdf(x, 0.0, scale)
    bits = [float(jdiff.bits_per_dim(jdiff.many_draws(log_p[:k]), (1,)).mean()) for k in (1, 4, 64)]
    low = 131 / 128 - 1
    exact = -np.log2(norm.sf(low / scale) - norm.sf((low + 2 / 256) / scale))
    assert bits[0] > bits[1] + 0.02 > bits[2] and bits[2] > exact - 0.01
    np.testing.assert_allclose(bits[2], exact, atol=0.01)
