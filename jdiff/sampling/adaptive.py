"""Sampling with adaptive steps, by diffrax: the probability-flow ODE or the reverse SDE, each sample at its pace."""

from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array
from jdiff.core.checks import check_floating
from jdiff.core.keys import each
from jdiff.process.clock import Schedule, time_of
from jdiff.process.prediction import Denoise, as_denoise
from jdiff.process.times import ends_of
from jdiff.sampling.flow import METHODS, Stretch, adaptive, check_has_flow, check_solve, solve, stretch, velocity


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
    check_floating("x", x)
    denoise = as_denoise(denoise, schedule)
    check_has_flow("sample_adaptive", denoise, x)
    if sde and key is None:
        raise ValueError("sample_adaptive: the reverse SDE draws noise: give a key, jax.random.key(seed)")
    t_min, t_max = ends_of("sample_adaptive", schedule, t_min, t_max)
    keys = None if key is None else each(key, x.shape[0])
    check_solve("sample_adaptive", method, adjoint, x, keys, denoise, schedule)
    along = stretch(schedule, t_max, t_min, x.dtype, by_log_snr=sde)

    def drift(clock, row, context):
        denoise, schedule, _ = context
        x_t = row.reshape(1, *x.shape[1:])
        return velocity(denoise, schedule, x_t, clock, along.by_log_snr, sde=sde).reshape(-1)

    equation = _reverse_sde(along, rtol, atol) if sde else adaptive(method, rtol, atol)
    flat = x.reshape(x.shape[0], -1)
    out = solve(denoise, schedule, flat, keys, drift, along, equation=equation, adjoint=adjoint, max_steps=max_steps)
    _, each_step, before = (None, 2, 1) if sde else METHODS[method]
    info = AdaptiveInfo(each_step * out.steps + before + 1, out.steps, out.rejected, out.success)
    return denoise(out.state.reshape(x.shape), t_min), info


def _reverse_sde(along: Stretch, rtol, atol):
    """The `equation` of the reverse SDE, whose noise is additive in log-SNR."""

    def equation(diffrax, drift, row, key):
        import lineax

        def diffusion(clock, y, context):
            _, schedule, _ = context
            g = schedule.sigma(time_of(schedule, clock))
            return lineax.DiagonalLinearOperator(jnp.full(y.shape, g.astype(y.dtype)))

        path = diffrax.VirtualBrownianTree(
            along.start, along.stop, 1e-4, jax.ShapeDtypeStruct(row.shape, row.dtype), key, diffrax.SpaceTimeLevyArea
        )
        # Foster 2020 and diffrax's advice: gentler control for rough paths
        control = diffrax.PIDController(rtol=rtol, atol=atol, pcoeff=0.1, icoeff=0.3, dtmin=2e-3, force_dtmin=True)
        return diffrax.MultiTerm(drift, diffrax.ControlTerm(diffusion, path)), diffrax.ShARK(), control

    return equation
