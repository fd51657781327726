"""A branch that is evaluated at every k-th step only."""

from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number
from jdiff.core.pytrees import noun
from jdiff.guidance.base import Guidance, check_number
from jdiff.process.forward import eps_from
from jdiff.process.prediction import Denoise, Prediction, as_denoise


@noun
class Cached(Guidance):
    """A denoiser whose x_0 is kept for `every` steps."""

    base: Denoise
    every: Number

    @property
    def parts(self):
        return (self.base,)

    def memory(self, x: Array) -> Any:
        """The memory of the base, the x_0 of its last evaluation, and how many steps there were."""
        return super().memory(x), jnp.zeros_like(x), jnp.zeros((), jnp.int32)

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        inside, x0, count = memory

        def fresh():
            (base,), own = self.ask(x, t, inside)
            return base._replace(extra=None), own

        def kept():
            return Prediction(x0, eps_from(self.schedule, x0, x, t)), inside

        prediction, inside = lax.cond(count % self.every == 0, fresh, kept)
        return prediction, (inside, prediction.x0, count + 1)


def cached(denoise: Denoise | Callable, every) -> Cached:
    """A denoiser that is evaluated at every k-th step of `sample`; between them its last x_0 stands.

    Around the unconditional denoiser of any guidance: `cfg(c, cached(u, 2), w)` costs 1.5 evaluations a step.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        every: k, a whole number, 1 or more.

    Returns:
        The denoiser, with eps the noise that its x_0 implies, and without `extra`. Outside of `sample` and `invert` it
        is `denoise`.

    Raises:
        ValueError: for a k that is not whole, or below 1.

    Reference:
        Lv et al. 2024, arXiv:2410.19355, section 3.3, without its correction by frequency.
    """
    check_number("cached", "every", every, lambda k: k >= 1 and k % 1 == 0, "a whole number, 1 or more")
    return Cached(as_denoise(denoise, None), every)
