"""Sampling in parallel over time: the whole path guessed at once, and corrected by Picard iteration until it is one."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, expand
from jdiff.core.keys import noise_of_step, rows_of
from jdiff.core.pytrees import noun, vary_as
from jdiff.process.clock import Schedule
from jdiff.process.forward import fresh_noise
from jdiff.process.memory import has_memory
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.process.times import check_times
from jdiff.sampling.loop import check_start
from jdiff.solvers.base import Now, Solver, check_plan, check_solver


class ParallelInfo(NamedTuple):
    """What a parallel run took: sweeps (calls of the network one after the other) and evaluations (of all kinds)."""

    sweeps: Array
    evaluations: Array


def sample_parallel(
    solver: Solver,
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    times: Array,
    key=None,
    *,
    window: int | None = None,
    tol=1e-3,
    max_sweeps: int | None = None,
    std=0.5,
    sharding=None,
) -> tuple[Array, ParallelInfo]:
    """What `sample` returns, in fewer calls of the network one after the other; for solvers without memory.

    A sweep takes all steps of a window at once, phi_j(x_j), on `window` times the batch, and sets x_{j+1} <- phi_j(x_j)
    + a_j (x_j new - x_j), where a_j is phi_j' for data of variance std^2. The window then moves up to the first state
    that changed by more, in root mean square, than `tol` times the noise that DDPM adds in its step, and by one step at
    least: `window=1` is `sample` itself.

    Args:
        solver: a solver without memory, as DDIM or Heun.
        denoise: as for `sample`.
        schedule: as for `sample`.
        x: as for `sample`.
        times: as for `sample`.
        key: as for `sample`.
        window: how many steps at once, all if None.
        tol: the change that counts as none, as a share of DDPM's noise.
        max_sweeps: at least steps / max_sweeps are accepted in a sweep, converged or not; None for no limit.
        std: the standard deviation of the data. It changes the number of sweeps, not what they tend to.
        sharding: of arrays (window, B, ...); `NamedSharding(mesh, P("window"))` spreads the window over devices.

    Returns:
        (x_0 (B, ...), `ParallelInfo`). There is no reverse mode. Under `jax.jit`, window, max_sweeps and sharding are
        static. Inside `jax.shard_map` each device sweeps until its own rows have settled.

    Raises:
        ValueError: for solvers with memory, for windows that do not fit, and as `sample` does.

    Reference:
        Shih et al. 2023, arXiv:2305.16317, algorithm 1, where a_j is 1; for ancestral sampling ours takes 2/3 of the
        sweeps.
    """
    check_solver("solver", solver)
    times = check_times(schedule, times)
    denoise = as_denoise(denoise, schedule)
    length = len(times) - 1
    check_start(solver, denoise, x, times, key)
    if has_memory(denoise, x):
        raise ValueError("sample_parallel: this denoiser remembers earlier steps, as APG with momentum; use sample")
    width = _check(solver, x, length, window, max_sweeps)
    if not length:
        return denoise(x, times[-1]), ParallelInfo(jnp.zeros((), int), jnp.ones((), int))
    least = 1 if max_sweeps is None else -(-length // max_sweeps)
    keys = rows_of(key, x.shape[0])
    plan = solver.plan(schedule, times, len(times))
    check_plan(solver, plan, length)
    steps = Now(jnp.arange(length), times[:-1], times[1:], plan)
    slopes = _slopes(solver, schedule, steps, std)
    spread = jnp.sqrt((schedule.alpha(times) * std) ** 2 + schedule.sigma(times) ** 2)
    allowed = tol * schedule.sigma(times[1:]) * jnp.sqrt(fresh_noise(schedule, times[:-1], times[1:]))

    def advance(x, now):
        return solver.step(denoise, schedule, x, now, (), noise_of_step(keys, now.i, now.t, now.s))[0]

    def sweep(carry):
        start, states, sweeps = carry
        i = start + jnp.arange(width)
        real, i = i < length, jnp.minimum(i, length - 1)  # past the last step nothing moves
        before, after = states[:-1], states[1:]
        if sharding is not None:
            before = lax.with_sharding_constraint(before, sharding)
        moved = jax.vmap(advance)(before, jax.tree.map(lambda a: a[i], steps))
        moved = jnp.where(expand(real, x[None]).astype(bool), moved, before)
        slope = expand(jnp.where(real, slopes[i], 1), before)
        change = _linear_recurrence(slope, moved - after)
        carried = jnp.concatenate([jnp.zeros_like(change[:1]), change[:-1]])
        new = moved + slope * carried
        error = _norm(change)
        rounding = 8 * jnp.finfo(x.dtype).eps * _norm(new)
        settled = ~real | (error <= jnp.maximum(expand(allowed[i], error), rounding)).all(1)
        stride = 1 + jnp.cumprod(settled.astype(int)).sum()
        stride = jnp.minimum(jnp.clip(stride, least, width), length - start)
        states = jnp.concatenate([states[:1], new])
        source = jnp.minimum(stride + jnp.arange(width + 1), width)
        goal = jnp.minimum(start + stride + jnp.arange(width + 1), length)
        grow = spread[goal] / spread[jnp.minimum(start + source, length)]
        return vary_as((start + stride, states[source] * expand(grow, states), sweeps + 1), carry)

    states = x[None] * expand((spread / spread[0])[: width + 1], x[None])
    start = vary_as((jnp.zeros((), int), states, jnp.zeros((), int)), x, keys, solver, denoise, schedule, times)
    _, states, sweeps = lax.while_loop(lambda carry: carry[0] < length, sweep, start)
    calls = _calls(solver, denoise, schedule, x, steps, keys)
    return denoise(states[0], times[-1]), ParallelInfo(sweeps, sweeps * width * calls + 1)


def _norm(a):
    """Root mean square of each sample: (W, B, ...) -> (W, B)."""
    return jnp.sqrt(jnp.mean(a**2, axis=tuple(range(2, a.ndim))))


def _linear_recurrence(slope, residual):
    """e_{j+1} = slope_j e_j + residual_j with e_0 = 0, along the first axis, in a logarithm of its length."""
    join = lambda a, b: (a[0] * b[0], a[1] * b[0] + b[1])  # noqa: E731
    return lax.associative_scan(join, (jnp.broadcast_to(slope, residual.shape), residual))[1]


@noun
class _Gaussian(Denoise):
    """The exact denoiser of N(0, std^2)."""

    schedule: Schedule
    std: Array

    def predict(self, x, t):
        alpha, sigma = self.schedule.alpha(t), self.schedule.sigma(t)
        scale = x / ((alpha * self.std) ** 2 + sigma**2)
        return Prediction(alpha * self.std**2 * scale, sigma * scale, jnp.zeros_like(x))


def _slopes(solver, schedule, steps, std):
    """d x_s / d x_t of each step for data of N(0, std^2): 0 or more, and finite."""
    keys = jax.random.split(jax.random.key(0), 1)
    oracle = _Gaussian(schedule, std)

    def slope(now):
        def end(x):
            return solver.step(oracle, schedule, x, now, (), noise_of_step(keys, now.i, now.t, now.s))[0]

        one = jnp.ones((1, 1), now.t.dtype)
        return jax.jvp(end, (one,), (one,))[1][0, 0]

    return jnp.maximum(jnp.nan_to_num(jax.vmap(slope)(steps), nan=1.0, posinf=1.0, neginf=0.0), 0)


def _calls(solver, denoise, schedule, x, steps, keys) -> int:
    """How often a step calls the denoiser, counted while it is traced."""
    count = 0

    def counted(x, t):
        nonlocal count
        count += 1
        return denoise(x, t)

    now = jax.tree.map(lambda a: a[0], steps)
    jax.eval_shape(
        lambda: solver.step(
            as_denoise(counted, schedule), schedule, x, now, (), noise_of_step(keys, now.i, now.t, now.s)
        )
    )
    return count


def _check(solver, x, length, window, max_sweeps) -> int:
    """The width of the window, after the checks of what only `sample_parallel` asks."""
    name = type(solver).__name__
    if jax.tree.leaves(jax.eval_shape(solver.init, x)):
        raise ValueError(f"sample_parallel: {name} remembers earlier steps; give a solver without memory, DDIM or Heun")
    if window is not None and window < 1:
        raise ValueError(f"sample_parallel: window must be 1 step or more, got {window}")
    width = max(min(length if window is None else window, length), 1)
    if max_sweeps is not None and (max_sweeps < 1 or max_sweeps * width < length):
        raise ValueError(
            f"sample_parallel: {max_sweeps} sweeps of a window of {width} cannot cover {length} steps; "
            f"give max_sweeps >= {-(-length // width)}"
        )
    return width
