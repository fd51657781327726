"""Exponential moving averages of parameters: how an average is updated, and laws of its decay.

An average starts at the parameters. A law is a function `decay(step) -> number`: the share that the average keeps of
its past in that step.
"""

import math
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, wide


def update(ema: Any, params: Any, keep) -> Any:
    """The average one step later: keep * ema + (1 - keep) * params, leaf by leaf, exact where the two agree.

    It is computed and returned in the dtype of `ema`, and in float32 at least: in bfloat16 a decay of 0.999 is 1, and
    the average would stay where it began. Leaves that are not floating are copied from `params`, because integers have
    no average.

    Args:
        ema: the average so far, a tree.
        params: the new parameters, a tree of the same structure.
        keep: the share of the old average, a number in [0, 1).
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
    """The same decay at every step.

    Raises:
        ValueError: the decay is outside [0, 1).
    """
    if not 0 <= decay < 1:
        raise ValueError(f"ema: decay must be in [0, 1), got {decay}")
    return lambda step: jnp.asarray(decay, float)


def half_life(images: float, batch: int, ramp: float | None = 0.05) -> Callable[[Array], Array]:
    """A law that forgets half in `images` images: decay = 2^(-batch / min(images, ramp * images so far)).

    The average does not depend on the size of the batch. The ramp keeps the memory short at first.

    Args:
        images: the half-life, in images.
        batch: the images of a step.
        ramp: the half-life is at most this share of the images so far; None for no ramp.

    Raises:
        ValueError: an argument is not positive.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, appendix F.
    """
    if images <= 0 or batch <= 0 or (ramp is not None and ramp <= 0):
        raise ValueError(f"ema: half-life {images}, batch {batch} and ramp {ramp} must be positive")

    def decay(step):
        images_so_far = jnp.asarray(step + 1, float) * batch
        memory = images if ramp is None else jnp.minimum(images, ramp * images_so_far)
        return jnp.exp2(-batch / memory)

    return decay


def warmup(max_decay: float = 0.9999, inv_gamma: float = 1.0, power: float = 2 / 3) -> Callable[[Array], Array]:
    """A law of a growing window: decay = min(max_decay, 1 - (1 + step / inv_gamma)^-power).

    With power 1 and inv_gamma 1 the average is the plain mean of all parameters so far, until max_decay is reached.

    Args:
        max_decay: the largest decay, in [0, 1).
        inv_gamma: the number of steps after which the window begins to grow.
        power: how fast it grows.

    Raises:
        ValueError: max_decay is outside [0, 1), or another argument is not positive.
    """
    if not 0 <= max_decay < 1 or inv_gamma <= 0 or power <= 0:
        raise ValueError(
            f"ema: max_decay must be in [0, 1), inv_gamma and power positive; got {max_decay}, {inv_gamma}, {power}"
        )
    return lambda step: jnp.minimum(max_decay, 1 - (1 + jnp.asarray(step, float) / inv_gamma) ** -power)


def power(sigma_rel: float) -> Callable[[Array], Array]:
    """The law `power_gamma` whose profile has the standard deviation `sigma_rel`, as a share of the run so far.

    EDM2 uses 0.05 and 0.1.

    Raises:
        ValueError: sigma_rel is outside (0, 0.3002].
    """
    return power_gamma(gamma_of(sigma_rel))


def power_gamma(gamma: float) -> Callable[[Array], Array]:
    """A law whose average weighs the parameters of step tau by tau^gamma: decay = (1 - 1/t)^(gamma + 1), t = step + 1.

    The weight of the parameters of step tau is the integral over [tau - 1, tau] of the profile
    (gamma + 1) tau^gamma / t^(gamma + 1). Its mean is t (gamma + 1) / (gamma + 2), so the window grows with the run and
    the start is forgotten.

    Raises:
        ValueError: gamma is not above -1.

    Reference:
        Karras et al. 2024, arXiv:2312.02696, section 3.1 and eq. 127.
    """
    if not -1 < gamma < math.inf:
        raise ValueError(f"ema: gamma must be above -1, got {gamma}")
    # by log1p: in float32, 1 - 1/t has lost 1/t after some 100,000 steps
    return lambda step: jnp.exp((gamma + 1) * jnp.log1p(-1 / (jnp.asarray(step, float) + 1)))


def sigma_rel_of(gamma: float) -> float:
    """The standard deviation of the power profile over its length: sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2).

    >>> round(sigma_rel_of(6.94), 3)
    0.1

    Raises:
        ValueError: gamma is not above -1.

    Reference:
        arXiv:2312.02696 eq. 123.
    """
    if not -1 < gamma < math.inf:
        raise ValueError(f"ema: gamma must be above -1, got {gamma}")
    return math.sqrt((gamma + 1) / (gamma + 3)) / (gamma + 2)


def gamma_of(sigma_rel: float) -> float:
    """The exponent of the power profile with that relative standard deviation.

    It is the largest root g of sigma_rel^2 (g + 2)^2 (g + 3) = g + 1.

    >>> round(gamma_of(0.05), 2), round(gamma_of(0.1), 2)
    (16.97, 6.94)

    Raises:
        ValueError: sigma_rel is outside (0, 0.3002], since no profile is wider.

    Reference:
        arXiv:2312.02696 eq. 126.
    """
    if not 0 < sigma_rel <= 0.3002:
        raise ValueError(f"ema: sigma_rel must be in (0, 0.3002], the width of a profile over the run; got {sigma_rel}")
    precision = sigma_rel**-2
    # x = g + 7/3 solves x^3 - p x + q = 0, which has three real roots: Viete's cosine
    p, q = precision + 1 / 3, 4 * precision / 3 + 2 / 27
    radius = 2 * math.sqrt(p / 3)
    return radius * math.cos(math.acos(-3 * q / (p * radius)) / 3) - 7 / 3
