"""The variational bound: tight for exact denoisers, below log p for others; the mean and the error of its draws."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULES, Diagonal, mixture, one_of
from scipy.stats import norm

import jdiff
from jdiff import losses
from jdiff.losses.bound import Law


@functools.cache
def bound():
    """`jax.jit(jdiff.variational_bound)` as its users jit it."""
    return jax.jit(jdiff.variational_bound, static_argnames=("samples", "bins"))


@pytest.mark.parametrize("name", SCHEDULES)
def test_the_exact_denoiser_of_a_gaussian_reaches_log_p(name):
    """In continuous time nothing is left of the bound: each sample's is log p(x_0) of the data, to its own error."""
    schedule, x0 = one_of(name), np.array([[0.3, -0.9], [1.2, 0.1], [-2.0, 0.4]], np.float32)
    settings = dict(sigma_data=0.4**0.5, mean=0.3, std=0.4**0.5)
    log_p, info = bound()(Diagonal(schedule), schedule, x0, jax.random.key(0), samples=20_000, bins=None, **settings)
    exact = norm.logpdf(x0, 0.3, 0.4**0.5).sum(1)
    assert (np.abs(log_p - exact) < 4 * info.stderr).all() and (info.stderr < 0.15).all(), (log_p, exact, info)
    np.testing.assert_allclose(log_p, -(info.prior + info.diffusion + info.reconstruction), rtol=1e-5)


def test_of_a_mixture_it_bounds_and_is_close():
    """Over data: at most the mean of log p, for the exact denoiser nearly that; and less for a wrong one."""
    schedule, data = jdiff.VP(), mixture()
    x0 = data.sample(jax.random.key(0), 400)
    mean, C = data.moments()
    settings = dict(samples=256, bins=None, sigma_data=0.8, mean=mean, std=jnp.sqrt(jnp.diag(C)))
    truth = data.log_prob(jdiff.Flow(), x0, jnp.float32(1e-5)).mean()

    def gap(data):
        found, info = bound()(data.denoise(schedule), schedule, x0, jax.random.key(1), **settings)
        return float(truth - found.mean()), float(jnp.sqrt((info.stderr**2).sum()) / 400)

    exact, error = gap(data)
    assert abs(exact) < 4 * error < 0.05
    wrong, error = gap(data.replace(means=data.means + 0.3))
    assert wrong > 0.05 + 4 * error


@pytest.mark.parametrize("T", [1, 2, 50])
def test_of_a_table_its_mean_is_the_sum_of_all_terms(T):
    """By draws of the knots, against `vlb_terms` of every knot."""
    schedule = jdiff.discrete(np.array([0.4]) if T == 1 else jdiff.betas.linear(T, 0.02, min(0.9, 12 / T)))
    x0 = jnp.array([[0.3, -0.9], [-1.0, 1.0]])
    denoise, v = Diagonal(schedule, 0.1, 0.3), 0.3
    found, info = bound()(denoise, schedule, x0, jax.random.key(0), samples=2000, v=v, std=1.0)

    @jax.jit
    def all_terms(key):
        def one(k, key):
            t, eps = k / T, jax.random.normal(key, (500, *x0.shape))
            x_t = jax.vmap(lambda e: jdiff.q_sample(schedule, x0, t, e))(eps)
            return jax.vmap(lambda x: losses.vlb_terms(denoise, schedule, x0, x, t, v=v))(x_t).mean(0)

        return jax.lax.map(lambda a: one(*a), (jnp.arange(1, T + 1), jax.random.split(key, T)))

    terms = 2 * np.log(2) * np.asarray(all_terms(jax.random.key(1)))
    prior = 2 * np.log(2) * losses.vlb_prior(schedule, x0)
    np.testing.assert_allclose(info.prior, prior, rtol=1e-4, atol=1e-6)
    np.testing.assert_allclose(info.reconstruction, terms[0], rtol=0.1)
    np.testing.assert_allclose(info.diffusion, terms[1:].sum(0), rtol=0.1)
    assert (np.abs(-found - prior - terms.sum(0)) < 5 * info.stderr + 0.02 * terms.sum(0)).all()


def test_the_standard_error_is_the_spread_over_keys():
    """At most, since the draws are stratified; and the mean does not depend on how they are spread."""
    schedule, keys = jdiff.Cosine(), jax.random.split(jax.random.key(0), 3000)
    x0 = jnp.tile(jnp.array([[0.5, -0.5]]), (3000, 1))
    found, info = bound()(Diagonal(schedule), schedule, x0, keys, samples=8, bins=None, sigma_data=0.5)
    spread, stated = float(found.std()), float(jnp.sqrt((info.stderr**2).mean()))
    assert 0.3 * stated < spread < 1.05 * stated
    other, _ = bound()(Diagonal(schedule), schedule, x0, keys, samples=8, bins=None, sigma_data=2.0)
    assert abs(float(other.mean() - found.mean())) < 4 * np.hypot(spread, float(other.std())) / np.sqrt(3000)
    _, one = bound()(Diagonal(schedule), schedule, x0[:1], keys[:1], samples=1)
    assert jnp.isnan(one.stderr).all()


def test_bins_hold_what_the_density_says():
    """Where bins are fine beside the law, their probability is the density times their width."""
    schedule, x0 = jdiff.VP(), jnp.array([[0.2, -0.4]])
    (many, info), (none, _) = (
        bound()(Diagonal(schedule), schedule, x0, jax.random.key(0), samples=3000, bins=bins) for bins in (4097, None)
    )
    assert (np.abs(many - none - 2 * np.log(2 / 4096)) < 3 * info.stderr).all() and (info.stderr < 0.1).all()


def test_the_law_of_levels():
    """Quantiles of the mass: by SciPy's integral of the density."""
    law, u = Law(-1.0, -9.0, 11.0), np.array([0.001, 0.2, 0.5, 0.999])
    from scipy.integrate import quad

    def density(x):
        return 1 / (1 + np.exp(1.0 - x))

    whole = quad(density, -9, 11)[0]
    for share, lam in zip(u, np.asarray(law.quantile(u)), strict=True):
        np.testing.assert_allclose(quad(density, -9, float(lam))[0] / whole, share, rtol=1e-4)
    chex.assert_trees_all_close(law.quantile(np.array([0.0, 1.0])), jnp.array([-9.0, 11.0]), atol=1e-3)
