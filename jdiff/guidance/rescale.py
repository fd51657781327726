"""Rescaled guidance: a guided prediction brought back to the spread of the conditional one."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, safe_divide
from jdiff.core.pytrees import noun
from jdiff.guidance.base import Combination, Guidance, check_number, check_target, identical, norm, value_of
from jdiff.process.prediction import Denoise, Prediction, as_denoises


@noun
class Rescaled(Guidance):
    """A guided denoiser, partly of the conditional one's standard deviation.

    `conditional` is None where it is the first part of `guided`: that one is evaluated anyway.
    """

    guided: Denoise
    conditional: Any  # a Denoise, or None
    phi: Number
    target: Any = None  # a Target, or None

    @property
    def parts(self):
        return (self.guided,) if self.conditional is None else (self.guided, self.conditional)

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        if self.conditional is None:
            assert isinstance(self.guided, Combination)
            guided, (conditional, *_), own = self.guided.predict_all(x, t, memory[0])
            memory = (own,)
        else:
            (guided, conditional), memory = self.ask(x, t, memory)
        value, aimed = (value_of(self.schedule, self.target, one, t) for one in (guided, conditional))
        ratio = safe_divide(_spread(aimed), _spread(value))
        return self.moved(guided, self.phi * (ratio - 1) * value, x, t, self.target), memory


def _spread(a: Array) -> Array:
    """The standard deviation of each sample times the root of its size, (B, 1, ...)."""
    return norm(a - jnp.mean(a, axis=tuple(range(1, a.ndim)), keepdims=True))


def rescale(guided: Denoise | Callable, conditional: Denoise | Callable, phi, target=None) -> Rescaled:
    """Guidance whose spread is brought back to that of the conditional model, which large weights exceed.

        x_0 <- phi (std(c) / std(g)) g + (1 - phi) g

    with g the guided x_0, c the conditional one, and std over all numbers of a sample.

    Args:
        guided: g, a denoiser as `cfg` makes one. Where `conditional` is the one inside it, nothing is evaluated twice.
        conditional: c, a denoiser or a function (x, t) -> E[x_0 | x_t, cond].
        phi: how much of it, from 0 to 1; 0 is `guided`, and 0.7 is the paper's.
        target: what is rescaled, as `targets.V()`; None for x_0. Published code takes whatever the network returns.

    Returns:
        The denoiser; its eps is the noise that the new x_0 implies.

    Raises:
        ValueError: for a phi that is no number from 0 to 1, and denoisers of different schedules.

    Reference:
        Lin et al. 2023, arXiv:2305.08891, eq. 14 to 16.
    """
    check_number("rescale", "phi", phi, lambda a: 0 <= a <= 1, "from 0 to 1")
    check_target("rescale", target)
    guided, conditional = as_denoises(guided, conditional)
    own = isinstance(guided, Combination) and identical(guided.parts[0], conditional)
    return Rescaled(guided, None if own else conditional, phi, target)
