"""Thresholding: estimates of x_0 brought back into the range of the data."""

import jax.numpy as jnp

from jdiff.core.arrays import Array, Denoise, Number, expand, safe_divide
from jdiff.core.pytrees import concrete, noun
from jdiff.process.forward import Prediction, predict, rates
from jdiff.process.schedules import Schedule


@noun
class Thresholded:
    """A denoiser whose estimates of x_0 stay within [-limit, limit]."""

    base: Denoise
    schedule: Schedule
    limit: Number
    quantile: Number | None

    def __call__(self, x: Array, t) -> Array:
        """E[x_0 | x_t], thresholded, (B, ...)."""
        return self.predict(x, t).x0

    def predict(self, x: Array, t) -> Prediction:
        """The thresholded x_0, and the noise that it implies: eps + alpha_t (x_0 - thresholded x_0) / sigma_t."""
        x0, eps, extra = predict(self.base, self.schedule, x, t)
        if self.quantile is None:
            new = jnp.clip(x0, -self.limit, self.limit)
        else:
            size = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1), self.quantile, axis=1)
            size = expand(jnp.maximum(size, self.limit), x0)
            new = jnp.clip(x0, -size, size) * (self.limit / size)
        new = new.astype(x0.dtype)
        alpha, sigma = rates(self.schedule, t, x)
        return Prediction(new, (eps + safe_divide(alpha * (x0 - new), sigma)).astype(eps.dtype), extra)


def threshold(denoise: Denoise, schedule: Schedule, limit=1.0, quantile=None) -> Thresholded:
    """`denoise` with x_0 clipped to [-limit, limit], or with `quantile` p, dynamically, by a size s of each sample:

        s = max(limit, the p-quantile of |x_0|),    x_0 <- clip(x_0, -s, s) limit / s.

    Where alpha is small, a small error of a predicted eps is a large one of x_0: tables that end near alpha = 0 need it
    (the published samplers of DDPM and ADM clip), and so do large guidance weights. Goes around guidance.
    Ho et al. 2020, arXiv:2006.11239 (clipping, in its code); Saharia et al. 2022, arXiv:2205.11487, section 2.3.
    Raises ValueError unless both are single numbers, limit > 0 and 0 < quantile <= 1.

    >>> import jax.numpy as jnp, jdiff
    >>> far = threshold(lambda x, t: 3 * x, jdiff.Flow())
    >>> far(jnp.array([[0.1, -2.0]]), 0.5).tolist()
    [[0.30000001192092896, -1.0]]
    """
    for name, value in dict(limit=limit, quantile=quantile).items():
        if value is not None and jnp.ndim(value):
            raise ValueError(f"threshold: {name} is one number, got shape {jnp.shape(value)}")
    if concrete(limit) and not limit > 0:
        raise ValueError(f"threshold: limit must be positive, got {limit}")
    if quantile is not None and concrete(quantile) and not 0 < quantile <= 1:
        raise ValueError(f"threshold: quantile is a share, above 0 and up to 1; got {quantile}")
    return Thresholded(denoise, schedule, limit, quantile)
