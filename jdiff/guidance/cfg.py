"""Classifier-free guidance."""

from collections.abc import Callable

from jdiff.core.arrays import Array
from jdiff.core.pytrees import noun
from jdiff.guidance.branches import Branches, TwoBranches, branches
from jdiff.process.prediction import Denoise, Prediction


@noun
class Guided(TwoBranches):
    """The extrapolation from an unconditional denoiser through a conditional one."""

    branches: Branches

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        """x_0 and eps, both extrapolated: each is affine in the other at fixed x_t. `extra` is the conditional's."""
        c, u = predictions
        w = self.weight(x, t)
        return Prediction(u.x0 + w * (c.x0 - u.x0), u.eps + w * (c.eps - u.eps), c.extra)


def cfg(conditional: Denoise | Callable, unconditional: Denoise | Callable, w, *, batched: bool = False) -> Guided:
    """Classifier-free guidance:  x_0 = u + w (c - u).

    w = 1 is the conditional model and w = 0 the unconditional one. With a negative prompt in place of the
    unconditional model, the same formula leads away from that prompt.

    Args:
        conditional: c, a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        unconditional: u, a denoiser or a function (x, t) -> E[x_0 | x_t].
        w: the weight: a number, (B,), or a pytree that is called with t. In the terms of Ho & Salimans it is w + 1.
        batched: whether both are evaluated in one call of twice the rows: two of `jdiff.denoiser` with one network, the
            same params and another cond.

    Returns:
        The guided denoiser; its `extra`, as a learned variance, is the conditional one's.

    Raises:
        ValueError: for a weight that is no finite number, denoisers of different schedules, and `batched` for
            denoisers of two networks.

    Reference:
        Ho & Salimans 2022, arXiv:2207.12598, eq. 6.
    """
    return Guided(branches("cfg", conditional, unconditional, w, batched))
