"""Classifier-free guidance."""

from typing import Any

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, Denoise, as_time, expand
from jdiff.core.checks import check_time
from jdiff.core.pytrees import noun, number, per_sample
from jdiff.process.forward import Prediction


@noun
class Guided:
    """The extrapolation from an unconditional denoiser through a conditional one, as a pytree."""

    conditional: Denoise
    unconditional: Denoise
    w: Any = per_sample()

    def check(self):
        object.__setattr__(self, "w", number(self.w))

    def __call__(self, x: Array, t) -> Array:
        """u + w (c - u), (B, ...)."""
        w = _weight(self.w, x, t)
        return _extrapolate(w, self.conditional(x, t), self.unconditional(x, t))

    def predict(self, x: Array, t) -> Prediction:
        """x_0 and eps, both extrapolated: each is affine in the other at fixed x_t. `extra` is the conditional's."""
        w = _weight(self.w, x, t)
        c, u = self.conditional.predict(x, t), self.unconditional.predict(x, t)
        return Prediction(_extrapolate(w, c.x0, u.x0), _extrapolate(w, c.eps, u.eps), c.extra)


def cfg(conditional: Denoise, unconditional: Denoise, w) -> Guided:
    """Classifier-free guidance:  x_0 = u + w (c - u), so w = 1 is the conditional model and w = 0 the unconditional.

    `w`: a number, (B,), or a pytree callable of t. In the terms of Ho & Salimans 2022, arXiv:2207.12598, eq. 6, their
    weight is w - 1. Both denoisers need `predict` (as all of this library's have).
    """
    for name, denoise in dict(conditional=conditional, unconditional=unconditional).items():
        if not hasattr(denoise, "predict"):
            raise ValueError(f"cfg: the {name} denoiser has no predict(x, t); make it with jdiff.denoiser(...)")
    return Guided(conditional, unconditional, w)


def _weight(w, x, t):
    w = w(as_time(t)) if callable(w) else w
    check_time(w, x)  # a weight per sample follows the same rule as a time per sample
    return expand(jnp.asarray(w, jax.dtypes.result_type(float)), x)


def _extrapolate(w, c, u):
    return u + w * (c - u)
