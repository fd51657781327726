"""The density of data under a diffusion model, by the probability-flow ODE, and the latents that it pairs with data.

Along the flow dx/dt = v(x, t) the density changes as d log p_t(x_t) / dt = -div v, so

    log p_{t_min}(x) = log p_{t_max}(x_T) + int_{t_min}^{t_max} div v(x_t, t) dt.
"""

import math
from collections.abc import Callable
from typing import NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, safe_sqrt, wide
from jdiff.core.checks import check_floating, check_is
from jdiff.core.keys import each
from jdiff.core.names import choose
from jdiff.core.pytrees import known
from jdiff.process.clock import Schedule
from jdiff.process.forward import moments_at
from jdiff.process.prediction import Denoise, as_denoise
from jdiff.process.times import ends_of
from jdiff.sampling.flow import (
    METHODS,
    Solved,
    adaptive,
    check_has_flow,
    check_solve,
    solve,
    stretch,
    time_on,
    velocity,
)

# laws with mean 0 and covariance 1, of which probes are drawn
PROBES = {"rademacher": jax.random.rademacher, "gaussian": jax.random.normal}
TRACES = {"hutchinson": "from probes", "exact": "from all D directions"}
AT_ONCE = 16  # directions of an exact trace that are in memory together


class LikelihoodInfo(NamedTuple):
    """What `log_likelihood` says beside log p, per sample.

    Attributes:
        latent: x at t_max, of the shape of x.
        stderr: the standard error of log p by the probes, (B,): 0 for an exact trace, nan for a single probe.
        nfe: evaluations of the velocity, (B,). Each of them takes as many directional derivatives as there are probes,
            or D of them for an exact trace.
        steps: steps taken, (B,).
        rejected: steps rejected, (B,).
        success: whether the integration arrived, (B,).
    """

    latent: Array
    stderr: Array
    nfe: Array
    steps: Array
    rejected: Array
    success: Array


class FlowInfo(NamedTuple):
    """Per sample, (B,): evaluations of the velocity, steps taken, steps rejected, whether it arrived."""

    nfe: Array
    steps: Array
    rejected: Array
    success: Array


