"""Sampling: a solver over a grid, then one last denoise."""

from collections.abc import Callable
from typing import Any, Literal, overload

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

from jdiff.core.arrays import Array
from jdiff.core.checks import check_is
from jdiff.core.keys import noise_of_step, rows_of
from jdiff.core.pytrees import concrete, number, vary_as
from jdiff.process.clock import Schedule
from jdiff.process.memory import has_own_noise, memory_of, with_memory
from jdiff.process.prediction import Denoise, as_denoise
from jdiff.process.times import check_times
from jdiff.sampling.scans import checkpointed_scan, dynamic_scan
from jdiff.solvers.base import Now, RecallingSolver, Solver, check_plan, check_solver, mixes


@overload
def sample(
    solver: Solver,
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    times: Array,
    key: Any = None,
    *,
    n: Any = None,
    path: Literal[False] = False,
    checkpoint: bool = True,
    callback: Callable | None = None,
) -> Array: ...


@overload
def sample(
    solver: Solver,
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    times: Array,
    key: Any = None,
    *,
    n: Any = None,
    path: Literal[True],
    checkpoint: bool = True,
    callback: Callable | None = None,
) -> tuple[Array, Array]: ...


@overload
def sample(
    solver: Solver,
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    times: Array,
    key: Any = None,
    *,
    n: Any = None,
    path: bool,
    checkpoint: bool = True,
    callback: Callable | None = None,
) -> Array | tuple[Array, Array]: ...


def sample(
    solver: Solver,
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    times: Array,
    key: Any = None,
    *,
    n: Any = None,
    path: bool = False,
    checkpoint: bool = True,
    callback: Callable | None = None,
) -> Array | tuple[Array, Array]:
    """Run `solver` from x at times[0] down to times[n - 1], then denoise there.

    A solver of one evaluation a step calls the network n times, Heun 2n - 1 times, and nothing is special at sigma = 0.
    `jax.jit(jdiff.sample, static_argnames=("path", "checkpoint", "callback"))` compiles once for all numbers.

    Args:
        solver: one of `jdiff.solvers`, or any `Solver`.
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the schedule of the process.
        x: noise at times[0], (B, ...), floating: see `prior`.
        times: (N,), descending, with sigma > 0 at the last: see `grid`.
        key: one key, or (B,) of them; None for a deterministic solver. Sample i depends on its own key, or on key and
            i, alone, whatever the batch is. A `BrownianTree` gives every step count the noise of one path.
        n: how many of the times are used, N if None. It may be traced: one program for every n from 1 to N, without
            reverse mode; for any other n all results are nan.
        path: whether to return the states too.
        checkpoint: whether reverse mode keeps O(sqrt(N)) states and recomputes the others.
        callback: `callback(i, t, x, x0)`, called on the host after step i with the state x that was reached at t and
            the estimate of x_0 with which the step began, not always in order: see `progress`. It is static.

    Returns:
        E[x_0 | x_t] at the last time, (B, ...); with `path`, (x_0, xs), where xs (N - 1, B, ...) are the states at
        times[1:].

    Raises:
        ValueError: for times that do not descend or end at sigma = 0, a stochastic solver without a key, a step count
            outside the grid, shapes that disagree, and a denoiser that was made for another schedule.
    """
    check_solver("solver", solver)
    times = check_times(schedule, times)
    denoise = as_denoise(denoise, schedule)
    check_start(solver, denoise, x, times, key, n)
    keys = rows_of(key, x.shape[0])
    traced_n = n is not None and not concrete(n)
    if traced_n:
        valid = (n >= 1) & (n <= len(times))
        n = jnp.clip(n, 1, len(times))
    elif n is not None:
        times = times[: int(n)]
    last = times[n - 1] if traced_n else times[-1]
    plan = solver.plan(schedule, times, n if traced_n else len(times))
    check_plan(solver, plan, len(times) - 1)
    steps = Now(jnp.arange(len(times) - 1), times[:-1], times[1:], plan)

    def body(carry, now):
        x, state, memory = carry
        noise = noise_of_step(keys, now.i, now.t, now.s)
        shown, heard = with_memory(denoise, memory)
        x, state, prediction = solver.step(shown, schedule, x, now, state, noise)
        if callback is not None:
            jax.debug.callback(callback, now.i, now.s, x, prediction.x0)
        return vary_as((x, state, heard.memory), carry), (x if path else None)

    start = vary_as((x, solver.init(x), memory_of(denoise, x)), x, keys, solver, denoise, schedule, times)
    if traced_n:
        (x, state, memory), trace = dynamic_scan(body, start, steps, length=len(times) - 1, count=n - 1)
    elif checkpoint:
        (x, state, memory), trace = checkpointed_scan(body, start, steps, len(times) - 1)
    else:
        (x, state, memory), trace = lax.scan(body, start, steps)
    shown, _ = with_memory(denoise, memory)
    x0 = (solver.recall(shown, state) if isinstance(solver, RecallingSolver) else shown)(x, last)
    if traced_n:
        x0, trace = jax.tree.map(lambda a: jnp.where(valid, a, jnp.nan), (x0, trace))
    return (x0, trace) if path else x0


