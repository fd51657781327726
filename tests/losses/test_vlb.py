"""The variational bound: exact models reach -log p, NumPy's Gaussians, SciPy's bins."""

import functools
import itertools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from scipy.stats import norm

import jdiff
from jdiff import losses
from jdiff.core.pytrees import noun

LOG2 = np.log(2)
TERMS = jax.jit(losses.vlb_terms, static_argnames="bins")


def constant(params, x, label, cond):
    """A network that returns its parameters."""
    return params


@noun
class Exact:
    """The exact reverse process of N(0, c): the mean E[x_0 | x_t], and the variance as a learned one would state it."""

    schedule: object
    c: object

    def __call__(self, x, t):
        return self.predict(x, t).x0

    def predict(self, x, t):
        knot = 1 / self.schedule.log_nsr.shape[-1]
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        keep = self.c * alpha / (alpha**2 * self.c + sigma**2)
        spread = self.c * sigma**2 / (alpha**2 * self.c + sigma**2)  # Var[x_0 | x_t]
        first = t < 1.5 * knot
        s = jnp.where(first, t, t - knot)
        fresh = jdiff.forward.fresh_noise(self.schedule, t, s)
        sigma_s = self.schedule.sigma(s)
        variance = fresh * sigma_s**2 + (self.schedule.alpha(s) * fresh) ** 2 * spread
        v = jnp.log(variance / (fresh * sigma_s**2)) / (2 * jnp.log(sigma / sigma_s))
        small = jdiff.forward.fresh_noise(self.schedule, 2 * knot, knot)  # at k = 1, of beta_1 = sigma_1^2
        v = jnp.where(first, 1 - jnp.log(spread / sigma**2) / jnp.log(small), v)
        x0 = keep[:, None] * x
        extra = jnp.broadcast_to((2 * v - 1)[:, None], x.shape)
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t), extra)


def nodes(T):
    """(t, eps, weight) of every knot and Gauss-Hermite's 3 nodes: exact for what is quadratic in eps."""
    z, w = np.polynomial.hermite_e.hermegauss(3)
    t, eps = np.meshgrid(np.arange(1, T + 1) / T, z, indexing="ij")
    return jnp.asarray(t.ravel()), jnp.asarray(eps.ravel())[:, None], jnp.asarray(np.tile(w / w.sum(), T))


@functools.partial(jax.jit, static_argnames="T")
def bound(schedule, c, value, T):
    """(all terms over the model's own marginal, the bound's prior term) in bits, for x_0 = value and data N(0, c)."""
    t, eps, weight = nodes(T)
    x0 = jnp.full_like(eps, value)
    x = jdiff.q_sample(schedule, x0, t, eps)
    terms = losses.vlb_terms(Exact(schedule, c), schedule, x0, x, t, bins=None)
    return (weight * terms).sum(), losses.vlb_prior(schedule, x0[:1])


@pytest.mark.parametrize("T", [4, 30, 300])
def test_an_exact_model_reaches_minus_log_p(T):
    """No bound is left: the sum of the terms is -log p(x_0), at any number of steps, the learned variance included."""
    with jax.enable_x64(True):
        betas = jdiff.betas.linear(T, 0.02, min(0.9, 12 / T))
        schedule, alpha = jdiff.discrete(betas), np.sqrt(np.prod(1 - betas))
        sigma = np.sqrt(1 - alpha**2)
        for c, value in itertools.product([0.5, 1.0, 2.0], [-1.3, 0.0, 0.4]):
            terms, prior = bound(schedule, c, value, T)
            # the terms start at the model's own marginal instead of N(0, 1)
            variance = alpha**2 * c + sigma**2
            start = 0.5 * ((sigma**2 + (alpha * value) ** 2) / variance - 1 - np.log(sigma**2 / variance))
            np.testing.assert_allclose(terms + start / LOG2, -norm.logpdf(value, scale=c**0.5) / LOG2, rtol=1e-9)
            wide = 0.5 * (sigma**2 + (alpha * value) ** 2 - 1 - np.log(sigma**2))
            np.testing.assert_allclose(prior, [wide / LOG2], rtol=1e-9, atol=1e-14)


def test_in_single_precision_too():
    terms, prior = bound(jdiff.discrete(jdiff.betas.linear(1000)), 0.5, 0.4, 1000)
    np.testing.assert_allclose(terms + prior[0], -norm.logpdf(0.4, scale=0.5**0.5) / LOG2, rtol=1e-3)


