"""Sequential Monte Carlo over the reverse process: weighted particles of the posterior, and the evidence."""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.scipy.special import logsumexp

from jdiff.core.arrays import Array, wide
from jdiff.core.checks import check_is
from jdiff.core.keys import as_key, fold, normal
from jdiff.core.pytrees import concrete, known, number
from jdiff.guidance.base import as_pytree
from jdiff.posterior.kld import KLD
from jdiff.posterior.linear import dots
from jdiff.posterior.potentials import difference
from jdiff.posterior.resampling import Resampling, systematic
from jdiff.posterior.twisted import Ahead, Twisted, check_function, check_iterations, checked
from jdiff.process.clock import Schedule
from jdiff.process.forward import prior
from jdiff.process.memory import has_memory, has_own_noise
from jdiff.process.prediction import Denoise, Prediction, as_denoise
from jdiff.process.times import check_times
from jdiff.solvers.base import Mix
from jdiff.solvers.ddim import DDIM


class Particles(NamedTuple):
    """Weighted particles of x_0 given the likelihood.

    Attributes:
        x: x_0 of each particle, (n, ...).
        log_weights: normalised, (n,): their exponentials sum to 1. Particles that are out of use have -inf.
        log_evidence: the estimate of log E[likelihood(x_0)], (); its exponential is unbiased.
        ess: the effective sample size at each time before resampling, (N,); the last is that of `log_weights`.
        resampled: whether the particles were resampled at each time but the last, (N - 1,).
        ancestors: which particle each one continued at each time but the last, (N - 1, n).
        counts: how many particles were in use at each time, (N,); all n without `adapt`.
    """

    x: Array
    log_weights: Array
    log_evidence: Array
    ess: Array
    resampled: Array
    ancestors: Array
    counts: Array

    @property
    def mean(self) -> Array:
        """The weighted mean of x_0, of the shape of one sample."""
        return jnp.tensordot(jnp.exp(self.log_weights).astype(self.x.dtype), self.x, 1)

    @property
    def covariance(self) -> Array:
        """The weighted covariance of x_0 as vectors, (D, D)."""
        away = (self.x - self.mean[None]).reshape(len(self.x), -1)
        return jnp.einsum("n,ni,nj->ij", jnp.exp(self.log_weights).astype(self.x.dtype), away, away)

    @property
    def saved(self) -> Array:
        """The share of the particles' steps that `adapt` found needless, ()."""
        return 1 - self.counts.mean() / len(self.x)

    def draw(self, key, resampling: Resampling = systematic) -> Array:
        """n samples of equal weights, (n, ...), by resampling once."""
        return self.x[resampling(key, self.log_weights)]


class _State(NamedTuple):
    """What goes from one time to the next.

    The log weights since the last resampling are `carried` + `potential`. They are kept apart, so that a particle whose
    likelihood is 0 at one time may have another at the next. `carried` is -inf for particles out of use.
    """

    x: Array
    carried: Array
    potential: Array
    log_evidence: Array
    used: Array


