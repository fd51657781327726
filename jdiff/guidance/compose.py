"""Several conditions at once: products of distributions, and negative prompts."""

from collections.abc import Callable, Iterable
from typing import Any

from jdiff.core.arrays import Array
from jdiff.core.pytrees import noun, per_sample
from jdiff.guidance.base import Combination, as_weight, weight_at
from jdiff.process.prediction import Denoise, Prediction, as_denoises


@noun
class Term:
    """A denoiser and how much of its difference from the base is added."""

    denoise: Denoise
    w: Any = per_sample()

    def check(self):
        object.__setattr__(self, "w", as_weight(self.w))


@noun
class Composed(Combination):
    """A base denoiser, and weighted differences of others from it."""

    base: Denoise
    terms: tuple[Term, ...]

    @property
    def parts(self):
        return self.base, *(term.denoise for term in self.terms)

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        base, *others = predictions
        x0, eps, extra = base
        for term, other in zip(self.terms, others, strict=True):
            w = weight_at(term.w, x, t)
            x0, eps = x0 + w * (other.x0 - base.x0), eps + w * (other.eps - base.eps)
        return Prediction(x0, eps, extra)


def compose(base: Denoise | Callable, terms: Iterable[tuple[Denoise | Callable, Any]]) -> Composed:
    """Several conditions at once:  x_0 = b + sum_i w_i (d_i - b).

    In terms of densities it is p(x_t) prod_i (p(x_t | cond_i) / p(x_t))^w_i: all conditions together if they are
    independent given x_t. A negative weight leads away from its condition. One term is `cfg`.

    Args:
        base: b, the unconditional denoiser, or a function (x, t) -> E[x_0 | x_t].
        terms: (d_i, w_i): a denoiser of one condition, and its weight as for `cfg`; of either sign.

    Returns:
        The guided denoiser, of one evaluation for each term and one for the base; its `extra` is the base's.

    Raises:
        ValueError: for terms that are no pairs, a weight that is no finite number, and denoisers of different
            schedules.

    Reference:
        Liu et al. 2022, arXiv:2206.01714, eq. 11 and 13.
    """
    pairs = list(terms) if isinstance(terms, (list, tuple)) else None
    if pairs is None or not all(isinstance(pair, (list, tuple)) and len(pair) == 2 for pair in pairs):
        raise ValueError("compose: the terms are a list of pairs, [(denoise, w), ...]")
    base, *denoisers = as_denoises(base, *(denoise for denoise, _ in pairs))
    return Composed(base, tuple(Term(denoise, w) for denoise, (_, w) in zip(denoisers, pairs, strict=True)))
