"""How much each noise level counts: weights of the network's own squared error, `weight(schedule, target, t)`.

A weight w stated on |x_0_hat - x_0|^2 becomes w c_out^2 on |F - F*|^2, so the target (what the network outputs) and the
weight (what we care about) are independent choices. Products are formed in log space: SNR times c_out^2 is 0 times
infinity at alpha = 0. Shapes follow t. lambda is log_snr.
"""

from typing import Protocol

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, Number, as_time, safe_log
from jdiff.core.checks import SMALLEST, check_range
from jdiff.core.pytrees import Noun, noun
from jdiff.denoisers.targets import Target, system
from jdiff.process.clock import Schedule, log_snr
from jdiff.process.sde import derivative


class Weight(Protocol):
    """What the loss asks of a weight. A class of your own has this method, and @jdiff.noun above it."""

    def __call__(self, schedule: Schedule, target: Target, t: Array) -> Array:
        """What the squared error of the network counts at t, of the shape of t."""
        ...


@noun
class Flat(Noun):
    """1: each target's own regression: L_simple for `Eps`, Karras' loss for `EDM`, flow matching for `Velocity`."""

    def __call__(self, schedule, target, t):
        return jnp.ones_like(as_time(t))


@noun
class Simple(Noun):
    """1 on the error of eps, e^lambda on that of x_0, whatever the target: L_simple of arXiv:2006.11239, eq. 14."""

    def __call__(self, schedule, target, t):
        return jnp.exp(log_snr(schedule, t) + _log_c_out2(schedule, target, t))


@noun
class EDM(Noun):
    """e^lambda + 1/sigma_data^2 on the error of x_0: Karras et al. 2022, arXiv:2206.00364, table 1."""

    sigma_data: Number = 0.5

    def check(self):
        check_range(self, SMALLEST, sigma_data=self.sigma_data)

    def __call__(self, schedule, target, t):
        log_weight = jnp.logaddexp(log_snr(schedule, t), -2 * jnp.log(self.sigma_data))
        return jnp.exp(log_weight + _log_c_out2(schedule, target, t))


@noun
class MinSNR(Noun):
    """min(e^lambda, gamma) on the error of x_0, for every target: Hang et al. 2023, arXiv:2303.09556, section 3.4."""

    gamma: Number = 5.0

    def check(self):
        check_range(self, SMALLEST, gamma=self.gamma)

    def __call__(self, schedule, target, t):
        log_weight = jnp.minimum(log_snr(schedule, t), jnp.log(self.gamma))
        return jnp.exp(log_weight + _log_c_out2(schedule, target, t))


@noun
class P2(Noun):
    """(k + e^lambda)^-gamma on the error of eps: Choi et al. 2022, arXiv:2204.00227, eq. 8."""

    gamma: Number = 1.0
    k: Number = 1.0

    def check(self):
        check_range(self, 0, 10, gamma=self.gamma)
        check_range(self, 1e-3, k=self.k)

    def __call__(self, schedule, target, t):
        lam = log_snr(schedule, t)
        log_weight = lam - self.gamma * jnp.logaddexp(lam, jnp.log(self.k))
        return jnp.exp(log_weight + _log_c_out2(schedule, target, t))


@noun
class Sigmoid(Noun):
    """-lambda'_t sigmoid(bias - lambda) on the error of eps: independent of the schedule, by the factor -lambda'_t.

    Kingma & Gao 2023, arXiv:2303.00848; Hoogeboom et al. 2024, arXiv:2410.19324, section 3.1.
    """

    bias: Number = 0.0

    def check(self):
        check_range(self, -100, 100, bias=self.bias)

    def __call__(self, schedule, target, t):
        lam = log_snr(schedule, t)
        log_weight = lam + jax.nn.log_sigmoid(self.bias - lam) + _log_rate(schedule, t)
        return jnp.exp(log_weight + _log_c_out2(schedule, target, t))


@noun
class Likelihood(Noun):
    """-lambda'_t on the error of eps, g^2 on that of the score: half its sum over dimensions is the diffusion VLB.

    Song et al. 2021, arXiv:2101.09258, theorem 1; Kingma et al. 2021, arXiv:2107.00630, eq. 17.
    """

    def __call__(self, schedule, target, t):
        return jnp.exp(log_snr(schedule, t) + _log_rate(schedule, t) + _log_c_out2(schedule, target, t))


def _log_c_out2(schedule, target, t):
    """log c_out^2, with the same floor under alpha and sigma as `log_snr`, so that their singularities cancel."""
    at = system(schedule, target, as_time(t))
    return 2 * (safe_log(at.sigma) - safe_log(jnp.abs(at.determinant)))


def _log_rate(schedule, t):
    """log(-d lambda / dt)."""
    return safe_log(-derivative(lambda t: log_snr(schedule, t), as_time(t)))
