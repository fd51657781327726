"""The probability flow by diffrax, each sample with steps of its own: what samples, encodes and measures densities."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, expand
from jdiff.core.extras import needs
from jdiff.core.names import choose
from jdiff.core.pytrees import row_axes, varying
from jdiff.process.clock import Schedule, log_snr, time_of
from jdiff.process.memory import has_memory, has_own_noise
from jdiff.process.prediction import Denoise
from jdiff.process.sde import derivative

# diffrax's class; evaluations of a step; further ones before the first
METHODS = {
    "tsit5": ("Tsit5", 6, 1),
    "dopri5": ("Dopri5", 6, 1),
    "dopri8": ("Dopri8", 13, 1),
    "bosh3": ("Bosh3", 3, 1),
    "heun": ("Heun", 2, 0),
    "kvaerno3": ("Kvaerno3", 3, 0),
    "kvaerno5": ("Kvaerno5", 6, 0),
}
ADJOINTS = {
    "checkpoint": lambda diffrax: diffrax.RecursiveCheckpointAdjoint(),
    "backsolve": lambda diffrax: diffrax.BacksolveAdjoint(),
    "forward": lambda diffrax: diffrax.ForwardMode(),
}
CLOCK_START = -14.0  # where a clock in log-SNR starts if alpha = 0 there: alpha / sigma = 1e-3


class Stretch(NamedTuple):
    """A stretch of the path, by the clock in which it is integrated: the log-SNR, or -t."""

    start: Array
    stop: Array
    by_log_snr: bool

    @property
    def first_step(self):
        """At high noise x hardly moves in log-SNR, and diffrax's guess from that would step over everything."""
        return (self.stop - self.start) / 50 if self.by_log_snr else None


class Solved(NamedTuple):
    """What `solve` found, with a row for each sample."""

    state: Any
    steps: Array
    rejected: Array
    success: Array


def stretch(schedule: Schedule, t_from: Array, t_to: Array, dtype, *, by_log_snr: bool = False) -> Stretch:
    """The stretch from `t_from` to `t_to`. On a schedule with kinks its clock is the log-SNR, in which it has none."""
    if by_log_snr or schedule.has_kinks:
        ends = [jnp.maximum(log_snr(schedule, t), CLOCK_START) for t in (t_from, t_to)]
        return Stretch(ends[0].astype(dtype), ends[1].astype(dtype), True)
    return Stretch((-t_from).astype(dtype), (-t_to).astype(dtype), False)  # a clock that rises as noise falls


def time_on(schedule: Schedule, clock: Array, by_log_snr: bool) -> Array:
    """The t of a clock."""
    return time_of(schedule, clock) if by_log_snr else -clock


def velocity(denoise: Denoise, schedule: Schedule, x: Array, clock: Array, by_log_snr: bool, *, sde: bool = False):
    """dx/dclock of the probability flow, of the shape of x (B, ...); with `sde`, the drift of the reverse SDE."""
    t, speeds = _place(schedule, clock, by_log_snr)
    x0, eps, _ = denoise.predict(x, t)
    of_x0, of_eps = (expand(speed, x) for speed in speeds)
    if sde:  # in log-SNR g is sigma: half of g^2 score more than the flow
        of_eps = of_eps - 0.5 * expand(schedule.sigma(t), x)
    return of_x0 * x0 + of_eps * eps


def _place(schedule, clock, by_log_snr):
    """t, and the derivatives of alpha and sigma by the clock."""
    one = jnp.ones_like(clock)
    if schedule.has_kinks:  # in log-SNR the path has no kinks: alpha^2 = scale^2 sigmoid(log-SNR)

        def on_the_clock(c):
            t = time_of(schedule, c)
            scale = jnp.hypot(schedule.alpha(t), schedule.sigma(t))
            return scale * jnp.sqrt(jax.nn.sigmoid(c)), scale * jnp.sqrt(jax.nn.sigmoid(-c))

        return time_of(schedule, clock), jax.jvp(on_the_clock, (clock,), (one,))[1]
    t = time_on(schedule, clock, by_log_snr)
    speed = derivative(lambda c: time_of(schedule, c), clock) if by_log_snr else -one
    return t, tuple(derivative(f, t) * speed for f in (schedule.alpha, schedule.sigma))


