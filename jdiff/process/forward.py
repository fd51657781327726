"""The forward process and its posterior. `q_sample` is also the deterministic DDIM step, fed with predictions."""

import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, as_time, expand, safe_divide, safe_sqrt
from jdiff.core.checks import check_floating, check_same_shape, check_time
from jdiff.core.keys import normal
from jdiff.process.clock import Schedule, check_schedule, log_snr


def rates(schedule: Schedule, t, x) -> tuple[Array, Array]:
    """(alpha_t, sigma_t) shaped and cast to scale `x`; `t` has shape () or (B,)."""
    check_schedule(schedule)
    check_time(t, x)
    t = as_time(t)
    return expand(schedule.alpha(t), x), expand(schedule.sigma(t), x)


def q_sample(schedule: Schedule, x0: Array, t, eps: Array) -> Array:
    """x_t = alpha_t x_0 + sigma_t eps; with predictions for x_0 and eps, the DDIM step to t.

    >>> import jax.numpy as jnp, jdiff
    >>> x0, eps = jnp.array([[1.0, -1.0]]), jnp.array([[0.0, 2.0]])
    >>> [float(v) for v in jdiff.q_sample(jdiff.Flow(), x0, 0.25, eps)[0]]
    [0.75, -0.25]

    Args:
        schedule: the noise schedule.
        x0: data, (B, ...), floating.
        t: times, () or (B,).
        eps: noise, of the shape of x0.

    Returns:
        x_t, of the shape of x0.

    Raises:
        ValueError: when shapes disagree, an array is not floating, or t is an index.

    Reference:
        Ho et al. 2020, arXiv:2006.11239, eq. 4; Song et al. 2021, arXiv:2010.02502, eq. 12.
    """
    check_same_shape("eps", eps, "x0", x0)
    check_floating("x0", x0)
    check_floating("eps", eps)
    alpha, sigma = rates(schedule, t, x0)
    return alpha * x0 + sigma * eps


def eps_from(schedule: Schedule, x0: Array, x: Array, t) -> Array:
    """The noise implied by x_0 and x_t: (x_t - alpha_t x_0) / sigma_t.

    Args:
        schedule: the noise schedule.
        x0: data or an estimate of it, (B, ...), floating.
        x: x_t, of the shape of x0.
        t: times, () or (B,), with sigma_t > 0.

    Returns:
        eps, of the shape of x0.
    """
    check_same_shape("x0", x0, "x", x)
    check_floating("x0", x0)
    alpha, sigma = rates(schedule, t, x)
    return (x - alpha * x0) / sigma


def fresh_noise(schedule: Schedule, t, s) -> Array:
    """The share of the noise at s that x_t and x_0 leave open: 1 - (alpha_t sigma_s / (alpha_s sigma_t))^2.

    It is 1 - SNR_t / SNR_s: DDPM's posterior variance over sigma_s^2.

    Args:
        schedule: the noise schedule.
        t: times, of any shape.
        s: the earlier times, of the same shape.

    Returns:
        The share, in [0, 1], of the shape of t.
    """
    return -jnp.expm1(jnp.minimum(log_snr(schedule, t) - log_snr(schedule, s), 0))


def q_posterior(schedule: Schedule, x0: Array, x_t: Array, t, s) -> tuple[Array, Array]:
    """The mean and the standard deviation of q(x_s | x_t, x_0) for s < t.

    mean = alpha_s x_0 + sigma_s sqrt(1 - c) (x_t - alpha_t x_0) / sigma_t and std = sigma_s sqrt(c), with
    c = 1 - SNR_t / SNR_s; so (x_0, 0) where sigma_s = 0.

    Args:
        schedule: the noise schedule.
        x0: data, (B, ...), floating.
        x_t: the noisier state, of the shape of x0.
        t: its times, () or (B,).
        s: the earlier times, of the shape of t.

    Returns:
        (mean, std): mean of the shape of x0, std of the shape of t, padded with ones so that it scales x0.

    Raises:
        ValueError: when shapes disagree, or an array is not floating.

    Reference:
        Ho et al. 2020, arXiv:2006.11239, eq. 6 and 7.
    """
    check_same_shape("x0", x0, "x_t", x_t)
    check_floating("x0", x0)
    check_floating("x_t", x_t)
    (alpha_t, sigma_t), (alpha_s, sigma_s) = rates(schedule, t, x_t), rates(schedule, s, x_t)
    kept = safe_divide(alpha_t * sigma_s**2, alpha_s * sigma_t**2)
    std = sigma_s * expand(safe_sqrt(fresh_noise(schedule, t, s)), x_t)
    return alpha_s * x0 + kept * (x_t - alpha_t * x0), std


def prior(schedule: Schedule, key, shape, t=1.0, *, mean=0.0, std=0.0, dtype=jnp.float32) -> Array:
    """Noise to start sampling from: x_t ~ N(alpha_t mean, alpha_t^2 std^2 + sigma_t^2).

    The moments of the data matter where the terminal SNR is not small; left at 0 this is N(0, sigma_t^2).

    Args:
        schedule: the noise schedule.
        key: one key, or (B,) of them; row i depends on (key, i), or on its own key, alone.
        shape: of the result, (B, ...).
        t: one time, where sampling starts.
        mean: the mean of the data, a number or an array of `shape[1:]`.
        std: the standard deviation of the data, likewise.
        dtype: of the result, floating.

    Returns:
        x_t, of the given shape and dtype.

    Raises:
        ValueError: for several times, moments of another shape, or a dtype that is not floating.
    """
    check_schedule(schedule)
    if jnp.ndim(t):
        raise ValueError(f"prior: t has shape {jnp.shape(t)}; expected one time")
    check_time(t, t)
    if np.ndim(shape) != 1 or not all(isinstance(size, (int, np.integer)) and size >= 0 for size in shape):
        raise ValueError(f"prior: shape is {shape}; expected the sizes of the axes, (B, ...)")
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"prior: dtype is {jnp.dtype(dtype)}; noise is floating, as float32")
    centre, scale = moments_at("prior", schedule, shape, t, mean, std, dtype)
    noise = normal(key, shape, dtype)
    return centre[None] + scale[None] * noise


def moments_at(verb: str, schedule: Schedule, shape, t, mean, std, dtype) -> tuple[Array, Array]:
    """The moments of x_t given those of the data: (alpha_t mean, (alpha_t^2 std^2 + sigma_t^2)^(1/2)).

    Args:
        verb: who asks, for the message.
        schedule: the noise schedule.
        shape: of a batch, (B, ...).
        t: one time.
        mean: the mean of the data, a number or an array of `shape[1:]`.
        std: the standard deviation of the data, likewise.
        dtype: of the result, floating.

    Returns:
        (mean, standard deviation), each of `shape[1:]`.

    Raises:
        ValueError: for moments of another shape.
    """
    for name, value in dict(mean=mean, std=std).items():
        if jnp.shape(value) not in ((), tuple(shape[1:])):
            raise ValueError(f"{verb}: {name} has shape {jnp.shape(value)}; expected () or {tuple(shape[1:])}")
    t = as_time(t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    centre = (alpha * jnp.asarray(mean, t.dtype)).astype(dtype)
    scale = jnp.sqrt((alpha * jnp.asarray(std, t.dtype)) ** 2 + sigma**2).astype(dtype)
    return jnp.broadcast_to(centre, shape[1:]), jnp.broadcast_to(scale, shape[1:])
