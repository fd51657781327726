"""The inverse of a monotone function, by bisection, with the derivative of the implicit function."""

import functools

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array
from jdiff.core.pytrees import vary_as


@functools.partial(jax.custom_jvp, nondiff_argnums=(0,))
def bisect(f, params, value) -> Array:
    """The t in [0, 1] with f(params, t) = value, elementwise.

    Plain bisection has derivative 0. This one has that of the implicit function,
    dt = (dvalue - d_params f) / (df / dt), so `f` must be differentiable by JAX.

    Args:
        f: `f(params, t)` of the shape of t, falling as t rises.
        params: a pytree of what f depends on beside t.
        value: an array of any shape.

    Returns:
        t, of the shape of value; an end of [0, 1] where f does not reach the value.
    """
    return bisected(lambda t: f(params, t) < value, value, params)


@bisect.defjvp
def _bisect_jvp(f, primals, tangents):
    params, value = primals
    d_params, d_value = tangents
    t = bisect(f, params, value)
    slope = jax.jvp(lambda t: f(params, t), (t,), (jnp.ones_like(t),))[1]
    moved = jax.jvp(lambda params: f(params, t), (params,), (d_params,))[1]
    return t, (d_value - moved) / slope


def bisected(is_past, like, *others) -> Array:
    """The t in [0, 1] at which `is_past(t)` turns from False to True, elementwise; no derivative.

    Args:
        is_past: a function of t, of the shape of `like`, to booleans.
        like: an array of the shape and dtype of the result.
        others: arrays that `is_past` reads: inside a shard_map the loop must vary as they do.
    """

    def halve(_, ends):
        low, high = ends
        middle = 0.5 * (low + high)
        past = is_past(middle)
        return jnp.where(past, low, middle), jnp.where(past, middle, high)

    steps = jnp.finfo(like.dtype).nmant + 7  # down to half a unit in the last place of t = 2^-7
    ends = vary_as((jnp.zeros_like(like), jnp.ones_like(like)), like, *others)
    low, high = lax.fori_loop(0, steps, halve, ends)
    return 0.5 * (low + high)
