"""The denoising loss, once: DDPM, score matching, EDM and flow matching are choices of its keywords."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdiff.arrays import Array, check_same_shape, normal, split
from jdiff.conditioning import LogSNR
from jdiff.denoisers import run_network
from jdiff.forward import q_sample
from jdiff.levels import Uniform
from jdiff.schedules import Schedule
from jdiff.targets import Target, aim
from jdiff.weights import Flat


def denoising(
    apply: Callable,
    params: Any,
    key,
    data: Array,
    cond: Any = None,
    *,
    schedule: Schedule,
    target: Target,
    conditioning=LogSNR(),
    levels=Uniform(),
    weight=Flat(),
) -> tuple[Array, dict]:
    """(loss, aux):  loss = E_{t, eps} weight_t mean |F(x_t, t) - F*|^2, the mean over a sample's numbers.

    data: x_0 (B, ...), floating; `apply(params, x, label, cond) -> F`; t ~ levels; F* = a_t x_0 + b_t eps.
    `key`: one key, or a `BatchKey` for a slice of the global batch: row i draws by its global position.
    aux: `t` (B,) and `each` (B,), the weighted error of each sample. Raises ValueError if data is not floating or the
    network's output has not data's shape.
    """
    if not jnp.issubdtype(data.dtype, jnp.floating):
        raise ValueError(f"data has dtype {data.dtype}; expected floating numbers: scale images to [-1, 1] first")
    k_t, k_eps = split(key)
    t = levels(k_t, data.shape[0], schedule)
    eps = normal(k_eps, data.shape, data.dtype)
    x = q_sample(schedule, data, t, eps)
    out = run_network(apply, params, schedule, conditioning, x, t, cond)
    check_same_shape("the network's output", out, "its input", x)
    error = jnp.mean((out - aim(schedule, target, data, eps, t)) ** 2, axis=tuple(range(1, data.ndim)))
    each = weight(schedule, target, t).astype(error.dtype) * error
    return each.mean(), dict(t=t, each=each)
