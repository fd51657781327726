"""Loops over the steps: with bounded memory in reverse mode, and with a traced number of steps."""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.pytrees import vary_as


def checkpointed_scan(body, carry, xs, length: int):
    """`lax.scan` that keeps about sqrt(length) carries for reverse mode, and recomputes the rest as it goes back.

    Args:
        body: `body(carry, x) -> (carry, y)`.
        carry: the carry before the first step.
        xs: a tree of arrays with leading axis `length`.
        length: how many steps there are.

    Returns:
        (carry, ys), as `lax.scan` does.
    """
    body = jax.checkpoint(body, prevent_cse=False)
    chunk = _chunk(length)
    whole = length // chunk * chunk if chunk else 0
    if chunk <= 1:
        return lax.scan(body, carry, xs)

    inner = jax.checkpoint(lambda carry, xs: lax.scan(body, carry, xs), prevent_cse=False)
    chunks = jax.tree.map(lambda a: a[:whole].reshape(whole // chunk, chunk, *a.shape[1:]), xs)
    carry, ys = lax.scan(inner, carry, chunks)
    ys = jax.tree.map(lambda a: a.reshape(whole, *a.shape[2:]), ys)
    if whole == length:
        return carry, ys
    carry, rest = lax.scan(body, carry, jax.tree.map(lambda a: a[whole:], xs))
    return carry, jax.tree.map(lambda a, b: jnp.concatenate([a, b]), ys, rest)


def _chunk(length: int) -> int:
    """A chunk length near sqrt(length), a divisor if there is one: a remainder would compile the body once more."""
    root = math.isqrt(length)
    return next((d for d in range(root, root // 2, -1) if length % d == 0), root)


def dynamic_scan(body, carry, xs, *, length: int, count):
    """`lax.scan` over the first `count` of `length` steps, without reverse mode.

    Args:
        body: `body(carry, x) -> (carry, y)`.
        carry: the carry before the first step.
        xs: a tree of arrays with leading axis `length`.
        length: how many steps there are.
        count: how many of them are run, traced.

    Returns:
        (carry, ys); the rest of ys, beyond `count`, repeats the last.
    """

    def at(i):
        return jax.tree.map(lambda a: a[i], xs)

    def step(i, state):
        carry, ys = state
        carry, y = body(carry, at(i))
        return carry, jax.tree.map(lambda a, b: a.at[i].set(b), ys, y)

    shape = jax.eval_shape(lambda: body(carry, at(0))[1]) if length else None
    ys = vary_as(jax.tree.map(lambda a: jnp.zeros((length, *a.shape), a.dtype), shape), carry)
    carry, ys = lax.fori_loop(0, count, step, (carry, ys))
    index = jnp.minimum(jnp.arange(length), count - 1)
    return carry, jax.tree.map(lambda a: a[index], ys)