def log_likelihood(
    denoise: Denoise | Callable,
    schedule: Schedule,
    x: Array,
    key=None,
    *,
    trace: str = "hutchinson",
    probes: int = 1,
    probe_law: str = "rademacher",
    t_min=None,
    t_max=None,
    mean=0.0,
    std=0.0,
    rtol=1e-5,
    atol=1e-5,
    method: str = "tsit5",
    adjoint: str = "checkpoint",
    max_steps: int = 4096,
) -> tuple[Array, LikelihoodInfo]:
    """log p(x) in nats, by the probability-flow ODE from t_min up to t_max, with adaptive steps of each sample's own.

    It is the density of the process at t_min, x being x_{t_min}. At t_max the density is that of `prior`,
    N(alpha mean, alpha^2 std^2 + sigma^2). The divergence of the flow is the trace of its Jacobian J. The exact trace
    takes one directional derivative an axis of x. Skilling's and Hutchinson's estimator takes E[v^T J v], in which the
    probes v have mean 0 and covariance 1. They are fixed over the solve: so the ODE is smooth, and log p is unbiased.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t]. The arrays in its `per_sample` fields follow the
            samples, as in `sample_adaptive`.
        schedule: the schedule of the process.
        x: data, (B, ...), floating. It is computed in float32 at least.
        key: one key, or (B,) of them, of which the probes are drawn; None for an exact trace.
        trace: "hutchinson" or "exact".
        probes: how many probes a sample has.
        probe_law: "rademacher" (each number 1 or -1) or "gaussian"; the former has less variance.
        t_min: the time of x; the schedule's own end if None.
        t_max: where the prior stands; the schedule's own end if None.
        mean: the mean of the data, as for `prior`: a number or an array of the shape of a sample. With the moments at 0
            log p is off by some 1e-3 nats a dimension, since at t_max the process still holds a little of the data.
        std: the standard deviation of the data, likewise.
        rtol: the relative error of a step, per sample.
        atol: the absolute error of a step, per sample: of x, and of log p per dimension.
        method: as for `sample_adaptive`.
        adjoint: as for `sample_adaptive`.
        max_steps: steps after which a sample gives up; its `success` is then False.

    Returns:
        (log p (B,), `LikelihoodInfo`). All arguments but numbers and arrays are static under jit.

    Raises:
        ValueError: for unknown names, times out of order or outside the schedule, x that is not finite, moments of
            another shape, probes without a key, and inside a `jax.shard_map` that has not check_vma=False.
        ImportError: without diffrax (the `adaptive` extra).

    Reference:
        Chen et al. 2018, arXiv:1806.07366, theorem 1; Grathwohl et al. 2018, arXiv:1810.01367, section 3.1; Song et al.
        2021, arXiv:2011.13456, appendix D.2.
    """
    choose("trace of log_likelihood", trace, TRACES)
    draw = choose("probe_law of log_likelihood", probe_law, PROBES)
    exact = trace == "exact"
    if not exact and key is None:
        raise ValueError('log_likelihood: probes are drawn: give a key, jax.random.key(seed), or trace="exact"')
    if not isinstance(probes, (int, np.integer)) or isinstance(probes, bool) or probes < 1:
        raise ValueError(f"log_likelihood: probes is how many a sample has, an integer from 1 on; got {probes!r}")
    x, lifted = _checked("log_likelihood", denoise, schedule, x)
    t_min, t_max = ends_of("log_likelihood", schedule, t_min, t_max)
    shape, D = x.shape[1:], math.prod(x.shape[1:])
    drawn = None if exact else _draw(draw, key, (len(x), int(probes), D), x.dtype)
    check_solve("log_likelihood", method, adjoint, x, drawn, lifted, schedule)
    along = stretch(schedule, t_min, t_max, x.dtype)

    def field(clock, state, context):
        """The derivatives of x and of log p a dimension, (D,) and (probes,)."""
        denoise, schedule, probes = context

        def drift(flat):
            return velocity(denoise, schedule, flat.reshape(1, *shape), clock, along.by_log_snr).reshape(-1)

        moved, push = jax.linearize(drift, state[0])
        return moved, (_exact_trace(push, D) if exact else jax.lax.map(lambda v: v @ push(v), probes)) / D

    rows = x.reshape(len(x), D), jnp.zeros((len(x), 1 if exact else int(probes)), x.dtype)
    out = solve(
        lifted, schedule, rows, drawn, field, along,
        equation=adaptive(method, rtol, atol, _norm), adjoint=adjoint, max_steps=max_steps,
    )  # fmt: skip
    latent, change = out.state[0].reshape(x.shape), D * out.state[1]
    # where alpha = 0 at t_max the clock of a table stops a little before
    at_end = _log_prior(schedule, latent, time_on(schedule, along.stop, along.by_log_snr), mean, std)
    log_p = at_end + change.mean(1)
    stderr = jnp.zeros_like(log_p) if exact else jnp.std(change, axis=1, ddof=1) / math.sqrt(probes)
    return log_p, LikelihoodInfo(latent, stderr, *_counts(out, method))


def encode(
    denoise: Denoise | Callable, schedule: Schedule, x: Array, *, t_min=None, t_max=None, rtol=1e-6, atol=1e-6,
    method: str = "tsit5", adjoint: str = "checkpoint", max_steps: int = 4096,
) -> tuple[Array, FlowInfo]:  # fmt: skip
    """Carry data along the probability flow, from t_min up to t_max: to the latent of which sampling would make it.

    `decode` is its inverse, up to the tolerances. On a fixed grid `invert` does the same with any solver.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the schedule of the process.
        x: data, x at t_min, (B, ...), floating.
        t_min: the time of x; the schedule's own end if None.
        t_max: the time of the latent; the schedule's own end if None.
        rtol: the relative error of a step, per sample.
        atol: the absolute error of a step, per sample.
        method: as for `sample_adaptive`.
        adjoint: as for `sample_adaptive`.
        max_steps: steps after which a sample gives up; its `success` is then False.

    Returns:
        (x at t_max (B, ...), `FlowInfo`).

    Raises:
        ValueError: as `log_likelihood` does.
        ImportError: without diffrax (the `adaptive` extra).

    Reference:
        Song et al. 2021, arXiv:2011.13456, section 4.3 and appendix D.4.
    """
    t_min, t_max = ends_of("encode", schedule, t_min, t_max)
    return _carry("encode", denoise, schedule, x, t_min, t_max, rtol, atol, method, adjoint, max_steps)


