"""Thresholding: estimates of x_0 brought back into the range of the data."""

from collections.abc import Callable

import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, expand
from jdiff.core.pytrees import noun
from jdiff.guidance.base import Combination, check_number
from jdiff.process.clock import Schedule
from jdiff.process.prediction import Denoise, Prediction, as_denoise


@noun
class Thresholded(Combination):
    """A denoiser whose estimates of x_0 stay within [-limit, limit]."""

    base: Denoise
    limit: Number
    quantile: Number | None

    @property
    def parts(self):
        return (self.base,)

    def guide(self, x: Array, t, predictions: tuple[Prediction, ...]) -> Prediction:
        """The thresholded x_0, and the noise that it implies: eps + alpha_t (x_0 - thresholded x_0) / sigma_t."""
        (base,) = predictions
        x0 = base.x0
        if self.quantile is None:
            new = jnp.clip(x0, -self.limit, self.limit)
        else:
            size = jnp.quantile(jnp.abs(x0).reshape(len(x0), -1), self.quantile, axis=1)
            size = expand(jnp.maximum(size, self.limit), x0)
            new = jnp.clip(x0, -size, size) * (self.limit / size)
        new = new.astype(x0.dtype)
        return self.moved(base, new - x0, x, t)._replace(x0=new)


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
    check_number("threshold", "limit", limit, lambda a: a > 0, "positive")
    check_number("threshold", "quantile", quantile, lambda a: 0 < a <= 1, "a share, above 0 and up to 1")
    return Thresholded(as_denoise(denoise, schedule), limit, quantile)
