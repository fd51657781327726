"""The covariance of x_0 given x_t, through the Jacobian of the denoiser, which is never formed."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, as_time, safe_divide, wide
from jdiff.guidance.base import Guidance
from jdiff.process.clock import Schedule
from jdiff.process.forward import rates
from jdiff.process.memory import predict_with
from jdiff.process.prediction import Denoise, Prediction

LEAST_ALPHA = 1e-3  # below it sigma^2 / alpha times the Jacobian has no digits left


class Given(Guidance):
    """A denoiser given y, or a reward, around `base`: give `predict_with`. It computes in float32 at least."""

    base: Denoise

    @property
    def parts(self) -> tuple[Denoise, ...]:
        return (self.base,)

    def memory(self, x: Array) -> Any:
        """What the denoiser inside remembers."""
        return super().memory(wide(x))

    def shifted(self, prediction: Prediction, shift: Array, x: Array, t) -> Prediction:
        """A prediction whose x_0 is moved, with the noise that x_t then implies, in the dtype of x.

        Args:
            prediction: the prediction at x_t, or at the time that `moments` took in its place.
            shift: what is added to its x_0.
            x: x_t, (B, ...).
            t: its times, () or (B,).

        Returns:
            The prediction; its `extra` is as it was, and so is an eps that is the denoiser's own.
        """
        x0, eps = prediction.x0 + shift, prediction.eps
        alpha, sigma = rates(self.schedule, t, x0)
        if not self.own_noise:  # where sigma is 0 there is no noise to be implied
            eps = jnp.where(sigma > 0, safe_divide(wide(x) - alpha * x0, sigma), eps)
        return Prediction(x0.astype(x.dtype), eps.astype(x.dtype), prediction.extra)


class Moments(NamedTuple):
    """A prediction with the covariance of x_0 given x_t.

    Attributes:
        prediction: the denoiser's own, at `t`, in float32 at least.
        cov: v -> Cov[x_0 | x_t] v = (sigma^2 / alpha) J^T v, one vector-Jacobian product of the denoiser.
        x: x_t, in float32 at least.
        t: the time of the prediction: that of x, or the last one at which alpha is 1e-3.
        alpha: alpha_t, shaped to scale x.
        sigma: sigma_t, likewise.
        memory: what the denoiser remembers after it.
    """

    prediction: Prediction
    cov: Callable[[Array], Array]
    x: Array
    t: Array
    alpha: Array
    sigma: Array
    memory: Any


def moments(denoise: Denoise, x: Array, t, memory: Any) -> Moments:
    """The mean and the covariance of x_0 given x_t: Cov[x_0 | x_t] = (sigma_t^2 / alpha_t) dE[x_0 | x_t] / dx_t.

    Where alpha_t is below 1e-3, as at t = 1 of `Flow`, the covariance would be infinity times 0. There the denoiser is
    asked at the time at which alpha is 1e-3, so that both moments are off by about that much.

    Args:
        denoise: the denoiser.
        x: x_t, (B, ...).
        t: times, () or (B,).
        memory: what the denoiser remembers: see `process.memory`.

    Returns:
        Both, computed in float32 at least.

    Reference:
        Efron 2011, "Tweedie's formula and selection bias"; Rozet et al. 2024, arXiv:2405.13712, eq. 14.
    """
    x, t = wide(x), signal_time(denoise.schedule, t)
    alpha, sigma = rates(denoise.schedule, t, x)

    def mean(x):
        prediction, after = predict_with(denoise, x, t, memory)
        return prediction.x0, (prediction, after)

    _, pull, (prediction, after) = jax.vjp(mean, x, has_aux=True)
    scale = sigma**2 / alpha
    return Moments(prediction, lambda v: scale * pull(v)[0], x, t, alpha, sigma, after)


def signal_time(schedule: Schedule, t) -> Array:
    """t, or the time at which alpha is 1e-3 where alpha_t is less."""
    t = as_time(t)
    alpha = jnp.asarray(LEAST_ALPHA, t.dtype)
    last = schedule.time_at(alpha, jnp.sqrt(1 - alpha**2))
    return jnp.where(schedule.alpha(t) < LEAST_ALPHA, last, t)
