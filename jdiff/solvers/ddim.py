"""DDIM and DDPM: solvers that keep the predicted x_0 and renew a share of the predicted noise."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, expand, safe_divide, safe_sqrt
from jdiff.core.checks import check_range
from jdiff.core.pytrees import noun, static
from jdiff.process.forward import fresh_noise
from jdiff.solvers.base import Mix, is_positive, mix


@noun
class DDIM:
    """x_s = alpha_s x_0 + sigma_s (sqrt(1 - c) eps + sqrt(c) z), with c = min(eta^2 (1 - SNR_t / SNR_s), 1).

    eta = 0 is deterministic: the probability-flow ODE by Euler in sigma/alpha. eta = 1 is DDPM's ancestral sampling.
    A larger eta renews more of the noise, up to all of it (c = 1), as any step has room for.
    Song et al. 2021, arXiv:2010.02502, eq. 12 and 16. Raises ValueError for an eta that is negative or not finite.
    """

    eta: Number = 0.0
    order = 1

    def check(self):
        check_range(self, 0, eta=self.eta)

    @property
    def stochastic(self):
        return is_positive(self.eta)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        fresh = jnp.minimum(self.eta**2 * fresh_noise(schedule, t, s), 1)
        sigma = schedule.sigma(s)
        return Mix(schedule.alpha(s), sigma * safe_sqrt(1 - fresh), sigma * safe_sqrt(fresh))

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        return mix(now.plan, prediction, x, key), state, prediction


VARIANCES = {"small": 0.0, "large": 1.0, "learned": None}


@noun
class DDPM:
    """x_s ~ N(mean of q(x_s | x_t, x_0 hat), std^2):  std = sqrt(1 - SNR_t / SNR_s) sigma_s (sigma_t / sigma_s)^v.

    variance "small" (v = 0) is the posterior's own, "large" (v = 1) the forward step's, "learned" takes v = (o + 1) / 2
    from the network's second half o.  Ho et al. 2020, arXiv:2006.11239, section 3.2; Nichol & Dhariwal 2021,
    arXiv:2102.09672, eq. 15. Raises ValueError for another variance, or a denoiser that learned none.
    """

    variance: str = static("small")
    order = 1
    stochastic = True

    def check(self):
        if self.variance not in VARIANCES:
            raise ValueError(f"DDPM: unknown variance {self.variance!r}; one of {', '.join(VARIANCES)}")

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        fresh, sigma_t, sigma_s = fresh_noise(schedule, t, s), schedule.sigma(t), schedule.sigma(s)
        v = VARIANCES[self.variance] or 0.0
        noise = safe_sqrt(fresh) * sigma_s ** (1 - v) * sigma_t**v
        return Mix(schedule.alpha(s), sigma_s * safe_sqrt(1 - fresh), noise), safe_divide(sigma_t, sigma_s)

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        prediction = denoise.predict(x, now.t)
        coefficients, growth = now.plan
        scale = None
        if self.variance == "learned":
            if prediction.extra is None:
                raise ValueError(
                    "DDPM: variance 'learned' finds none in the prediction; make the denoiser, and each one that its "
                    "guidance chooses from, with learned_variance=True"
                )
            scale = expand(growth, x) ** (0.5 * (prediction.extra + 1))
        return mix(coefficients, prediction, x, key, scale), state, prediction
