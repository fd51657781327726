"""Exponential moving averages of parameters: an average that starts at the parameters, and laws of its decay.

A law is a function of the step, `decay(step) -> float`, the weight that the old average keeps.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, wide


def update(ema: Any, params: Any, keep) -> Any:
    """keep * ema + (1 - keep) * params, leaf by leaf; exact where the two agree.

    In the dtype of `ema`, but computed and returned in float32 at least: in bfloat16 a decay of 0.999 is 1, and the
    average would stay where it began. Leaves that are not floating are those of `params`: an average of integers is
    none.
    """

    def leaf(old, new):
        if not jnp.issubdtype(jnp.result_type(new), jnp.inexact):
            return new
        old, kind = wide(old), jnp.finfo(jnp.result_type(new))
        new = jnp.asarray(new, old.dtype)
        if kind.bits < 32:  # or XLA averages what the parameters were before they were rounded
            new = lax.reduce_precision(new, kind.nexp, kind.nmant)
        return new + jnp.asarray(keep, old.dtype) * (old - new)

    return jax.tree.map(leaf, ema, params)


def constant(decay: float) -> Callable[[Array], Array]:
    """The same decay at every step.  Raises ValueError outside [0, 1)."""
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay must be in [0, 1), got {decay}")
    return lambda step: jnp.asarray(decay, float)


def half_life(images: float, batch: int, ramp: float | None = 0.05) -> Callable[[Array], Array]:
    """Half of what was known `images` images ago: decay = 2^(-batch / min(images, ramp * images seen)).

    Independent of the batch size; the ramp keeps the memory short at first. Karras et al. 2022, arXiv:2206.00364,
    appendix F. Raises ValueError for non-positive arguments.
    """
    if images <= 0 or batch <= 0 or (ramp is not None and ramp <= 0):
        raise ValueError(f"ema: half-life {images}, batch {batch} and ramp {ramp} must be positive")

    def decay(step):
        seen = jnp.asarray(step + 1, float) * batch
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
    return lambda step: jnp.minimum(max_decay, 1 - (1 + jnp.asarray(step, float) / inv_gamma) ** -power)


def power(sigma_rel: float) -> Callable[[Array], Array]:
    """`power_gamma` of the profile whose standard deviation is `sigma_rel` of the run so far, as in EDM2: 0.05, 0.1.

    Raises ValueError as `gamma_of` does.
    """
    return power_gamma(gamma_of(sigma_rel))


def power_gamma(gamma: float) -> Callable[[Array], Array]:
    """decay = (1 - 1/t)^(gamma + 1) at t = step + 1: the average weighs the parameters of step tau by tau^gamma.

    The weight of parameters tau is that of [tau - 1, tau] under (gamma + 1) tau^gamma / t^(gamma + 1), of mean
    t (gamma + 1) / (gamma + 2): it grows with the run, and forgets the start. Karras et al. 2024, arXiv:2312.02696,
    section 3.1 and eq. 127. Raises ValueError unless gamma > -1.
    """
    if not -1 < gamma < math.inf:
        raise ValueError(f"ema: gamma must be above -1, got {gamma}")
    # by log1p: in float32, 1 - 1/t has lost 1/t after some 100,000 steps
    return lambda step: jnp.exp((gamma + 1) * jnp.log1p(-1 / (jnp.asarray(step, float) + 1)))


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of the power profile over its length: sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2).

    arXiv:2312.02696 eq. 123. Raises ValueError unless gamma > -1.
    """
    if not -1 < gamma < math.inf:
        raise ValueError(f"ema: gamma must be above -1, got {gamma}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent with that relative standard deviation: the largest root of sigma^2 (g + 2)^2 (g + 3) = g + 1.

    0.05 -> 16.97, 0.10 -> 6.94. arXiv:2312.02696 eq. 126. Raises ValueError outside (0, 0.3002]: none is wider.
    """
    if not 0 < sigma_rel <= 0.3002:
        raise ValueError(f"ema: sigma_rel must be in (0, 0.3002], the width of a profile over the run; got {sigma_rel}")
    precision = sigma_rel**-2
    # x = g + 7/3 solves x^3 - p x + q = 0, which has three real roots: Viete's cosine
    p, q = precision + 1 / 3, 4 * precision / 3 + 2 / 27
    radius = 2 * math.sqrt(p / 3)
    return radius * math.cos(math.acos(-3 * q / (p * radius)) / 3) - 7 / 3
