"""DDIM and DDPM: solvers that keep the predicted x_0 and renew a share of the predicted noise."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand, safe_divide, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.names import choose
from jdiff.core.pytrees import Noun, noun, static
from jdiff.process.forward import fresh_noise
from jdiff.solvers.base import Mix, is_positive, mix


@noun
class DDIM(Noun):
    """DDIM: the predicted x_0 is kept, and a share c of the predicted noise is renewed.

        x_s = alpha_s x_0 + sigma_s (sqrt(1 - c) eps + sqrt(c) z),    c = min(eta^2 (1 - SNR_t / SNR_s), 1)

    with z ~ N(0, I) and SNR = alpha^2 / sigma^2.

    Args:
        eta: 0 or more. 0 is deterministic: Euler's method for the probability-flow ODE in sigma/alpha. 1 is DDPM's
            ancestral sampling. A larger eta renews more of the noise, up to all of it.

    Raises:
        ValueError: for an eta that is negative or not finite.

    Reference:
        Song et al. 2021, arXiv:2010.02502, eq. 12 and 16.
    """

    eta: Number = 0.0
    order = 1
    mixes = True

    def check(self):
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self) -> bool:
        return is_positive(self.eta)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        c = jnp.minimum(self.eta**2 * fresh_noise(schedule, t, s), 1)
        sigma = schedule.sigma(s)
        return Mix(schedule.alpha(s), sigma * safe_sqrt(1 - c), sigma * safe_sqrt(c))

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        return mix(now.plan, prediction, x, key), state, prediction


# The exponent v of each; the learned one comes out of the network.
VARIANCES = {"small": 0.0, "large": 1.0, "learned": None}


@noun
class DDPM(Noun):
    """DDPM: a draw from the posterior of x_s given x_t and the predicted x_0, with a variance to choose.

        x_s = alpha_s x_0 + sigma_s sqrt(1 - c) eps + std z,    c = 1 - SNR_t / SNR_s
        std = sqrt(c) sigma_s (sigma_t / sigma_s)^v

    with z ~ N(0, I) and SNR = alpha^2 / sigma^2.

    Args:
        variance: "small" (v = 0) is the variance of the posterior q(x_s | x_t, x_0). "large" (v = 1) is that of the
            forward step. "learned" takes v = (o + 1) / 2 from o, the second half of the network's output.

    Raises:
        ValueError: for another variance; in `step`, for "learned" and a denoiser without `learned_variance`.

    Reference:
        Ho et al. 2020, arXiv:2006.11239, section 3.2; Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 15.
    """

    variance: str = static(default="small")
    order = 1
    stochastic = True
    mixes = True

    def check(self):
        choose("variance of DDPM", self.variance, VARIANCES)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        c, sigma_t, sigma_s = fresh_noise(schedule, t, s), schedule.sigma(t), schedule.sigma(s)
        v = VARIANCES[self.variance] or 0.0
        std = safe_sqrt(c) * sigma_s ** (1 - v) * sigma_t**v
        return Mix(schedule.alpha(s), sigma_s * safe_sqrt(1 - c), std), safe_divide(sigma_t, sigma_s)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        coefficients, sigma_ratio = now.plan
        scale = None
        if self.variance == "learned":
            if prediction.extra is None:
                raise ValueError(
                    "DDPM: variance 'learned' finds none in the prediction; make the denoiser, and each one that its "
                    "guidance chooses from, with learned_variance=True"
                )
            scale = expand(sigma_ratio, x) ** (0.5 * (prediction.extra + 1))
        return mix(coefficients, prediction, x, key, scale), state, prediction
