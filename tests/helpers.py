"""What several test files share: all schedules, a mixture, and the exact probability-flow map."""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax

import jdiff
from jdiff.core.arrays import as_time
from jdiff.core.pytrees import noun
from jdiff.process.forward import rates

SCHEDULES = {
    "vp": jdiff.VP(),
    "subvp": jdiff.SubVP(),
    "ve": jdiff.VE(),
    "edm": jdiff.EDM(),
    "cosine": jdiff.Cosine(),
    "flow": jdiff.Flow(),
}
MORE_SCHEDULES = SCHEDULES | {
    "discrete": jdiff.discrete(jdiff.betas.linear(1000)),
    "zero_snr": jdiff.discrete(jdiff.betas.zero_terminal_snr(jdiff.betas.scaled_linear(1000)), exact=True),
    "shifted": jdiff.Shifted(jdiff.Flow(), 3.0),
}


@functools.partial(jax.jit, static_argnums=0)
def _switch(f, one_of, *args):
    """f(member, *args), traced once for all programs that ask for it."""
    return lax.switch(jnp.asarray(one_of.which, int), [functools.partial(f, one) for one in one_of.members], *args)


def _t_min(schedule):
    return as_time(schedule.t_min)


def _t_max(schedule):
    return as_time(schedule.t_max)


def _alpha(schedule, t):
    return schedule.alpha(t)


def _sigma(schedule, t):
    return schedule.sigma(t)


def _time_at(schedule, alpha, sigma):
    return schedule.time_at(alpha, sigma)


@noun
class OneOf(jdiff.Schedule):
    """The schedule `members[which]`, `which` being a leaf: one compiled program serves all of them.

    Loop over `which`, and do not `vmap` over it: that would compute all members each time.
    """

    members: tuple
    which: Any

    @property
    def t_min(self):
        return _switch(_t_min, self)

    @property
    def t_max(self):
        return _switch(_t_max, self)

    def alpha(self, t):
        return _switch(_alpha, self, as_time(t))

    def sigma(self, t):
        return _switch(_sigma, self, as_time(t))

    def time_at(self, alpha, sigma):
        return _switch(_time_at, self, as_time(alpha), as_time(sigma))


def one_of(name, schedules=SCHEDULES):
    """The schedule of that name as a `OneOf` all of them."""
    return OneOf(tuple(schedules.values()), list(schedules).index(name))


def mixture():
    """Two overlapping Gaussians of full covariance in the plane, in the default dtype."""
    return jdiff.oracle.GaussianMixture(
        np.array([0.4, 0.6]),
        np.array([[0.8, -0.5], [-0.6, 0.7]]),
        np.array([[[0.4, 0.1], [0.1, 0.3]], [[0.3, -0.1], [-0.1, 0.5]]]),
    )


@noun
class Diagonal(jdiff.Denoise):
    """The exact denoiser of N(m, c I), elementwise: compiles in no time."""

    schedule: Any
    m: Any = 0.3
    c: Any = 0.4

    def predict(self, x, t):
        alpha, sigma = rates(self.schedule, t, x)
        x0 = self.m + alpha * self.c / (alpha**2 * self.c + sigma**2) * (x - alpha * self.m)
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t))


@noun
class Bent(jdiff.Denoise):
    """A denoiser that is not affine, elementwise: every method sees its curvature, and it compiles in no time."""

    schedule: Any

    def predict(self, x, t):
        alpha, sigma = rates(self.schedule, t, x)
        x0 = jnp.tanh(alpha * x / (alpha**2 * 0.3 + sigma**2))
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t))


@jax.jit
def _velocity(denoise, schedule, x, t):
    return jdiff.sde.probability_flow(denoise, schedule)(x, t)


def exact_flow(schedule, denoise, x, t, s):
    """The probability-flow map from t to s by SciPy at 1e-11."""
    from scipy.integrate import solve_ivp

    def rhs(t, flat):
        return np.asarray(_velocity(denoise, schedule, flat.reshape(x.shape), t)).ravel()

    solution = solve_ivp(rhs, (float(t), float(s)), np.asarray(x).ravel(), method="DOP853", rtol=1e-11, atol=1e-11)
    assert solution.success
    return solution.y[:, -1].reshape(x.shape)


@functools.cache
def jitted_sample():
    """`jax.jit(jdiff.sample)` as its users jit it."""
    return jax.jit(jdiff.sample, static_argnames=("path", "checkpoint"))
