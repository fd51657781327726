"""Symmetric systems of equations, one for each sample, by a fixed number of steps of conjugate gradients."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, safe_divide
from jdiff.core.pytrees import vary_as


class Solved(NamedTuple):
    """A solution, and how good it is.

    Attributes:
        x: (B, ...).
        residual: |b - K x| / |b| as the iteration knows it, (B,); 0 where b = 0.
    """

    x: Array
    residual: Array


def solve(K: Callable[[Array], Array], b: Array, iterations: int) -> Solved:
    """x with K x = b, from x = 0, for each row of b on its own.

    A row stops where it has arrived, and where K has no positive curvature along its direction: a network's Jacobian
    is not always that of a covariance, and a step there could go anywhere.

    Args:
        K: a linear map of arrays like b, symmetric and positive, that keeps rows apart.
        b: (B, ...).
        iterations: how many steps; as many as b has numbers in a row are exact.

    Returns:
        The solution.

    Reference:
        Hestenes & Stiefel 1952; Steihaug 1983, for the stop at negative curvature.
    """
    start = dots(b, b)
    enough = start * jnp.finfo(b.dtype).eps ** 2

    def step(carry, _):
        x, r, p, rr, going = carry
        Kp = K(p)
        curvature = dots(p, Kp)
        going = going & (curvature > 0) & (rr > enough)
        length = share(going, rr, curvature)
        x, r = x + rows(length, p) * p, r - rows(length, p) * Kp
        new = dots(r, r)
        p = r + rows(share(going, new, rr), p) * p
        return vary_as((x, r, p, new, going), carry), None

    going = jnp.ones_like(start, bool)
    first = vary_as((jnp.zeros_like(b), b, b, start, going), b, K(b))
    (x, _, _, rr, _), _ = jax.lax.scan(step, first, None, iterations)
    return Solved(x, jnp.sqrt(jax.lax.stop_gradient(safe_divide(rr, start))))


def share(where: Array, a: Array, b: Array) -> Array:
    """a / b, and 0 outside of `where`, with finite derivatives also where b is too small to be squared."""
    return jnp.where(where, a, 0) / jnp.where(where, b, 1)


def dots(a: Array, b: Array) -> Array:
    """The inner product of each row, (B,)."""
    return (a * b).reshape(len(a), -1).sum(1)


def rows(a: Array, like: Array) -> Array:
    """(B,) shaped to scale (B, ...)."""
    return a.reshape(a.shape + (1,) * (like.ndim - 1))