@pytest.mark.parametrize("v", [0.0, 0.3, 1.0, "learned"])
def test_terms_are_the_divergences_of_two_gaussians(v):
    """Mean and variance of both sides from the betas alone, in NumPy, as Ho et al. eq. 7 states them."""
    T, rng = 50, np.random.default_rng(0)
    with jax.enable_x64(True):
        betas = jdiff.betas.cosine(T)
        bar = np.cumprod(1 - betas)
        k = np.array([2, 3, 10, 49])  # 1-based
        shape = (4, 3, 2)
        x0, eps, guess = rng.uniform(-1, 1, shape), rng.normal(size=shape), rng.normal(size=shape)
        extra = rng.uniform(-1, 1, shape)
        at = lambda a, i: a[i - 1][:, None, None]  # noqa: E731
        x = np.sqrt(at(bar, k)) * x0 + np.sqrt(1 - at(bar, k)) * eps
        beta, ab, before = at(betas, k), at(bar, k), at(bar, k - 1)
        mean = lambda x0: (np.sqrt(before) * beta * x0 + np.sqrt(1 - beta) * (1 - before) * x) / (1 - ab)  # noqa: E731
        small, large = beta * (1 - before) / (1 - ab), beta
        share = 0.5 * (extra + 1) if v == "learned" else v
        variance = np.exp(share * np.log(large) + (1 - share) * np.log(small))
        kl = 0.5 * (np.log(variance / small) + (small + (mean(x0) - mean(guess)) ** 2) / variance - 1)
        out = np.concatenate([guess, extra], -1) if v == "learned" else guess
        schedule = jdiff.discrete(betas)
        denoise = jdiff.denoiser(constant, out, schedule, jdiff.targets.X0(), learned_variance=v == "learned")
        fixed = {} if v == "learned" else dict(v=v)
        got = TERMS(denoise, schedule, x0, x, k / T, **fixed)
        np.testing.assert_allclose(got, kl.mean((1, 2)) / LOG2, rtol=1e-8)


def test_the_first_term_is_scipys_probability_of_a_bin():
    """And the 256 bins hold all probability."""
    T = 100
    with jax.enable_x64(True):
        betas = jdiff.betas.linear(T)
        schedule, levels = jdiff.discrete(betas), np.arange(256) / 127.5 - 1
        bar = np.cumprod(1 - betas)
        small = betas[1] * (1 - bar[0]) / (1 - bar[1])
        for guess, extra in ((0.1234, -1.0), (-0.98, 0.3), (0.9999, 1.0)):
            out = np.tile([guess, extra], (256, 1))
            denoise = jdiff.denoiser(constant, out, schedule, jdiff.targets.X0(), learned_variance=True)
            x0 = levels[:, None]
            got = np.asarray(TERMS(denoise, schedule, x0, x0, 1 / T))
            std = np.exp(0.25 * ((1 + extra) * np.log(betas[0]) + (1 - extra) * np.log(small)))
            edges = np.concatenate([[-np.inf], (levels[1:] + levels[:-1]) / 2, [np.inf]])
            p = np.diff(norm.cdf(edges, guess, std))
            np.testing.assert_allclose(2.0 ** -got[p > 1e-10], p[p > 1e-10], rtol=1e-5)
            np.testing.assert_allclose((2.0**-got).sum(), 1, rtol=1e-9)


def test_far_from_the_truth_the_first_term_is_finite_with_a_finite_gradient():
    """At the start of training x_0 is guessed a thousand standard deviations away."""
    schedule = jdiff.discrete(jdiff.betas.linear(1000))
    x0 = np.array([[0.3], [-1.0], [1.0]], np.float32)

    @jax.jit
    @jax.value_and_grad
    def term(out):
        denoise = jdiff.denoiser(constant, out, schedule, jdiff.targets.X0(), learned_variance=True)
        return losses.vlb_terms(denoise, schedule, x0, np.zeros_like(x0), 1e-3).sum()

    for guess in (-8.0, 0.3, 30.0):
        chex.assert_tree_all_finite(term(np.array([[guess, 0.5]] * 3, np.float32)))


def test_errors():
    x = np.zeros((2, 1), np.float32)
    for f in (lambda: losses.vlb_terms(lambda x, t: x, jdiff.VP(), x, x, 0.5), lambda: losses.vlb_prior(jdiff.VP(), x)):
        with pytest.raises(ValueError, match="VP has no steps"):
            f()
