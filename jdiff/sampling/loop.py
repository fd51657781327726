"""Sampling: a solver over a grid, then one last denoise."""

import math
from collections.abc import Callable

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array
from jdiff.core.keys import noise_of_step, rows_of
from jdiff.core.pytrees import concrete, number, vary_as
from jdiff.process.clock import Schedule
from jdiff.process.prediction import Denoise, as_denoise
from jdiff.process.times import check_times
from jdiff.solvers.base import Now, RecallingSolver, Solver


def sample(
    solver: Solver,
    denoise: Denoise,
    schedule: Schedule,
    x: Array,
    times: Array,
    key=None,
    *,
    n=None,
    path: bool = False,
    checkpoint: bool = True,
    callback: Callable | None = None,
):
    """Run `solver` from x at times[0] down to times[n - 1], then denoise there: E[x_0 | x_t] at the last time.

    x: (B, ...), noise at times[0] (see `prior`); times: (N,), descending, with sigma(times[-1]) > 0, and n = N if None.
    So a one-evaluation solver calls the network n times, Heun 2n - 1 times, and nothing is special at sigma = 0.
    `key`: one key, or (B,) of them; sample i depends on its own key (or on key and i) alone, whatever the batch is. A
    `jdiff.BrownianTree` of either gives every step count the noise of one path.
    `n` may be traced: one program for every n from 1 to N, without reverse mode; for any other n all results are nan.
    `path=True` returns (x_0, xs) with xs (N - 1, B, ...) the states at times[1:]. With `checkpoint`, reverse mode keeps
    O(sqrt(N)) states.
    `callback(i, t, x, x0)`, if given, is called on the host after step i with the state x reached at t and the estimate
    of x_0 with which the step began, not always in order (see `jdiff.progress`); it is static.

    `jax.jit(jdiff.sample, static_argnames=("path", "checkpoint", "callback"))` compiles once for all numbers. Raises
    ValueError for times that do not descend or end at sigma = 0, a stochastic solver without a key, and shapes that
    disagree.
    """
    times = check_times(schedule, times)
    denoise = as_denoise(denoise, schedule)
    check_start(solver, x, times, key, n)
    keys = rows_of(key, x.shape[0])
    traced_n = n is not None and not concrete(n)
    if traced_n:
        valid = (n >= 1) & (n <= len(times))
        n = jnp.clip(n, 1, len(times))
    elif n is not None:
        times = times[: int(n)]
    last = times[n - 1] if traced_n else times[-1]
    plan = solver.plan(schedule, times, n if traced_n else len(times))
    steps = Now(jnp.arange(len(times) - 1), times[:-1], times[1:], plan)

    def body(carry, now):
        noise = noise_of_step(keys, now.i, now.t, now.s)
        x, state, prediction = solver.step(denoise, schedule, carry[0], now, carry[1], noise)
        if callback is not None:
            jax.debug.callback(callback, now.i, now.s, x, prediction.x0)
        return vary_as((x, state), carry), (x if path else None)

    start = vary_as((x, solver.init(x)), x, keys, solver, denoise, schedule, times)
    if traced_n:
        (x, state), trace = _dynamic_scan(body, start, steps, len(times) - 1, n - 1)
    elif checkpoint:
        (x, state), trace = _checkpointed_scan(body, start, steps, len(times) - 1)
    else:
        (x, state), trace = lax.scan(body, start, steps)
    x0 = (solver.recall(denoise, state) if isinstance(solver, RecallingSolver) else denoise)(x, last)
    if traced_n:
        x0, trace = jax.tree.map(lambda a: jnp.where(valid, a, jnp.nan), (x0, trace))
    return (x0, trace) if path else x0


def invert(solver: Solver, denoise: Denoise, schedule: Schedule, x: Array, times: Array) -> Array:
    """Run `solver` upwards, from x at times[-1] to the noise at times[0] of which sampling would make it, (B, ...).

    The probability-flow ODE backwards in time: with `DDIM()` it is DDIM inversion (Song et al. 2021, arXiv:2010.02502,
    section 5.4; Mokady et al. 2022, arXiv:2211.09794). `times` descend, as for `sample`, whose steps this undoes up to
    the solver's error. Raises ValueError for a stochastic solver, and as `sample` does.
    """
    times = check_times(schedule, times)
    if solver.stochastic:
        raise ValueError(f"{type(solver).__name__} draws noise and has no inverse; use DDIM(0), Heun, DPMpp2M, ...")
    denoise = as_denoise(denoise, schedule)
    check_start(solver, x, times, None)
    up = times[::-1]
    steps = Now(jnp.arange(len(up) - 1), up[:-1], up[1:], solver.plan(schedule, up, len(up)))

    def body(carry, now):
        x, state, _ = solver.step(denoise, schedule, carry[0], now, carry[1], None)
        return vary_as((x, state), carry), None

    start = vary_as((x, solver.init(x)), x, solver, denoise, schedule, times)
    return _checkpointed_scan(body, start, steps, len(up) - 1)[0][0]


def check_start(solver: Solver, x: Array, times: Array, key, n=None) -> None:
    """Raise ValueError for an x that is no noise (B, ...), a step count outside the grid, or a key that is missing."""
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}{x.shape}; expected floating noise (B, ...): see jdiff.prior")
    count = number(n)
    if isinstance(count, float) and not (count.is_integer() and 1 <= count <= len(times)):
        raise ValueError(f"n = {n} steps through a grid of {len(times)} times; expected 1 <= n <= {len(times)}")
    if key is None and solver.stochastic:
        raise ValueError(f"{type(solver).__name__} draws noise: give a key, jax.random.key(seed)")


def _checkpointed_scan(body, carry, xs, length):
    """`lax.scan` that keeps about sqrt(length) carries for reverse mode, and recomputes the rest as it goes back."""
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


def _dynamic_scan(body, carry, xs, length, count):
    """`lax.scan` over the first `count` of `length` steps, count traced; the rest of the outputs repeats the last."""

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
