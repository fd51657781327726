"""What the network is shown of (x_t, t): a scaled input (B, ...) and a noise label (B,).

A conditioning is a pytree called as `conditioning(schedule, x, t) -> (input, label)`.
"""

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, as_time, expand
from jdiff.core.checks import SMALLEST, check_count, check_range, check_time
from jdiff.core.keys import each
from jdiff.core.pytrees import noun
from jdiff.process.clock import Schedule, log_snr

LABEL_RANGE = 20.0  # |log-SNR| beyond which no network need tell levels apart; keeps labels finite


@noun
class LogSNR:
    """(c_in x, -log_snr / 8) with c_in = 1 / sqrt((alpha sigma_data)^2 + sigma^2): unit variance, and no t.

    EDM's label log(sigma) / 4 for every schedule, from log-SNR clipped to [-20, 20]: labels lie in [-2.5, 2.5].
    """

    sigma_data: Number = 0.5

    def check(self):
        check_range(self, SMALLEST, sigma_data=self.sigma_data)

    def __call__(self, schedule, x, t):
        t = _times(x, t)
        label = -jnp.clip(log_snr(schedule, t), -LABEL_RANGE, LABEL_RANGE) / 8
        return _unit_variance(schedule, x, t, self.sigma_data), label


@noun
class EDM:
    """(c_in x, log(sigma/alpha) / 4): Karras et al. 2022, arXiv:2206.00364, table 1, without a limit on the label."""

    sigma_data: Number = 0.5

    def check(self):
        check_range(self, SMALLEST, sigma_data=self.sigma_data)

    def __call__(self, schedule, x, t):
        t = _times(x, t)
        return _unit_variance(schedule, x, t, self.sigma_data), -log_snr(schedule, t) / 8


@noun
class Index:
    """(x, k) with k = clip(round(t T) - 1, 0, T - 1): DDPM's table index; `fractional` leaves out the rounding."""

    T: Number
    fractional: Number | bool = 0.0

    def check(self):
        check_count(self, T=self.T)

    def __call__(self, schedule, x, t):
        place = _times(x, t) * self.T - 1
        place = jnp.where(jnp.asarray(self.fractional) > 0, place, jnp.round(place))
        return x, jnp.clip(place, 0, self.T - 1)


@noun
class Continuous:
    """(x, scale t): the label of the continuous VP and sub-VP networks of arXiv:2011.13456, whose scale is 999."""

    scale: Number = 999.0

    def check(self):
        check_range(self, SMALLEST, scale=self.scale)

    def __call__(self, schedule, x, t):
        return x, self.scale * _times(x, t)


@noun
class Sigma:
    """(x, sigma_t): the label of the NCSN++ networks of arXiv:2011.13456."""

    def __call__(self, schedule, x, t):
        return x, schedule.sigma(_times(x, t))


def drop_labels(key, labels: Array, rate, null: int) -> Array:
    """Labels (B,) with each replaced by `null` with probability `rate`: training for classifier-free guidance.

    Row i depends on (key, i) alone. Labels of less than 32 bits come back as int32, which holds any `null`: 256 is 0 in
    uint8. Raises ValueError unless labels are integers.  Ho & Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    dtype = jnp.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"labels are {dtype}; expected integers, the numbers of classes")
    labels = jnp.asarray(labels, dtype if jnp.iinfo(dtype).bits >= 32 else jnp.int32)
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, rate))(each(key, labels.shape[0]))
    return jnp.where(dropped, jnp.asarray(null, labels.dtype), labels)


def _times(x, t) -> Array:
    check_time(t, x)
    return jnp.broadcast_to(as_time(t), jnp.shape(x)[:1])


def _unit_variance(schedule: Schedule, x, t, sigma_data) -> Array:
    c_in = 1 / jnp.sqrt((schedule.alpha(t) * sigma_data) ** 2 + schedule.sigma(t) ** 2)
    return expand(c_in, x) * x
