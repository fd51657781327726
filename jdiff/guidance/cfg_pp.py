"""CFG++: guidance of x_0 alone, with the noise of the unconditional model."""

from collections.abc import Callable

from jdiff.core.arrays import Array
from jdiff.core.pytrees import noun
from jdiff.guidance.branches import Branches, TwoBranches, branches
from jdiff.process.prediction import Denoise, Prediction


@noun
class GuidedX0(TwoBranches):
    """The x_0 between two denoisers, and the noise of the unconditional one."""

    branches: Branches
    own_noise = True

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        """The guided x_0 and the unconditional eps; `extra` is the conditional's."""
        c, u = predictions
        return Prediction(u.x0 + self.weight(x, t) * (c.x0 - u.x0), u.eps, c.extra)


def cfg_pp(conditional: Denoise | Callable, unconditional: Denoise | Callable, w, *, batched: bool = False) -> GuidedX0:
    """CFG++:  x_0 = u + w (c - u), with the eps of u; w from 0 to 1.

    A step of DDIM from t to s with it is one of `cfg` with the weight w r_t / (r_t - r_s), where r = sigma/alpha. That
    grows without limit as steps become shorter, so there is no ODE that it solves.

    Args:
        conditional: c, a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        unconditional: u, a denoiser or a function (x, t) -> E[x_0 | x_t].
        w: the weight, from 0, the unconditional model, to 1: a number, (B,), or a pytree that is called with t.
        batched: whether both are evaluated in one call, as for `cfg`.

    Returns:
        The guided denoiser. Its eps is not the noise that its x_0 implies. Solvers whose step is one sum of both take
        it: DDIM, DDPM, Euler, EulerAncestral, EulerMaruyama. `sample` refuses it to all others.

    Raises:
        ValueError: for a weight outside [0, 1], and as `cfg` does.

    Reference:
        Chung et al. 2024, arXiv:2406.08070, algorithm 2.
    """
    return GuidedX0(branches("cfg_pp", conditional, unconditional, w, batched, most=1))
