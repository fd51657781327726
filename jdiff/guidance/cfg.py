"""Classifier-free guidance."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, as_time, expand
from jdiff.core.checks import check_per_sample
from jdiff.core.pytrees import known, noun, number, per_sample
from jdiff.process.clock import Schedule
from jdiff.process.prediction import Denoise, Prediction, as_denoises


@noun
class Guided(Denoise):
    """The extrapolation from an unconditional denoiser through a conditional one."""

    conditional: Denoise
    unconditional: Denoise
    w: Any = per_sample()

    def check(self):
        object.__setattr__(self, "w", number(self.w))
        if not callable(self.w) and known(self.w):
            value = np.asarray(self.w)
            if not jnp.issubdtype(value.dtype, np.number) or not np.isfinite(value).all():
                raise ValueError(f"w must be finite: a number, one a sample (B,), or a function of t; got {self.w!r}")

    @property
    def schedule(self) -> Schedule:
        return self.conditional.schedule

    def predict(self, x: Array, t) -> Prediction:
        """x_0 and eps, both extrapolated: each is affine in the other at fixed x_t. `extra` is the conditional's."""
        w = weight_at(self.w, x, t)
        c, u = self.conditional.predict(x, t), self.unconditional.predict(x, t)
        return Prediction(u.x0 + w * (c.x0 - u.x0), u.eps + w * (c.eps - u.eps), c.extra)


def cfg(conditional: Denoise | Callable, unconditional: Denoise | Callable, w) -> Guided:
    """Classifier-free guidance:  x_0 = u + w (c - u).

    w = 1 is the conditional model and w = 0 the unconditional one.

    Args:
        conditional: c, a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        unconditional: u, a denoiser or a function (x, t) -> E[x_0 | x_t].
        w: the weight: a number, (B,), or a pytree that is called with t. In the terms of Ho & Salimans it is w + 1.

    Returns:
        The guided denoiser; its `extra`, as a learned variance, is the conditional one's.

    Raises:
        ValueError: for a weight that is no finite number, and denoisers of different schedules.

    Reference:
        Ho & Salimans 2022, arXiv:2207.12598, eq. 6.
    """
    conditional, unconditional = as_denoises(conditional, unconditional)
    return Guided(conditional, unconditional, w)


def weight_at(w, x, t) -> Array:
    """The weight at t, shaped to scale x: of a number, one a sample (B,), or a function of t."""
    w = w(as_time(t)) if callable(w) else w
    check_per_sample("w", w, x)
    return expand(jnp.asarray(w, jax.dtypes.result_type(float)), x)
