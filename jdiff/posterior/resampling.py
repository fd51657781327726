"""Resampling: which particle each particle continues, so that the number of copies is n times the weight on average.

Each function takes (key, log_weights, n): log weights (N,) that need not be normalised, and how many of the first
indices are drawn, N if None. n may be traced; the indices beyond it mean nothing.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array
from jdiff.core.keys import as_key


class Resampling(Protocol):
    """What `smc` asks of a way to resample."""

    def __call__(self, key, log_weights: Array, n=None) -> Array:
        """Indices, (N,) integers, of the particles that go on."""
        ...


def systematic(key, log_weights: Array, n=None) -> Array:
    """One uniform number for all: the points (i + u) / n. The least variance of the four, as a rule.

    >>> import jax, jax.numpy as jnp
    >>> systematic(jax.random.key(0), jnp.log(jnp.array([0.5, 0.0, 0.25, 0.25]))).tolist()
    [0, 0, 2, 3]

    Args:
        key: one key.
        log_weights: (N,).
        n: how many are drawn.

    Returns:
        Indices, (N,), in order.

    Reference:
        Kitagawa 1996; Douc & Cappé 2005, arXiv:cs/0507025, section 2.4.
    """
    u = jax.random.uniform(as_key(key), (), log_weights.dtype)
    return _at(log_weights, (jnp.arange(len(log_weights)) + u) / _count(log_weights, n))


def stratified(key, log_weights: Array, n=None) -> Array:
    """A uniform number in each of n strata: the points (i + u_i) / n.

    Args:
        key: one key.
        log_weights: (N,).
        n: how many are drawn.

    Returns:
        Indices, (N,), in order.

    Reference:
        Douc & Cappé 2005, arXiv:cs/0507025, section 2.3.
    """
    u = jax.random.uniform(as_key(key), log_weights.shape, log_weights.dtype)
    return _at(log_weights, (jnp.arange(len(log_weights)) + u) / _count(log_weights, n))


def multinomial(key, log_weights: Array, n=None) -> Array:
    """Independent draws, in the order in which they were drawn.

    Args:
        key: one key.
        log_weights: (N,).
        n: how many are drawn; it changes nothing.

    Returns:
        Indices, (N,).

    Reference:
        Gordon et al. 1993; Douc & Cappé 2005, arXiv:cs/0507025, section 2.1.
    """
    return _at(log_weights, jax.random.uniform(as_key(key), log_weights.shape, log_weights.dtype))


def residual(key, log_weights: Array, n=None) -> Array:
    """floor(n w) copies of each particle for certain, and independent draws by what is left of the weights.

    Args:
        key: one key.
        log_weights: (N,).
        n: how many are drawn.

    Returns:
        Indices, (N,): first the copies in order, then the draws.

    Reference:
        Liu & Chen 1998; Douc & Cappé 2005, arXiv:cs/0507025, section 2.2.
    """
    expected = _count(log_weights, n) * jax.nn.softmax(log_weights)
    certain = jnp.floor(expected)
    ends, i = jnp.cumsum(certain), jnp.arange(len(log_weights))
    copies = jnp.searchsorted(ends, i.astype(ends.dtype), side="right")
    draws = multinomial(key, jnp.log(expected - certain))
    return jnp.where(i < ends[-1], copies, draws).astype(draws.dtype)


def _count(log_weights, n):
    return jnp.asarray(len(log_weights) if n is None else n, log_weights.dtype)


def _at(log_weights, points):
    """The particle on whose stretch of the cumulative weights each point in [0, 1) lies; never one of weight 0."""
    ends = jnp.cumsum(jax.nn.softmax(log_weights))
    ends = ends / ends[-1]  # rounding ends the sum beside 1
    below_one = 1 - jnp.finfo(points.dtype).epsneg
    return jnp.searchsorted(ends, jnp.minimum(points, below_one).astype(ends.dtype), side="right")