def smc(
    denoise: Denoise | Callable,
    schedule: Schedule,
    key,
    shape: Sequence[int],
    times: Array,
    log_likelihood: Callable[[Array], Array],
    *,
    ess=0.5,
    eta=1.0,
    proposal: Denoise | None = None,
    twist: Callable[[Array, Array], Array] | None = None,
    iterations: int = 3,
    potential: Callable[[Array, Array], Array] = difference,
    resampling: Resampling = systematic,
    adapt: KLD | None = None,
    mean: Any = 0.0,
    std: Any = 0.0,
    sharding=None,
) -> Particles:
    """Weighted particles of p(x_0) exp(log_likelihood(x_0)) / Z, and log Z.

    Particles start from noise and move by the steps of DDIM(eta) of `proposal`. They are weighed by the twist, a
    forecast of the log-likelihood from x_t, and by the ratio of the denoiser's own step to the proposal's. Where the
    weights become uneven they are resampled. At the end the likelihood of x_0 itself takes the place of the twist. So
    the weighted particles are right for any proposal and twist as n grows, for the law of x_0 that the denoiser's steps
    sample, and the estimate of Z is unbiased for each n.

    With the defaults it is the twisted diffusion sampler, whose proposal and twist both look ahead to the likelihood
    along its gradient: see `twisted`. With `proposal=denoise` it is Feynman-Kac steering, which asks for no gradient.
    Any reward(x_0) / temperature may stand for the log-likelihood.

    A time costs one evaluation of the denoiser, and `iterations` vector-Jacobian products, or none for
    `proposal=denoise`, or what another proposal costs. It can be jitted, vmapped over keys, and
    sharded. In reverse mode the resampling has no derivative.

    Args:
        denoise: a denoiser, or a function (x, t) -> E[x_0 | x_t].
        schedule: the schedule of the process.
        key: one key.
        shape: (n, ...), n being the number of particles.
        times: (N,), descending, as for `sample`.
        log_likelihood: a function from x_0 (n, ...) to (n,): `likelihood(A, y, noise_std)`, or a reward / temperature.
        ess: the share of n to which the effective sample size must fall for a resampling, 0 for never and 1 for always.
        eta: how much noise the steps renew, positive: see `solvers.DDIM`.
        proposal: the denoiser by whose steps the particles move, as `mmps` makes one; None for `twisted`, and `denoise`
            itself for free steps.
        twist: a function from (the estimate of x_0 (n, ...), t) to (n,) in place of the log-likelihood on the way. The
            proposal None looks ahead from it.
        iterations: how far the proposal None looks ahead: see `twisted`. A precise y needs as many as there are
            directions in which it says different things.
        potential: what is made of the twists so far: one of `potentials`.
        resampling: one of `resampling`.
        adapt: how many particles are kept at each resampling: see `KLD`; None for all of them.
        mean: the mean of the data, a number or an array of `shape[1:]`, for the start: see `prior`.
        std: the standard deviation of the data, likewise. The steps too add the variance of x_0 given x_t that data
            N(mean, std^2) has, and are exact for that data. 0 is DDIM's own, the least.
        sharding: a `jax.sharding.Sharding` of the particles, over their first axis; resampling crosses devices.

    Returns:
        The particles. Where every likelihood is 0, the evidence is and the weights are equal.

    Raises:
        TypeError: for functions that cannot be called, and keys that are none.
        ValueError: for numbers out of range, a log-likelihood of another shape, or of nan where it can be seen.

    Reference:
        Wu et al. 2023, arXiv:2306.17775, algorithm 1; Singhal et al. 2025, arXiv:2501.06848, algorithm 1.
    """
    times, original, denoise = check_times(schedule, times), denoise, as_denoise(denoise, schedule)
    _check(key, shape, log_likelihood, ess, eta, twist, potential, resampling, adapt)
    check_iterations("smc", iterations)
    key, n = as_key(key), int(shape[0])
    free = proposal is original
    mover = None if proposal is None or free else as_denoise(proposal, schedule)
    for one in (denoise, mover):
        if one is not None and (has_own_noise(one) or has_memory(one, jnp.zeros(shape))):
            raise ValueError(
                "smc: steps of CFG++ and of denoisers with a memory, as APG with momentum, have no density"
            )

    def place(x):
        return x if sharding is None else lax.with_sharding_constraint(x, sharding)

    def weigh(x0, t):
        return checked(log_likelihood(x0) if twist is None else twist(x0, t), x0)

    def look(x, t) -> Ahead:
        """The prediction of the denoiser, that of the proposal, and the twist."""
        if mover is None and not free:
            return Twisted(denoise, as_pytree(lambda x0: weigh(x0, t)), int(iterations)).ahead(x, t)
        own = denoise.predict(x, t)
        return Ahead(own, own if mover is None else mover.predict(x, t), weigh(own.x0, t))

    def body(state: _State, step):
        i, t, coefficients = step
        own, moved, value = look(state.x, t)
        now = potential(state.potential, value)
        log_weights = state.carried + now
        size = effective(log_weights)
        due = ((size <= ess * state.used) | (jnp.asarray(ess) >= 1)) & (size > 0)
        k_draw, k_count = fold(fold(key, 1), i), fold(fold(key, 2), i)
        alive, log_mean = normalised(log_weights, state.used)
        count = state.used
        if adapt is not None:
            needed = adapt.needed(k_count, alive, adapt.cells(state.x, schedule, t))
            count = jnp.where(due, needed.astype(count.dtype), count)
        index = jnp.where(due, resampling(k_draw, alive, count), jnp.arange(n))
        x, own, moved, now = jax.tree.map(lambda a: a[index], (state.x, own[:2], moved[:2], now))
        carried = jnp.where(due, jnp.where(jnp.arange(n) < count, -now, -jnp.inf), state.carried)
        evidence = state.log_evidence + jnp.where(due, log_mean, 0)
        x, log_ratio = _move(coefficients, Prediction(*own), Prediction(*moved), x, fold(fold(key, 3), i))
        state = _State(place(x), carried + log_ratio.astype(carried.dtype), now, evidence, count)
        return state, (size, due, index, state.used)

    x = place(prior(schedule, fold(key, 0), tuple(shape), times[0], mean=mean, std=std))
    kind = jax.eval_shape(lambda x: weigh(denoise(x, times[0]), times[0]), x).dtype
    zeros = jnp.zeros(n, kind)
    state = _State(x, zeros, zeros, jnp.zeros((), kind), jnp.asarray(n))
    plan = _plan(schedule, times, eta, std)
    state, (sizes, resampled, ancestors, counts) = lax.scan(body, state, (jnp.arange(len(times) - 1), times[:-1], plan))
    x0 = denoise(state.x, times[-1])
    log_weights = state.carried + checked(log_likelihood(x0), x0)
    final, log_mean = normalised(log_weights, state.used)
    evidence = state.log_evidence + log_mean
    if known(evidence) and np.isnan(evidence):
        raise ValueError("smc: the weights are nan: log_likelihood or the denoiser returned nan, or infinity")
    return Particles(
        x0, final, evidence,
        jnp.append(sizes, effective(log_weights)), resampled, ancestors,
        jnp.append(counts, state.used) if len(times) > 1 else state.used[None],
    )  # fmt: skip