def solve(
    denoise: Denoise,
    schedule: Schedule,
    rows,
    extra,
    field: Callable,
    along: Stretch,
    *,
    equation: Callable,
    adjoint: str,
    max_steps: int,
) -> Solved:
    """Integrate each row of `rows` by itself.

    Args:
        denoise: a denoiser, whose `per_sample` rows follow those of `rows`.
        schedule: the schedule of the process.
        rows: the initial state, a pytree of arrays (B, ...).
        extra: what belongs to a row and does not move, as keys and probes: a pytree of arrays (B, ...), or None.
        field: `field(clock, row, (denoise, schedule, extra))`, the derivative of a row by the clock.
        along: where to integrate.
        equation: `equation(diffrax, term, row, extra) -> (terms, solver, step control)`.
        adjoint: one of `ADJOINTS`.
        max_steps: steps after which a row gives up.
    """
    diffrax = load_diffrax()

    def one(row, extra, context):
        terms, solver, control = equation(diffrax, diffrax.ODETerm(field), row, extra)
        out = diffrax.diffeqsolve(
            terms, solver, along.start, along.stop, along.first_step, row, (*context, extra),
            stepsize_controller=control, adjoint=ADJOINTS[adjoint](diffrax), max_steps=max_steps, throw=False,
        )  # fmt: skip
        stats, arrived = out.stats, out.result == diffrax.RESULTS.successful
        return jax.tree.map(lambda a: a[0], out.ys), stats["num_steps"], stats["num_rejected_steps"], arrived

    axes = row_axes(denoise, len(jax.tree.leaves(rows)[0]))  # each sample must meet its own label
    alone = jax.tree.map(lambda leaf, axis: leaf[:, None] if axis == 0 else leaf, denoise, axes)
    return Solved(*jax.vmap(one, (0, 0, (axes, None)))(rows, extra, (alone, schedule)))


def adaptive(method: str, rtol, atol, norm: Callable | None = None) -> Callable:
    """The `equation` of an ODE: a method of `METHODS`, with steps from the error that it estimates."""

    def equation(diffrax, term, row, extra):
        control = diffrax.PIDController(rtol=rtol, atol=atol, **({} if norm is None else {"norm": norm}))
        return term, getattr(diffrax, METHODS[method][0])(), control

    return equation


def check_solve(verb: str, method: str, adjoint: str, *arrays) -> None:
    """Raise for what `solve` cannot do, in the name of `verb`: unknown names, and a `jax.shard_map` that checks."""
    load_diffrax(verb)
    choose(f"method of {verb}", method, METHODS)
    choose(f"adjoint of {verb}", adjoint, ADJOINTS)
    if varying(arrays):
        raise ValueError(
            f"{verb}: diffrax's loops fail jax.shard_map's check of what varies over the mesh; "
            "make the shard_map with check_vma=False, or give jax.jit an x that is sharded"
        )


def check_has_flow(verb: str, denoise: Denoise, x: Array) -> None:
    """Raise ValueError, in the name of `verb`, for a denoiser of which no ODE can be made."""
    if has_own_noise(denoise) or has_memory(denoise, x):
        raise ValueError(
            f"{verb}: CFG++ has no ODE, nor have denoisers with a memory, as APG with momentum; use sample"
        )


def load_diffrax(verb: str = "sample_adaptive"):
    """diffrax; MissingExtra, in the name of `verb`, where it is not installed."""
    with needs(f"jdiff.{verb} needs", "adaptive"):
        import diffrax
    return diffrax