def decode(
    denoise: Denoise | Callable, schedule: Schedule, latent: Array, *, t_min=None, t_max=None, rtol=1e-6, atol=1e-6,
    method: str = "tsit5", adjoint: str = "checkpoint", max_steps: int = 4096,
) -> tuple[Array, FlowInfo]:  # fmt: skip
    """Carry latents along the probability flow, from t_max down to t_min: the inverse of `encode`.

    It ends at x_{t_min}. `sample_adaptive` denoises there, and returns E[x_0 | x_{t_min}].

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the schedule of the process.
        latent: x at t_max, (B, ...), floating.
        t_min: the time of the result; the schedule's own end if None.
        t_max: the time of the latent; the schedule's own end if None.
        rtol: the relative error of a step, per sample.
        atol: the absolute error of a step, per sample.
        method: as for `sample_adaptive`.
        adjoint: as for `sample_adaptive`.
        max_steps: steps after which a sample gives up; its `success` is then False.

    Returns:
        (x at t_min (B, ...), `FlowInfo`).

    Raises:
        ValueError: as `log_likelihood` does.
        ImportError: without diffrax (the `adaptive` extra).
    """
    t_min, t_max = ends_of("decode", schedule, t_min, t_max)
    return _carry("decode", denoise, schedule, latent, t_max, t_min, rtol, atol, method, adjoint, max_steps)


def _carry(verb, denoise, schedule, x, t_from, t_to, rtol, atol, method, adjoint, max_steps):
    x, denoise = _checked(verb, denoise, schedule, x)
    check_solve(verb, method, adjoint, x, denoise, schedule)
    along = stretch(schedule, t_from, t_to, x.dtype)

    def field(clock, row, context):
        denoise, schedule, _ = context
        return velocity(denoise, schedule, row[None], clock, along.by_log_snr)[0]

    equation = adaptive(method, rtol, atol)
    out = solve(denoise, schedule, x, None, field, along, equation=equation, adjoint=adjoint, max_steps=max_steps)
    return out.state, FlowInfo(*_counts(out, method))


def _checked(verb, denoise, schedule, x):
    """(x in float32 at least, the denoiser lifted), or an error in the name of `verb`."""
    check_is("x", x, (jax.Array, np.ndarray), "an array (B, ...)")
    check_floating("x", x)
    if not jnp.ndim(x):
        raise ValueError(f"{verb}: x is one number; expected a batch (B, ...)")
    if known(x) and not np.isfinite(np.asarray(x, np.float64)).all():
        raise ValueError(f"{verb}: x holds numbers that are not finite")
    denoise = as_denoise(denoise, schedule)
    check_has_flow(verb, denoise, x)
    return wide(jnp.asarray(x)), denoise


def _draw(law, key, shape, dtype):
    """Probes (B, probes, D), those of a sample by its own key."""
    return jax.vmap(lambda k: law(k, shape[1:], dtype))(each(key, shape[0]))


def _exact_trace(push, D):
    """tr J, (1,), from the directional derivatives along the axes, a few at once."""
    rows = jax.lax.map(lambda i: push(jax.nn.one_hot(i, D))[i], jnp.arange(D), batch_size=min(D, AT_ONCE))
    return rows.sum(keepdims=True)


def _norm(scaled):
    """The worst root mean square: the error of x and that of log p count alike, however many numbers x has."""
    return jnp.stack([safe_sqrt(jnp.mean(part**2)) for part in jax.tree.leaves(scaled) if part.size]).max()


def _log_prior(schedule, x, t, mean, std):
    """log N(x; alpha mean, alpha^2 std^2 + sigma^2), (B,)."""
    centre, scale = (a[None] for a in moments_at("log_likelihood", schedule, x.shape, t, mean, std, x.dtype))
    z = (x - centre) / scale
    return jnp.sum(-0.5 * z**2 - jnp.log(scale), axis=tuple(range(1, x.ndim))) - _LOG_2PI_HALF * math.prod(x.shape[1:])


_LOG_2PI_HALF = 0.5 * math.log(2 * math.pi)


def _counts(out: Solved, method):
    _, each_step, before = METHODS[method]
    return each_step * out.steps + before, out.steps, out.rejected, out.success
