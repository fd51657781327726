"""Langevin dynamics at one noise level: as a corrector after each step, and alone, annealed."""

from typing import Protocol, runtime_checkable

import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, expand
from jdiff.core.checks import check_is, check_range
from jdiff.core.keys import fold, normal, part
from jdiff.core.names import choose
from jdiff.core.pytrees import Noun, noun, static
from jdiff.process.clock import Schedule
from jdiff.process.prediction import Denoise
from jdiff.solvers.base import Solver, check_order, check_solver, nearly_noise


def _norm(x):
    return jnp.sqrt(jnp.sum(x**2, axis=tuple(range(1, x.ndim))))


# (score, z, sigma) -> r, () or (B,)
NORMS = {
    "expected": lambda score, z, sigma: sigma,
    "sample": lambda score, z, sigma: _norm(z) / _norm(score),
    "batch": lambda score, z, sigma: jnp.mean(_norm(z), keepdims=True) / jnp.mean(_norm(score), keepdims=True),
}


def _repeat(steps: range, body, x):
    """x <- body(j, x) for each j: a scan, because reverse mode does not go through `lax.fori_loop`."""
    return lax.scan(lambda x, j: (body(j, x), None), x, jnp.asarray(steps))[0] if steps else x


@runtime_checkable
class Corrector(Protocol):
    """What `PredictorCorrector` asks of a corrector."""

    def correct(self, denoise: Denoise, schedule: Schedule, x: Array, t, key) -> Array:
        """Move x at one noise level.

        Args:
            denoise: the denoiser.
            schedule: the schedule of the process.
            x: x_t, (B, ...).
            t: its time, ().
            key: as in `Solver.step`.

        Returns:
            x_t, (B, ...).
        """
        ...


@noun
class Langevin(Noun):
    """A corrector: `steps` steps of Langevin dynamics at one noise level.

        x <- x + e score + sqrt(2 e) z,    e = 2 (snr r)^2,    z ~ N(0, I)

    Args:
        snr: the signal-to-noise ratio of a step, 0 or more; 0 leaves x as it is.
        steps: how many steps, 1 or more.
        norms: what r is. "expected" takes sigma_t, which is what |z| / |score| is expected to be. "batch" takes the
            ratio of the batch's mean norms, as published code does: sample i then depends on the others. "sample" takes
            each sample's own ratio. In high dimension that is close to "expected". In low dimension it is wrong,
            because the steps then depend on x.

    Raises:
        ValueError: for a negative snr, fewer than one step, or other `norms`.

    Reference:
        Song et al. 2021, arXiv:2011.13456, algorithms 4 and 5.
    """

    snr: Number = 0.16
    steps: int = static(default=1)
    norms: str = static(default="expected")

    def check(self):
        check_range(self, 0, snr=self.snr)
        check_order("Langevin", self.steps, what="steps")
        choose("norms of Langevin", self.norms, NORMS)

    def correct(self, denoise, schedule, x, t, key):
        """`steps` steps of Langevin dynamics on p_t: see `Corrector`."""
        sigma = schedule.sigma(t)

        def langevin_step(j, x):
            score = -denoise.predict(x, t).eps / expand(sigma, x)
            z = normal(fold(key, j), x.shape, x.dtype)
            root = expand(2 * self.snr * NORMS[self.norms](score, z, sigma), x)  # sqrt(2 e)
            return x + 0.5 * root**2 * score + root * z

        return _repeat(range(self.steps), langevin_step, x)


@noun
class PredictorCorrector(Noun):
    """A step of `predictor` from t to s, and then `corrector` at s.

    The corrector moves x. A `predictor` of several steps therefore has no earlier prediction to use: each of its steps
    is a first one, of first order unless it starts with single steps of a higher order.

    Args:
        predictor: any solver.
        corrector: what moves x at one noise level, as `Langevin`.

    Raises:
        TypeError: for what is no solver, and no corrector.

    Reference:
        Song et al. 2021, arXiv:2011.13456, algorithm 1.
    """

    predictor: Solver
    corrector: Corrector = Langevin()
    order = 1
    stochastic = True

    def check(self):
        check_solver("the predictor of PredictorCorrector", self.predictor)
        expected = "a corrector, as solvers.Langevin()"
        check_is("the corrector of PredictorCorrector", self.corrector, Corrector, expected)

    def plan(self, schedule, times, n, breaks=None):
        return self.predictor.plan(schedule, times, n, jnp.ones(len(times) - 1, bool))

    def init(self, x):
        return self.predictor.init(x)

    def step(self, denoise, schedule, x, now, state, key):
        # Solvers may be nested, so the predictor and the corrector have keys of their own.
        predictor_key, corrector_key = part(key, now.t, now.s, 0), fold(key, 1)
        x, state, prediction = self.predictor.step(denoise, schedule, x, now, state, predictor_key)
        return self.corrector.correct(denoise, schedule, x, now.s, corrector_key), state, prediction


@noun
class AnnealedLangevin(Noun):
    """Annealed Langevin dynamics, SMLD's sampler: `steps` steps at each noise level of the grid but the first.

        x <- x + e/2 score + sqrt(e) z,    e = step_size sigma_s^2,    z ~ N(0, I)

    Between levels x is only rescaled by alpha_s / alpha_t, which is 1 for `VE`.

    Args:
        step_size: epsilon / sigma_L^2 in the words of the paper, whose 2e-5 at sigma_L = 0.01 is 0.2; 0 or more. For
            exact scores of width sigma the level's variance settles at sigma^2 / (1 - step_size / 4).
        steps: how many steps at each level, 1 or more.

    Raises:
        ValueError: for a negative step_size, or fewer than one step.

    Reference:
        Song & Ermon 2019, arXiv:1907.05600, algorithm 1.
    """

    step_size: Number = 0.2
    steps: int = static(default=100)
    order = 1
    stochastic = True

    def check(self):
        check_range(self, 0, step_size=self.step_size)
        check_order("AnnealedLangevin", self.steps, what="steps")

    def plan(self, schedule, times, n, breaks=None):
        """What x is multiplied with between levels, (N - 1,)."""
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

        def langevin_step(x, eps, j):
            return x + drift * eps + noise * normal(fold(key, j), x.shape, x.dtype)

        x = expand(now.plan, x) * x
        first = denoise.predict(x, now.s)  # outside of the loop, which its result cannot leave
        x = langevin_step(x, first.eps, 0)
        x = _repeat(range(1, self.steps), lambda j, x: langevin_step(x, denoise.predict(x, now.s).eps, j), x)
        return x, state, first
