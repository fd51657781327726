"""Tangential damping: guidance whose unconditional prediction is cleared of what is not in the conditional one."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdiff.core.arrays import Array, safe_divide, safe_sqrt
from jdiff.core.pytrees import noun
from jdiff.denoisers.targets import Eps
from jdiff.guidance.base import check_target, inner, value_of
from jdiff.guidance.branches import Branches, TwoBranches, branches
from jdiff.process.prediction import Denoise, Prediction

EPS = Eps()


@noun
class Damped(TwoBranches):
    """The extrapolation from the unconditional prediction's share of what it has in common with the conditional one."""

    branches: Branches
    target: Any = EPS

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        c, u = predictions
        toward, away = (value_of(self.schedule, self.target, one, t) for one in (c, u))
        return self.moved(c, (self.weight(x, t) - 1) * (toward - _common(toward, away)), x, t, self.target)


def _common(c: Array, u: Array) -> Array:
    """<u, v> v, with v the first right singular vector of the matrix of the rows c and u."""
    cc, uu, cu = inner(c, c), inner(u, u), inner(c, u)
    half = 0.5 * (cc - uu)
    root = safe_sqrt(half**2 + cu**2)
    # the eigenvector of [[cc, cu], [cu, uu]], in whichever of its two forms loses no digits
    of_c, of_u = jnp.where(half > 0, root + half, cu), jnp.where(half > 0, cu, root - half)
    common = of_c * c + of_u * u
    return safe_divide(inner(u, common), inner(common, common)) * common


def tcfg(
    conditional: Denoise | Callable, unconditional: Denoise | Callable, w, *, target=EPS, batched: bool = False
) -> Damped:
    """Tangential damping:  e = u' + w (c - u'),  u' = <u, v> v,  with v the first right singular vector of (c, u).

    v is the direction that the two predictions have most in common. What u has beside it is taken out.

    Args:
        conditional: c, a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        unconditional: u, a denoiser or a function (x, t) -> E[x_0 | x_t].
        w: the weight, as for `cfg`; 1 is the conditional model.
        target: what c, u and e are: the paper's noise, which is the score up to a factor, or another of
            `jdiff.targets`; None for x_0.
        batched: whether both are evaluated in one call, as for `cfg`.

    Returns:
        The guided denoiser; its `extra` is the conditional one's.

    Raises:
        ValueError: as `cfg` does.

    Reference:
        Kwon et al. 2025, arXiv:2503.18137, algorithm 1.
    """
    check_target("tcfg", target)
    return Damped(branches("tcfg", conditional, unconditional, w, batched), target)
