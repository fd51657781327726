"""Guidance by the gradient of a log-likelihood of the estimate of x_0, the proposal of twisted sampling."""

from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array
from jdiff.core.pytrees import noun, static, vary_as
from jdiff.guidance.base import as_pytree
from jdiff.posterior.linear import dots, rows, share
from jdiff.posterior.observation import Observation, observe
from jdiff.posterior.tweedie import Given, moments
from jdiff.process.prediction import Denoise, Prediction, as_denoise


class Ahead(NamedTuple):
    """What a step needs that looks ahead to the likelihood.

    Attributes:
        own: the prediction of the denoiser.
        moved: the prediction given the likelihood.
        value: log E[exp(log_likelihood(x_0)) | x_t] as far as it is known, (B,).
    """

    own: Prediction
    moved: Prediction
    value: Array


@noun
class Twisted(Given):
    """A denoiser moved along the gradient of a log-likelihood: see `twisted`."""

    base: Denoise
    log_likelihood: Any
    iterations: int = static(default=3)

    def predict_with(self, x: Array, t, memory) -> tuple[Prediction, Any]:
        """The moved x_0, the noise that it implies, and the `extra` of the denoiser."""
        ahead, after = self._ahead(x, t, memory)
        return ahead.moved, after

    def ahead(self, x: Array, t) -> Ahead:
        """The two predictions and the look-ahead, in one evaluation of the denoiser."""
        return self._ahead(x, t, self.memory(x))[0]

    def _ahead(self, x: Array, t, memory) -> tuple[Ahead, Any]:
        prediction, cov, *_, after = moments(self.base, x, t, memory[0])

        def values(x0):
            return checked(self.log_likelihood(x0), x0)

        value, pull = jax.vjp(values, prediction.x0)
        slope = pull(jnp.ones_like(value))[0]
        if self.iterations:
            shift, gain = _look_ahead(cov, jax.grad(lambda x0: values(x0).sum()), prediction.x0, slope, self.iterations)
        else:
            shift, gain = cov(slope), jnp.zeros_like(value)
        own, moved = (self.shifted(prediction, by, x, t) for by in (jnp.zeros_like(shift), shift))
        return Ahead(own, moved, value + gain), (after,)


def _look_ahead(cov, gradient, x0: Array, slope: Array, iterations: int) -> tuple[Array, Array]:
    """(the shift of x_0, log E exp(l(x_0 + z) - l(x_0))) for z ~ N(0, C) and the quadratic l of that slope, bent by H.

    Conjugate gradients for (I + H C) u = slope in the inner product a^T C b, so that each step needs one product with
    C. The shift is C u; the pivots 1 / length of the steps are those of I + H C, and give its determinant.
    """

    def step(carry, _):
        shift, gain, r, p, Cp, before, enough = carry
        Cr = cov(r)
        size = dots(r, Cr)
        going = size > enough
        ratio = rows(share(going & (before > 0), size, before), r)
        p, Cp = r + ratio * p, Cr + ratio * Cp
        HCp = -jax.jvp(gradient, (x0,), (Cp,))[1]
        curvature = dots(p, Cp) + dots(Cp, HCp)
        # no pivot of I + H C is below 1 unless the likelihood bends upwards, which is left out
        bent = going & (curvature > size)
        length = jnp.where(bent, share(bent, size, curvature), jnp.where(going, 1, 0))
        gain = gain + 0.5 * length * size + 0.5 * jnp.log(jnp.where(going, length, 1))
        shift, r = shift + rows(length, r) * Cp, r - rows(length, r) * (p + HCp)
        enough = jnp.where(before == 0, jnp.finfo(size.dtype).eps * size, enough)
        return vary_as((shift, gain, r, p, Cp, jnp.where(going, size, before), enough), carry), None

    zero, none = jnp.zeros_like(slope), jnp.zeros_like(dots(slope, slope))
    start = vary_as((zero, none, slope, zero, zero, none, none), slope, cov(slope))
    return jax.lax.scan(step, start, None, iterations)[0][:2]


def twisted(denoise: Denoise | Callable, log_likelihood: Callable[[Array], Array], *, iterations: int = 3) -> Twisted:
    """x_0 <- x_0 + C (I + H C)^-1 g,    C = (sigma^2 / alpha) J^T,

    where g is the gradient of the log-likelihood at x_0, -H its second derivative, and J the Jacobian of the denoiser.
    It takes x_0 given x_t for a Gaussian of covariance C, and the log-likelihood for a quadratic. So it is exact for
    Gaussian data and a Gaussian likelihood, with as many iterations as y has numbers. With a reward / temperature in
    place of the log-likelihood it is reward guidance. H counts only where the log-likelihood bends downwards.

    A call costs one evaluation of the denoiser and `iterations` vector-Jacobian products; one for 0.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        log_likelihood: a function from x_0 (B, ...) to (B,), with two derivatives.
        iterations: steps of conjugate gradients for the inverse. With 0, H is left out as published, and a sharp
            likelihood throws x_0 far beyond what it asks for.

    Returns:
        The denoiser.

    Raises:
        TypeError: for what cannot be called.
        ValueError: for negative iterations, and, in a call, for a log-likelihood of another shape.

    Reference:
        Wu et al. 2023, arXiv:2306.17775, eq. 8, for H = 0.
    """
    check_function("log_likelihood", log_likelihood, "a function from x_0 (B, ...) to (B,)")
    check_iterations("twisted", iterations)
    return Twisted(as_denoise(denoise, None), as_pytree(log_likelihood), int(iterations))


@noun
class Likelihood:
    """log N(y; A(x_0), noise_std^2), a function of x_0: see `likelihood`."""

    observation: Observation

    def __call__(self, x0: Array) -> Array:
        """The log-likelihood of each sample, (B,)."""
        r, _, _, variance = self.observation.beside(x0)
        variance = jnp.broadcast_to(variance, (1, *r.shape[1:]))
        return -0.5 * (dots(r / variance, r) + jnp.log(2 * jnp.pi * variance).sum())


def likelihood(A, y, noise_std) -> Likelihood:
    """log N(y; A(x_0), noise_std^2), normalised, as `smc` and `twisted` take it.

    Args:
        A: a matrix (M, D), or a function from x (B, ...) to (B, ...).
        y: one observation, of the shape of A(x)[0].
        noise_std: the standard deviation of its noise, positive, a number or an array of the shape of y.

    Returns:
        A function from x_0 (B, ...) to (B,).

    Raises:
        ValueError: for a noise_std that is not positive, and, in a call, shapes that disagree.
    """
    return Likelihood(observe(A, y, noise_std, may_be_exact=False))


def check_function(name: str, value, expected: str) -> None:
    """Raise TypeError for a class, and for what cannot be called."""
    if isinstance(value, type) or not callable(value):
        raise TypeError(f"{name} is {value!r}; expected {expected}"[:200])


def check_iterations(name: str, iterations) -> None:
    """Raise ValueError for a number of iterations that is not 0, 1, 2, ..."""
    if isinstance(iterations, bool) or not isinstance(iterations, (int, np.integer)) or iterations < 0:
        raise ValueError(f"{name}: iterations must be a whole number, 0 or more; got {iterations!r}")


def checked(values, x0: Array) -> Array:
    """Log-likelihoods of x_0 after a check of their shape, in float32 at least."""
    shape = np.shape(values)
    if shape != x0.shape[:1]:
        raise ValueError(
            f"log_likelihood returned {shape} for x_0 {x0.shape}; expected one number each, {x0.shape[:1]}"
        )
    return jnp.asarray(values, jnp.promote_types(jnp.result_type(values), jnp.float32))
