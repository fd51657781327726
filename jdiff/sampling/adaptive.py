"""Sampling with adaptive steps, by diffrax: the probability-flow ODE or the reverse SDE, each sample at its pace."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, expand
from jdiff.core.checks import check_floating
from jdiff.core.extras import needs
from jdiff.core.keys import each
from jdiff.core.names import choose
from jdiff.core.pytrees import row_axes, varying
from jdiff.process.clock import Schedule, log_snr, time_of
from jdiff.process.memory import has_memory, has_own_noise
from jdiff.process.prediction import Denoise, as_denoise
from jdiff.process.sde import derivative
from jdiff.process.times import ends_of

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


class AdaptiveInfo(NamedTuple):
    """Per sample, (B,): network evaluations with the last denoise, steps taken, steps rejected, whether it arrived.

    Implicit methods solve for their stages: there `nfe` counts stages, each of which takes several evaluations.
    """

    nfe: Array
    steps: Array
    rejected: Array
    success: Array


def sample_adaptive(
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    key=None,
    *,
    t_max=None,
    t_min=None,
    rtol=1e-3,
    atol=1e-3,
    method: str = "tsit5",
    sde: bool = False,
    adjoint: str = "checkpoint",
    max_steps: int = 4096,
):
    """Integrate from noise at t_max down to t_min with adaptive steps, then denoise.

    dx/dt = alpha' x_0 + sigma' eps, with the step of each sample chosen from its own error against rtol and atol. On a
    schedule with kinks, as a table, the clock is the log-SNR, in which the path has none. With `sde` it is the reverse
    SDE, in log-SNR, by ShARK on a virtual Brownian path per sample.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t]. The arrays in its `per_sample` fields, as labels and
            weights (B,), follow the samples; a plain function may hold no such rows.
        schedule: the schedule of the process.
        x: noise at t_max, (B, ...), floating.
        key: for the SDE, one key or (B,) of them.
        t_max: where to start; the schedule's own end if None.
        t_min: where to stop; the schedule's own end if None.
        rtol: the relative error of a step, per sample.
        atol: the absolute error of a step, per sample.
        method: tsit5, dopri5, dopri8, bosh3 or heun; kvaerno3 or kvaerno5 for stiff problems. Unused with `sde`.
        sde: whether to integrate the reverse SDE.
        adjoint: "checkpoint" (reverse mode, exact, memory by recursive checkpoints), "backsolve" (the continuous
            adjoint, constant memory) or "forward" (jvp).
        max_steps: steps after which a sample gives up; its `success` is then False.

    Returns:
        (x_0 (B, ...), `AdaptiveInfo`). All arguments but numbers and arrays are static under jit.

    Raises:
        ValueError: for unknown names, times out of order or outside the schedule, rows of another batch, `sde` without
            a key, and inside a `jax.shard_map` that has not check_vma=False.
        ImportError: without diffrax (the `adaptive` extra).

    Reference:
        Song et al. 2021, arXiv:2011.13456, section 4.3; Kidger 2021, arXiv:2202.02435 (diffrax).
    """
    diffrax = _diffrax()
    choose("method of sample_adaptive", method, METHODS)
    choose("adjoint of sample_adaptive", adjoint, ADJOINTS)
    check_floating("x", x)
    denoise = as_denoise(denoise, schedule)
    if has_own_noise(denoise) or has_memory(denoise, x):
        raise ValueError(
            "sample_adaptive: CFG++ has no ODE, nor have denoisers with a memory, as APG with momentum; use sample"
        )
    if sde and key is None:
        raise ValueError("sample_adaptive: the reverse SDE draws noise: give a key, jax.random.key(seed)")
    t_min, t_max = ends_of("sample_adaptive", schedule, t_min, t_max)
    by_log_snr = sde or schedule.has_kinks
    if by_log_snr:
        start, stop = jnp.maximum(log_snr(schedule, t_max), CLOCK_START), log_snr(schedule, t_min)
    else:
        start, stop = -t_max, -t_min  # a clock that rises
    start, stop = start.astype(x.dtype), stop.astype(x.dtype)
    # at high noise x hardly moves in log-SNR, and a guess from that would step over everything
    first = (stop - start) / 50 if by_log_snr else None
    keys = None if key is None else each(key, x.shape[0])
    if varying(x, keys, denoise, schedule):
        raise ValueError(
            "sample_adaptive: diffrax's loops fail jax.shard_map's check of what varies over the mesh; "
            "make the shard_map with check_vma=False, or give jax.jit an x that is sharded"
        )

    def place(clock, schedule):
        """t, and the derivatives of alpha and sigma by the clock."""
        one = (jnp.ones_like(clock),)
        if schedule.has_kinks:  # in log-SNR the path has no kinks: alpha^2 = scale^2 sigmoid(log-SNR)

            def on_the_clock(c):
                t = time_of(schedule, c)
                scale = jnp.hypot(schedule.alpha(t), schedule.sigma(t))
                return scale * jnp.sqrt(jax.nn.sigmoid(c)), scale * jnp.sqrt(jax.nn.sigmoid(-c))

            return time_of(schedule, clock), jax.jvp(on_the_clock, (clock,), one)[1]
        t = time_of(schedule, clock) if by_log_snr else -clock
        speed = jax.jvp(lambda c: time_of(schedule, c), (clock,), one)[1] if by_log_snr else -one[0]
        return t, tuple(derivative(f, t) * speed for f in (schedule.alpha, schedule.sigma))

    def drift(clock, y, context):
        denoise, schedule = context
        t, speeds = place(clock, schedule)
        y = y.reshape(1, *x.shape[1:])
        x0, eps, _ = denoise.predict(y, t)
        of_x0, of_eps = (expand(speed, y) for speed in speeds)
        if sde:  # in log-SNR g is sigma: half of g^2 score more than the flow
            of_eps = of_eps - 0.5 * expand(schedule.sigma(t), y)
        return (of_x0 * x0 + of_eps * eps).reshape(-1)

    def one(row, key, context):
        terms, solver = diffrax.ODETerm(drift), getattr(diffrax, METHODS[method][0])()
        control = diffrax.PIDController(rtol=rtol, atol=atol)
        if sde:
            terms, solver, control = _stochastic(diffrax, terms, row, key, start, stop, rtol, atol)
        out = diffrax.diffeqsolve(
            terms, solver, start, stop, first, row.reshape(-1), context,
            stepsize_controller=control, adjoint=ADJOINTS[adjoint](diffrax), max_steps=max_steps, throw=False,
        )  # fmt: skip
        stats, arrived = out.stats, out.result == diffrax.RESULTS.successful
        return out.ys[0].reshape(row.shape), stats["num_steps"], stats["num_rejected_steps"], arrived

    axes = row_axes(denoise, x.shape[0])  # each sample must meet its own label
    rows = jax.tree.map(lambda leaf, axis: leaf[:, None] if axis == 0 else leaf, denoise, axes)
    y, steps, rejected, arrived = jax.vmap(one, (0, None if keys is None else 0, (axes, None)))(
        x, keys, (rows, schedule)
    )
    _, each_step, before = (None, 2, 1) if sde else METHODS[method]
    info = AdaptiveInfo(each_step * steps + before + 1, steps, rejected, arrived)
    return denoise(y, t_min), info


def _diffrax():
    with needs("jdiff.sample_adaptive needs", "adaptive"):
        import diffrax
    return diffrax


def _stochastic(diffrax, drift, row, key, start, stop, rtol, atol):
    """(terms, solver, controller) of the reverse SDE of one sample, whose noise is additive in this clock."""
    import lineax

    def diffusion(clock, y, context):
        _, schedule = context
        g = schedule.sigma(time_of(schedule, clock))
        return lineax.DiagonalLinearOperator(jnp.full(y.shape, g.astype(y.dtype)))

    path = diffrax.VirtualBrownianTree(
        start, stop, 1e-4, jax.ShapeDtypeStruct((row.size,), row.dtype), key, diffrax.SpaceTimeLevyArea
    )
    # Foster 2020 and diffrax's advice: gentler control for rough paths
    control = diffrax.PIDController(rtol=rtol, atol=atol, pcoeff=0.1, icoeff=0.3, dtmin=2e-3, force_dtmin=True)
    return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path)), diffrax.ShARK(), control
