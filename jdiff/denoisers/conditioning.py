"""What the network is shown of (x_t, t): a scaled input (B, ...) and a label of the noise level (B,).

A conditioning is a pytree called as `conditioning(schedule, x, t) -> (input, label)`. A class of your own has this
`__call__`, and @jdiff.noun above it; a function will do as well.
"""

from collections.abc import Callable

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, Number, as_time, expand
from jdiff.core.checks import SMALLEST, check_count, check_range, check_time
from jdiff.core.keys import each
from jdiff.core.pytrees import Noun, concrete, noun, static
from jdiff.process.clock import Schedule, log_snr

LABEL_RANGE = 20.0  # |log-SNR| beyond which no network need tell levels apart; keeps labels finite


@noun
class LogSNR(Noun):
    """The input c_in x of unit variance, c_in = 1 / sqrt((alpha sigma_data)^2 + sigma^2), and the label -log_snr / 8.

    The label is EDM's log(sigma) / 4 for every schedule, from the log-SNR clipped to [-20, 20]: it lies in [-2.5, 2.5].
    The network is not shown t.

    Args:
        sigma_data: the standard deviation of the data.

    Raises:
        ValueError: unless sigma_data is positive.
    """

    sigma_data: Number = 0.5

    def check(self):
        check_range(self, SMALLEST, sigma_data=self.sigma_data)

    def __call__(self, schedule, x, t):
        t = times_of_rows(x, t)
        label = -jnp.clip(log_snr(schedule, t), -LABEL_RANGE, LABEL_RANGE) / 8
        return _unit_variance(schedule, x, t, self.sigma_data), label


@noun
class EDM(Noun):
    """The input c_in x as in `LogSNR`, and the label log(sigma/alpha) / 4 without a limit.

    Args:
        sigma_data: the standard deviation of the data.

    Raises:
        ValueError: unless sigma_data is positive.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, table 1.
    """

    sigma_data: Number = 0.5

    def check(self):
        check_range(self, SMALLEST, sigma_data=self.sigma_data)

    def __call__(self, schedule, x, t):
        t = times_of_rows(x, t)
        return _unit_variance(schedule, x, t, self.sigma_data), -log_snr(schedule, t) / 8


@noun
class Index(Noun):
    """The input x, and the label k = clip(round(t T) - 1, 0, T - 1): DDPM's index into its table.

    Args:
        T: the number of steps of the table.
        fractional: whether to leave out the rounding.

    Raises:
        ValueError: unless T is a whole number, 1 or more.
    """

    T: Number
    fractional: Number | bool = 0.0

    def check(self):
        check_count(self, T=self.T)

    def __call__(self, schedule, x, t):
        place = times_of_rows(x, t) * self.T - 1
        place = jnp.where(jnp.asarray(self.fractional) > 0, place, jnp.round(place))
        return x, jnp.clip(place, 0, self.T - 1)


@noun
class Continuous(Noun):
    """The input x, and the label scale t: that of the continuous VP and sub-VP networks of score_sde.

    Args:
        scale: 999 in the published code.

    Raises:
        ValueError: unless scale is positive.

    Reference:
        Song et al. 2021, arXiv:2011.13456, in its code.
    """

    scale: Number = 999.0

    def check(self):
        check_range(self, SMALLEST, scale=self.scale)

    def __call__(self, schedule, x, t):
        return x, self.scale * times_of_rows(x, t)


@noun
class Sigma(Noun):
    """The input x, and the label sigma_t: that of the NCSN++ networks.

    Reference:
        Song et al. 2021, arXiv:2011.13456.
    """

    def __call__(self, schedule, x, t):
        return x, schedule.sigma(times_of_rows(x, t))


@noun
class FromFunction(Noun):
    """A function `(schedule, x, t) -> (input, label)` as a conditioning: it has no numbers that JAX sees.

    Args:
        code: the function.
    """

    code: Callable = static()

    def __call__(self, schedule, x, t):
        return self.code(schedule, x, t)


def drop_labels(key, labels: Array, rate, null: int) -> Array:
    """Labels with each replaced by `null` with probability `rate`: training for classifier-free guidance.

    Row i depends on (key, i) alone.

    Args:
        key: one key, (B,) keys, or a `BatchKey`.
        labels: classes, (B,), integers.
        rate: the share that is replaced, in [0, 1].
        null: the label that stands for no class.

    Returns:
        Labels, (B,). Those of less than 32 bits come back as int32, which holds any `null`: 256 is 0 in uint8.

    Raises:
        ValueError: unless labels are integers and the rate is a share.

    Reference:
        Ho & Salimans 2022, arXiv:2207.12598, algorithm 1.
    """
    dtype = jnp.result_type(labels)
    if not jnp.issubdtype(dtype, jnp.integer):
        raise ValueError(f"labels are {dtype}; expected integers, the numbers of classes")
    if concrete(rate) and not ((np.asarray(rate) >= 0) & (np.asarray(rate) <= 1)).all():
        raise ValueError(f"rate is the share of labels that are dropped, in [0, 1]; got {rate}")
    labels = jnp.asarray(labels, dtype if jnp.iinfo(dtype).bits >= 32 else jnp.int32)
    dropped = jax.vmap(lambda k: jax.random.bernoulli(k, rate))(each(key, labels.shape[0]))
    return jnp.where(dropped, jnp.asarray(null, labels.dtype), labels)


def times_of_rows(x, t) -> Array:
    """The time of each sample (B,); ValueError for a t that is none."""
    check_time(t, x)
    return jnp.broadcast_to(as_time(t), jnp.shape(x)[:1])


def _unit_variance(schedule: Schedule, x, t, sigma_data) -> Array:
    c_in = 1 / jnp.sqrt((schedule.alpha(t) * sigma_data) ** 2 + schedule.sigma(t) ** 2)
    return expand(c_in, x) * x
