"""Exponential moving averages of parameters: an average that starts at the parameters, and laws of its decay.

A law is a function of the step, `decay(step) -> float`, the weight that the old average keeps.
"""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.arrays import Array


def update(ema: Any, params: Any, keep) -> Any:
    """keep * ema + (1 - keep) * params, leaf by leaf, in the dtype of `ema`; exact where the two agree."""

    def leaf(old, new):
        new = jnp.asarray(new, old.dtype)
        return new + jnp.asarray(keep, old.dtype) * (old - new)

    return jax.tree.map(leaf, ema, params)


def constant(decay: float) -> Callable[[Array], Array]:
    """The same decay at every step.  Raises ValueError outside [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay must be in [0, 1), got {decay}")
    return lambda step: jnp.asarray(decay, jnp.float32)


def half_life(images: float, batch: int, ramp: float | None = 0.05) -> Callable[[Array], Array]:
    """Half of what was known `images` images ago: decay = 2^(-batch / min(images, ramp * images seen)).

    Independent of the batch size; the ramp keeps the memory short at first. Karras et al. 2022, arXiv:2206.00364,
    appendix F. Raises ValueError for non-positive arguments.
    """
    if images <= 0 or batch <= 0 or (ramp is not None and ramp <= 0):
        raise ValueError(f"ema: half-life {images}, batch {batch} and ramp {ramp} must be positive")

    def decay(step):
        seen = jnp.asarray(step + 1, jnp.float32) * batch
        memory = images if ramp is None else jnp.minimum(images, ramp * seen)
        return jnp.exp2(-batch / memory)

    return decay


def warmup(max_decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 2 / 3) -> Callable[[Array], Array]:
    """min(max_decay, 1 - (1 + step / inv_gamma)^-power): the average over a growing window.

    With power 1 and inv_gamma 1, the plain mean of all parameters so far, until max_decay. Raises ValueError for a
    max_decay outside [0, 1), and where inv_gamma or power is not positive.
    """
    if not 0 <= max_decay < 1 or inv_gamma <= 0 or power <= 0:
        raise ValueError(
            f"ema: max_decay must be in [0, 1), inv_gamma and power positive; got {max_decay}, {inv_gamma}, {power}"
        )
    return lambda step: jnp.minimum(max_decay, 1 - (1 + jnp.asarray(step, jnp.float32) / inv_gamma) ** -power)
