"""Bits per dimension of images: whole numbers as continuous data, and the constant between density and probability."""

import math
from numbers import Real

import jax
import jax.numpy as jnp
from jax.scipy.special import logsumexp

from jdiff.core.arrays import Array
from jdiff.core.keys import each


def dequantize(key, images: Array, levels: int = 256, *, centred: bool = False) -> Array:
    """Spread each whole number over its bin, uniformly: continuous data whose density bounds the number's probability.

    With z uniform in [0, 1) it is 2 (u + z) / levels - 1, which fills [-1, 1]; centred, it is
    2 (u + z - 1/2) / (levels - 1) - 1, whose bins have the numbers 2 u / (levels - 1) - 1 in their middle. On these,
    `x / 127.5 - 1`, the models of jdiff's data are trained.

    Args:
        key: one key, or (B,) of them.
        images: u, (B, ...), integers in [0, levels).
        levels: how many values u can have.
        centred: which of the two it is.

    Returns:
        (B, ...), float32.

    Raises:
        ValueError: for images that are not integers.

    Reference:
        Uria et al. 2013, arXiv:1306.0186, section 5.1; Theis et al. 2015, arXiv:1511.01844, section 3.1.
    """
    images = jnp.asarray(images)
    if not jnp.issubdtype(images.dtype, jnp.integer) or not images.ndim:
        raise ValueError(
            f"dequantize: images are {images.dtype}{images.shape}; expected integers (B, ...), from 0 to levels - 1"
        )
    z = jax.vmap(lambda k: jax.random.uniform(k, images.shape[1:]))(each(key, len(images)))
    u = images.astype(z.dtype)
    return 2 * (u + z - 0.5) / (levels - 1) - 1 if centred else 2 * (u + z) / levels - 1


def bits_per_dim(log_prob: Array, shape, levels: int | None = 256, *, centred: bool = False) -> Array:
    """-log2 of the probability of an image, over its size D:  -log p / (D log 2) + log2(levels / 2).

    A bin is 2 / levels wide, in which p is a density: so much its logarithm has to be moved. The constant is 7 for 256
    levels; it is log2((levels - 1) / 2) = 6.994 for centred bins.

    Args:
        log_prob: log p in nats, of any shape.
        shape: of one sample, (H, W, C), or (D,).
        levels: how many values a number of the data can have; None if log_prob is that of a probability already.
        centred: as it was for `dequantize`.

    Returns:
        Bits per dimension, of the shape of log_prob.

    Raises:
        ValueError: for a shape or a number of levels that can be none.

    >>> float(bits_per_dim(-2 * math.log(2), (2,)))  # uniform on [-1, 1]^2: each of 256 levels is worth 8 bits
    8.0
    """
    sizes = (shape,) if isinstance(shape, Real) else tuple(shape)
    D = math.prod(sizes)
    if not sizes or D < 1 or any(size != int(size) for size in sizes):
        raise ValueError(f"bits_per_dim: shape is {shape}; expected the sizes of one sample, as (32, 32, 3)")
    if levels is not None and levels < 2:
        raise ValueError(f"bits_per_dim: levels is {levels}; expected how many values a number can have, 2 or more")
    bins = 0.0 if levels is None else math.log2((levels - 1 if centred else levels) / 2)
    return -jnp.asarray(log_prob) / (D * math.log(2)) + bins


def many_draws(log_probs: Array) -> Array:
    """log of the mean of p over several dequantisations of one image: log (1/K) sum_k p(x + z_k).

    Its mean over draws is a lower bound of log P(image) plus the constant of the bins, as that of one draw is. It rises
    to that as K grows.

    Args:
        log_probs: log p of K draws, (K, ...).

    Returns:
        The bound, (...).

    Reference:
        Burda et al. 2015, arXiv:1509.00519, theorem 1; Ho et al. 2019, arXiv:1902.00275, section 3.1.
    """
    log_probs = jnp.asarray(log_probs)
    return logsumexp(log_probs, axis=0) - math.log(len(log_probs))
