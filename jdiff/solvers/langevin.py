"""Langevin dynamics at one noise level: as a corrector after each step, and alone, annealed."""

import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Number, expand
from jdiff.core.checks import check_range
from jdiff.core.keys import fold, normal, part
from jdiff.core.pytrees import noun, static
from jdiff.solvers.base import check_order, nearly_noise


def _norm(x):
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))


def _repeat(steps: range, body, x):
    """x <- body(j, x) for each j, as a scan: it is differentiated backwards too."""
    return lax.scan(lambda x, j: (body(j, x), None), x, jnp.asarray(steps))[0] if steps else x


NORMS = {
    "expected": lambda score, z, sigma: sigma,
    "sample": lambda score, z, sigma: _norm(z) / _norm(score),
    "batch": lambda score, z, sigma: jnp.mean(_norm(z), keepdims=True) / jnp.mean(_norm(score), keepdims=True),
}


@noun
class Langevin:
    """x <- x + e score + sqrt(2 e) z,  e = 2 (snr r)^2,  `steps` times.

    r is what |z| / |score| is expected to be, sigma_t; or, `norms` = "batch", the ratio of the batch's mean norms, as
    in published code: sample i then depends on the others; or "sample", each sample's own, close to the first in high
    dimension and wrong in low (its steps depend on x: in the plane, variances of 7 times the true one were measured).
    Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5. Raises ValueError for a negative snr or another `norms`.
    """

    snr: Number = 0.16
    steps: int = static(1)
    norms: str = static("expected")

    def check(self):
        check_range(self, 0, snr=self.snr)
        check_order("Langevin, number of steps as", self.steps)
        if self.norms not in NORMS:
            raise ValueError(f"Langevin: unknown norms {self.norms!r}; one of {', '.join(NORMS)}")

    def correct(self, denoise, schedule, x, t, key):
        """`steps` steps of Langevin dynamics on p_t."""
        sigma = schedule.sigma(t)

        def body(j, x):
            score = -denoise.predict(x, t).eps / expand(sigma, x)
            z = normal(fold(key, j), x.shape, x.dtype)
            root = expand(2 * self.snr * NORMS[self.norms](score, z, sigma), x)  # of 2 e
            return x + 0.5 * root**2 * score + root * z

        return _repeat(range(self.steps), body, x)


@noun
class PredictorCorrector:
    """A step of `predictor` from t to s, then `corrector` at s.  Song et al. 2021, arXiv:2011.13456, algorithm 1.

    The corrector moves x, so a `predictor` of several steps has no earlier prediction to use: each of its steps is a
    first one, of first order unless it starts with single steps of a higher order.
    """

    predictor: object
    corrector: object = Langevin()
    order = 1
    stochastic = True

    def plan(self, schedule, times, n, breaks=None):
        return self.predictor.plan(schedule, times, n, jnp.ones(len(times) - 1, bool))

    def init(self, x):
        return self.predictor.init(x)

    def step(self, denoise, schedule, x, now, state, key):
        # keys of their own for the two: solvers may be nested
        x, state, prediction = self.predictor.step(denoise, schedule, x, now, state, part(key, now.t, now.s, 0))
        return self.corrector.correct(denoise, schedule, x, now.s, fold(key, 1)), state, prediction


@noun
class AnnealedLangevin:
    """x <- x + e/2 score + sqrt(e) z, `steps` times at each level, with e = step_size sigma_s^2; SMLD's sampler.

    Between levels x is only rescaled by alpha_s / alpha_t (1 for `VE`). step_size is eps / sigma_L^2 in the words of
    Song & Ermon 2019, arXiv:1907.05600, algorithm 1, whose 2e-5 at sigma_L = 0.01 is 0.2. For exact scores of width
    sigma the level's variance settles at sigma^2 / (1 - step_size / 4). Raises ValueError for a negative step_size.
    """

    step_size: Number = 0.2
    steps: int = static(100)
    order = 1
    stochastic = True

    def check(self):
        check_range(self, 0, step_size=self.step_size)
        check_order("AnnealedLangevin, number of steps as", self.steps)

    def plan(self, schedule, times, n, breaks=None):
        t, s = times[:-1], times[1:]
        no_signal = nearly_noise(schedule, t)
        return jnp.where(
            no_signal,
            schedule.sigma(s) / schedule.sigma(t),
            schedule.alpha(s) / jnp.where(no_signal, 1, schedule.alpha(t)),
        )

    def init(self, x):
        return ()

    def step(self, denoise, schedule, x, now, state, key):
        sigma = schedule.sigma(now.s)
        drift, noise = expand(-0.5 * self.step_size * sigma, x), expand(jnp.sqrt(self.step_size) * sigma, x)

        def move(x, eps, j):
            return x + drift * eps + noise * normal(fold(key, j), x.shape, x.dtype)

        x = expand(now.plan, x) * x
        first = denoise.predict(x, now.s)  # outside of the loop, which its result cannot leave
        x = move(x, first.eps, 0)
        x = _repeat(range(1, self.steps), lambda j, x: move(x, denoise.predict(x, now.s).eps, j), x)
        return x, state, first