def effective(log_weights: Array) -> Array:
    """The effective sample size (sum w)^2 / sum w^2 of log weights (n,), (); 0 where all weights are 0."""
    top = lax.stop_gradient(log_weights.max())
    w = jnp.exp(log_weights - jnp.where(jnp.isfinite(top), top, 0))
    squares = (w**2).sum()
    return jnp.where(squares == 0, 0, w.sum() ** 2 / jnp.where(squares == 0, 1, squares))


def normalised(log_weights: Array, count) -> tuple[Array, Array]:
    """(log weights that sum to 1, log of the mean weight of the first `count`); equal ones where all weights are 0."""
    total = logsumexp(log_weights)
    equal = jnp.where(jnp.arange(len(log_weights)) < count, -jnp.log(count), -jnp.inf)
    nothing = total == -jnp.inf
    finite = log_weights - jnp.where(nothing, 0, total)
    return jnp.where(nothing, equal, finite).astype(log_weights.dtype), total - jnp.log(count).astype(total.dtype)


def _plan(schedule: Schedule, times: Array, eta, std) -> Mix:
    """The steps of DDIM(eta), with the variance that x_0 given x_t adds to x_s where the data is N(m, std^2)."""
    mean = DDIM(eta).plan(schedule, times, len(times))
    std = jnp.asarray(std, times.dtype)

    def shaped(a):
        return a.reshape(a.shape + (1,) * std.ndim)

    alpha, sigma = shaped(schedule.alpha(times[:-1])), shaped(schedule.sigma(times[:-1]))
    variance = (sigma * std[None]) ** 2 / (sigma**2 + (alpha * std[None]) ** 2)
    by_x0 = shaped(mean.x0) - shaped(mean.eps) * alpha / sigma
    return mean._replace(noise=jnp.sqrt(shaped(mean.noise) ** 2 + by_x0**2 * variance))


def _move(step: Mix, own: Prediction, moved: Prediction, x: Array, key) -> tuple[Array, Array]:
    """(x_s by the proposal, log of the density of the denoiser's step over the proposal's (n,))."""
    z = wide(normal(key, x.shape, x.dtype))
    centre, other = (wide(step.x0 * wide(p.x0) + step.eps * wide(p.eps)) for p in (moved, own))
    std = step.noise.astype(z.dtype)
    std = jnp.broadcast_to(std, x.shape[1:])[None]
    away = (centre - other) / std
    return (centre + std * z).astype(x.dtype), -dots(z, away) - 0.5 * dots(away, away)


def _check(key, shape, log_likelihood, ess, eta, twist, potential, resampling, adapt) -> None:
    check_is("key", key, (jax.Array, np.ndarray), "a PRNG key: jax.random.key(seed)")
    if as_key(key).ndim:
        raise ValueError(f"smc: keys have shape {as_key(key).shape}; give one key, and vmap over several")
    if np.ndim(shape) != 1 or not len(shape) or not all(isinstance(k, (int, np.integer)) and k > 0 for k in shape):
        raise ValueError(f"smc: shape is {shape}; expected (particles, ...), each 1 or more")
    check_function("log_likelihood", log_likelihood, "a function from x_0 (n, ...) to (n,)")
    check_function("potential", potential, "a function of jdiff.posterior.potentials")
    check_function("resampling", resampling, "a function of jdiff.posterior.resampling")
    if twist is not None:
        check_function("twist", twist, "a function from x_0 (n, ...) and t to (n,)")
    if adapt is not None:
        check_is("adapt", adapt, KLD, "posterior.KLD(...) or None")
    for name, value, least in (("ess", ess, 0), ("eta", eta, np.nextafter(0, 1))):
        if concrete(value) and not (isinstance(number(value), float) and least <= number(value)):
            raise ValueError(f"smc: {name} must be a number, {'0 or more' if not least else 'positive'}; got {value}")
    if concrete(ess) and not number(ess) <= 1:
        raise ValueError(f"smc: ess is a share of the particles, from 0 to 1; got {ess}")