def invert(
    solver: Solver,
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    times: Array,
) -> Array:
    """Run `solver` upwards, from x at times[-1] to the noise at times[0] of which sampling would make it.

    The probability-flow ODE backwards in time; with `DDIM()` it is DDIM inversion. Sampling from the result with the
    same solver and times returns x up to the solver's error.

    Args:
        solver: a deterministic solver.
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the schedule of the process.
        x: the state at times[-1], (B, ...), floating.
        times: (N,), descending, as for `sample`.

    Returns:
        The state at times[0], (B, ...).

    Raises:
        ValueError: for a stochastic solver, and as `sample` does.

    Reference:
        Song et al. 2021, arXiv:2010.02502, section 5.4; Mokady et al. 2022, arXiv:2211.09794.
    """
    check_solver("solver", solver)
    times = check_times(schedule, times)
    if solver.stochastic:
        raise ValueError(f"{type(solver).__name__} draws noise and has no inverse; use DDIM(0), Heun, DPMpp2M, ...")
    denoise = as_denoise(denoise, schedule)
    check_start(solver, denoise, x, times, None)
    up = times[::-1]
    plan = solver.plan(schedule, up, len(up))
    check_plan(solver, plan, len(up) - 1)
    steps = Now(jnp.arange(len(up) - 1), up[:-1], up[1:], plan)

    def body(carry, now):
        x, state, memory = carry
        shown, heard = with_memory(denoise, memory)
        x, state, _ = solver.step(shown, schedule, x, now, state, None)
        return vary_as((x, state, heard.memory), carry), None

    start = vary_as((x, solver.init(x), memory_of(denoise, x)), x, solver, denoise, schedule, times)
    return checkpointed_scan(body, start, steps, len(up) - 1)[0][0]


def check_start(solver: Solver, denoise: Denoise, x: Array, times: Array, key, n=None) -> None:
    """Raise ValueError for an x that is no noise (B, ...), a step count outside the grid, or a key that is missing.

    Also for a denoiser with an eps of its own, and a solver that would use its x_0 alone or its eps alone.
    """
    check_is("x", x, (jax.Array, np.ndarray), "noise, an array (B, ...): see jdiff.prior")
    if not x.ndim or not jnp.issubdtype(x.dtype, jnp.floating):
        raise ValueError(f"x is {x.dtype}{x.shape}; expected floating noise (B, ...): see jdiff.prior")
    count = number(n)  # True and "3" are none
    whole = isinstance(count, float) and count.is_integer() and 1 <= count <= len(times)
    if n is not None and concrete(n) and not whole:
        raise ValueError(f"n = {n} steps through a grid of {len(times)} times; expected 1 <= n <= {len(times)}")
    if key is None and solver.stochastic:
        raise ValueError(f"{type(solver).__name__} draws noise: give a key, jax.random.key(seed)")
    if has_own_noise(denoise) and not mixes(solver):
        raise ValueError(
            f"{type(solver).__name__} would lose a half of CFG++, the guided x_0 or the unconditional eps; "
            "use DDIM, DDPM, Euler, EulerAncestral or EulerMaruyama"
        )
