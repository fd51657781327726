"""Times that are learnt: by gradients through the sampler."""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import optax
from jax import lax

from jdiff.core.arrays import Array
from jdiff.process.clock import Schedule, time_of
from jdiff.process.clock import log_snr as log_snr_of
from jdiff.process.times import LOWEST_LOG_SNR, check_times


def optimize(
    run: Callable[[Array], Array],
    schedule: Schedule,
    times: Array,
    truth: Array,
    *,
    steps: int = 200,
    learning_rate=0.05,
) -> tuple[Array, Array]:
    """Learn the times between the ends of a grid by gradients through the sampler.

    The loss is the mean of |run(times) - truth|^2. The log-SNR between the fixed ends is divided by a softmax, so the
    times descend whatever the gradient says. One `lax.scan` of Adam; the first loss is that of the `times` given:

        run = lambda times: jdiff.sample(solver, denoise, schedule, x, times)
        truth = run(jdiff.grid.log_snr(schedule, 200))
        times, losses = jdiff.grid.optimize(run, schedule, jdiff.grid.log_snr(schedule, 6), truth)

    Args:
        run: the sampler, times (N,) -> samples.
        schedule: the noise schedule.
        times: (N,), descending, where learning starts.
        truth: what a fine grid makes of the same noise (and, for a stochastic solver, of the same `BrownianTree`).
        steps: steps of Adam.
        learning_rate: of Adam, on the logits of the softmax.

    Returns:
        (times of the least loss seen (N,), losses (steps,)).

    Raises:
        ValueError: for bad times, and when run(times) and truth differ in shape.

    Reference:
        Watson et al. 2022, arXiv:2202.05830.
    """
    times = check_times(schedule, times)
    shape = jax.eval_shape(run, times).shape
    if shape != jnp.shape(truth):
        raise ValueError(f"grid.optimize: run(times) has shape {shape} but truth has {jnp.shape(truth)}")
    levels = log_snr_of(schedule, times)
    # below the lowest useful level nothing is learnt; the times given may begin lower all the same
    lowest = jnp.minimum(LOWEST_LOG_SNR, jnp.min(levels[1:], initial=jnp.inf) - 1)
    first, last = jnp.maximum(levels[0], lowest), levels[-1]
    levels = levels.at[0].set(first)
    adam = optax.adam(learning_rate)

    def build(logits):
        inner = first + (last - first) * jnp.cumsum(jax.nn.softmax(logits))[:-1]
        return jnp.concatenate([times[:1], time_of(schedule, inner).astype(times.dtype), times[-1:]])

    def loss(logits):
        return jnp.mean((run(build(logits)) - truth) ** 2)

    def improve(carry, _):
        logits, state, best, least = carry
        value, gradient = jax.value_and_grad(loss)(logits)
        better = value < least
        best, least = jnp.where(better, logits, best), jnp.where(better, value, least)
        with jax.numpy_dtype_promotion("standard"):  # optax's adam mixes dtypes
            updates, state = adam.update(gradient, state)
        return (logits + updates, state, best, least), value

    def learn(logits):
        infinite = jnp.full((), jnp.inf, jax.eval_shape(loss, logits).dtype)
        (_, _, best, _), losses = lax.scan(improve, (logits, adam.init(logits), logits, infinite), length=steps)
        return build(best), losses

    return jax.jit(learn)(jnp.log(jnp.diff(levels)))
