"""Classifier guidance: any denoiser, and the gradient of a log-likelihood."""

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, as_time, safe_divide
from jdiff.core.pytrees import noun, per_sample
from jdiff.guidance.base import Combination, Guidance, as_pytree, as_weight, check_number, weight_at
from jdiff.process.forward import rates
from jdiff.process.memory import predict_with
from jdiff.process.prediction import Denoise, Prediction, as_denoise


@noun
class Classified(Combination):
    """A denoiser moved along the gradient of log p(y | x_t)."""

    base: Denoise
    log_prob: Any
    w: Any = per_sample()

    def check(self):
        object.__setattr__(self, "w", as_weight(self.w))

    @property
    def parts(self):
        return (self.base,)

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        (base,) = predictions
        gradient = _gradient(lambda x: self.log_prob(x, as_time(t)), x)
        alpha, sigma = rates(self.schedule, t, x)
        return self.moved(base, weight_at(self.w, x, t) * safe_divide(sigma**2, alpha) * gradient, x, t)


@noun
class ClassifiedX0(Guidance):
    """A denoiser moved along the gradient of log p(y | x_0) at its own x_0."""

    base: Denoise
    log_prob: Any
    w: Any = per_sample()
    std: Number | None = None

    def check(self):
        object.__setattr__(self, "w", as_weight(self.w))

    @property
    def parts(self):
        return (self.base,)

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        alpha, sigma = rates(self.schedule, t, x)
        if self.std is None:

            def x0_of(x):
                prediction, own = predict_with(self.base, x, t, memory[0])
                return prediction.x0, (prediction, own)

            x0, transpose, (base, own) = jax.vjp(x0_of, x, has_aux=True)
            of_x0 = safe_divide(sigma**2, alpha) * transpose(_gradient(self.log_prob, x0))[0]
        else:
            base, own = predict_with(self.base, x, t, memory[0])
            variance = (self.std * sigma) ** 2 / ((alpha * self.std) ** 2 + sigma**2)
            of_x0 = variance * _gradient(self.log_prob, base.x0)
        return self.moved(base, weight_at(self.w, x, t) * of_x0, x, t), (own,)


def classifier(denoise: Denoise | Callable, log_prob: Callable, w) -> Classified:
    """Classifier guidance:  x_0 <- x_0 + w (sigma_t^2 / alpha_t) grad log p(y | x_t).

    The gradient is exact, at x_t, and of each sample alone. With the true classifier w = 1 is the conditional model,
    and w is the weight of `cfg`.

    Args:
        denoise: the unconditional denoiser, or a function (x, t) -> E[x_0 | x_t].
        log_prob: (x_t, t) -> log p(y | x_t), (B,): a classifier that was trained on noisy data, at the classes wanted.
            A pytree that can be called, or a function; the numbers inside a function compile anew.
        w: the weight: a number, (B,), or a pytree that is called with t.

    Returns:
        The guided denoiser; its `extra` is the unconditional one's. Where alpha = 0 x_t says nothing of y, and nothing
        is changed.

    Raises:
        TypeError: for a log_prob that is no function.
        ValueError: for a weight that is no finite number; when called, for a log_prob of another shape.

    Reference:
        Dhariwal & Nichol 2021, arXiv:2105.05233, section 4 and algorithm 2; Song et al. 2021, arXiv:2011.13456, eq. 14.
    """
    return Classified(as_denoise(denoise, None), _log_prob("classifier", log_prob), w)


def classifier_x0(denoise: Denoise | Callable, log_prob: Callable, w, *, std=None) -> ClassifiedX0:
    """Classifier guidance with a classifier of clean data.

        x_0 <- x_0 + w (sigma_t^2 / alpha_t) J^T grad log p(y | x_0)

    J is the derivative of the denoiser. For Gaussian data and a log_prob that is linear it is exact; elsewhere it takes
    log p(y | x_t) for log p(y | E[x_0 | x_t]).

    Args:
        denoise: the unconditional denoiser, or a function (x, t) -> E[x_0 | x_t].
        log_prob: x_0 -> log p(y | x_0), (B,): a classifier of clean data. A pytree that can be called, or a function.
        w: the weight: a number, (B,), or a pytree that is called with t.
        std: None to differentiate the denoiser, which costs about two more evaluations. Else the standard deviation of
            the data, positive: (sigma_t^2 / alpha_t) J is then taken for that of independent Gaussian numbers,
            std^2 sigma^2 / (alpha^2 std^2 + sigma^2), and no network is differentiated.

    Returns:
        The guided denoiser; its `extra` is the unconditional one's.

    Raises:
        TypeError: for a log_prob that is no function.
        ValueError: for a std that is not positive, and as `classifier` does.

    Reference:
        Bansal et al. 2023, arXiv:2302.07121, eq. 6; the variance as in Song et al. 2023 (PiGDM), appendix A.3.
    """
    check_number("classifier_x0", "std", std, lambda a: a > 0, "positive")
    return ClassifiedX0(as_denoise(denoise, None), _log_prob("classifier_x0", log_prob), w, std)


def _log_prob(owner: str, log_prob) -> Callable:
    if isinstance(log_prob, type) or not callable(log_prob):
        raise TypeError(f"{owner}: log_prob is {log_prob!r:.40}; expected a function that returns log p(y | x), (B,)")
    return as_pytree(log_prob)


def _gradient(log_prob: Callable, x: Array) -> Array:
    """The gradient of each sample's own number, of the shape and dtype of x."""

    def total(x):
        each = jnp.asarray(log_prob(x))
        if each.shape != x.shape[:1]:
            raise ValueError(f"log_prob returned shape {each.shape}; expected one number a sample, {x.shape[:1]}")
        return jnp.sum(each)

    return jax.grad(total)(x)
