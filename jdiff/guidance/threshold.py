"""Thresholding: estimates of x_0 brought back into the range of the data."""

from collections.abc import Callable

import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, expand, safe_divide
from jdiff.core.pytrees import concrete, noun
from jdiff.process.clock import Schedule
from jdiff.process.forward import rates
from jdiff.process.prediction import Denoise, Prediction, as_denoise


@noun
class Thresholded(Denoise):
    """A denoiser whose estimates of x_0 stay within [-limit, limit]."""

    base: Denoise
    limit: Number
    quantile: Number | None

    @property
    def schedule(self) -> Schedule:
        return self.base.schedule

    def predict(self, x: Array, t) -> Prediction:
        """The thresholded x_0, and the noise that it implies: eps + alpha_t (x_0 - thresholded x_0) / sigma_t."""
        x0, eps, extra = self.base.predict(x, t)
        if self.quantile is None:
            new = jnp.clip(x0, -self.limit, self.limit)
        else:
            size = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1), self.quantile, axis=1)
            size = expand(jnp.maximum(size, self.limit), x0)
            new = jnp.clip(x0, -size, size) * (self.limit / size)
        new = new.astype(x0.dtype)
        alpha, sigma = rates(self.schedule, t, x)
        return Prediction(new, (eps + safe_divide(alpha * (x0 - new), sigma)).astype(eps.dtype), extra)


def threshold(denoise: Denoise | Callable, schedule: Schedule, limit=1.0, quantile=None) -> Thresholded:
    """`denoise` with its x_0 clipped to [-limit, limit], or by a size s of each sample:

        s = max(limit, the quantile of |x_0|),    x_0 <- clip(x_0, -s, s) limit / s.

    Where alpha is small, a small error of a predicted eps is a large one of x_0. Networks on tables that end near
    alpha = 0 need the clipping, as the published samplers of DDPM and ADM do, and so do large guidance weights.
    Put it around guidance, not into it.

    >>> import jax.numpy as jnp, jdiff
    >>> far = threshold(lambda x, t: 3 * x, jdiff.Flow())
    >>> far(jnp.array([[0.1, -2.0]]), 0.5).tolist()
    [[0.30000001192092896, -1.0]]

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the schedule of the process.
        limit: the largest number of the data, positive.
        quantile: None for static clipping, or a share above 0 and up to 1, as 0.995, for the dynamic one.

    Returns:
        The denoiser; its eps is the noise that the new x_0 implies.

    Raises:
        ValueError: unless both are single numbers within these ranges.

    Reference:
        Ho et al. 2020, arXiv:2006.11239 (clipping, in its code); Saharia et al. 2022, arXiv:2205.11487, section 2.3.
    """
    for name, value in dict(limit=limit, quantile=quantile).items():
        if value is not None and jnp.ndim(value):
            raise ValueError(f"threshold: {name} is one number, got shape {jnp.shape(value)}")
    if concrete(limit) and not limit > 0:
        raise ValueError(f"threshold: limit must be positive, got {limit}")
    if quantile is not None and concrete(quantile) and not 0 < quantile <= 1:
        raise ValueError(f"threshold: quantile is a share, above 0 and up to 1; got {quantile}")
    return Thresholded(as_denoise(denoise, schedule), limit, quantile)
