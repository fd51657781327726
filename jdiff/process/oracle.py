"""Data whose denoiser is known: Gaussians and mixtures of them, under any schedule. The library's tests rest on them.

If x_0 ~ sum_k w_k N(m_k, C_k), then x_t ~ sum_k w_k N(alpha m_k, alpha^2 C_k + sigma^2 I), and everything about it is
linear algebra. Data are points (B, D). t is () or (B,). All of it can be differentiated, jitted and vmapped.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.scipy.linalg import cho_solve
from jax.scipy.special import logsumexp

from jdiff.core.arrays import Array, as_time
from jdiff.core.checks import check_floating, check_time
from jdiff.core.keys import each
from jdiff.core.pytrees import Noun, concrete, known, noun
from jdiff.process.clock import Schedule, check_schedule
from jdiff.process.forward import eps_from
from jdiff.process.prediction import Denoise, Prediction


def _check_covariances(name: str, covariances, rounding=1e-5) -> None:
    """Raise ValueError for covariances that are not symmetric or have a negative eigenvalue, where they are known."""
    if not known(covariances):
        return
    C = np.asarray(covariances, np.float64)
    most = rounding * np.abs(C).max(initial=0)
    asymmetry = np.abs(C - C.swapaxes(-1, -2)).max(initial=0)
    if not np.isfinite(C).all():
        got = "entries that are not finite"
    elif asymmetry > most:
        got = f"entries that differ from those across the diagonal by up to {asymmetry:.3g}"
    elif (least := np.linalg.eigvalsh(C).min(initial=0)) < -most:
        got = f"the eigenvalue {least:.3g}"
    else:
        return
    raise ValueError(f"{name}: a covariance must be symmetric, without negative eigenvalues; got {got}")


@noun
class GaussianMixture(Noun):
    """x_0 ~ sum_k w_k N(m_k, C_k).

    Args:
        weights: w, (K,), rescaled to sum to 1.
        means: m, (K, D).
        covariances: C, (K, D, D).

    Raises:
        ValueError: when the shapes disagree, a weight is negative, or a covariance is not symmetric and positive.
    """

    # given as arrays or lists, and arrays from then on
    weights: Any  # (K,)
    means: Any  # (K, D)
    covariances: Any  # (K, D, D)

    def check(self):
        for name in ("weights", "means", "covariances"):
            object.__setattr__(self, name, as_time(getattr(self, name)))
        K, D = self.means.shape if self.means.ndim == 2 else (None, None)
        if self.weights.shape != (K,) or self.covariances.shape != (K, D, D):
            raise ValueError(
                f"GaussianMixture: weights {self.weights.shape}, means {self.means.shape}, covariances "
                f"{self.covariances.shape}; expected (K,), (K, D) and (K, D, D)"
            )
        if concrete(self.weights) and not ((np.asarray(self.weights) >= 0).all() and np.sum(self.weights) > 0):
            raise ValueError(f"GaussianMixture: weights must be 0 or more, and not all 0; got {self.weights}")
        _check_covariances("GaussianMixture", self.covariances)

    def denoise(self, schedule: Schedule) -> "MixtureDenoiser":
        """The exact denoiser (x, t) -> E[x_0 | x_t]."""
        return MixtureDenoiser(self, schedule)

    def score(self, schedule: Schedule, x: Array, t) -> Array:
        """grad log p_t(x), (B, D), from the derivative-free formula sum_k r_k (C_k,t)^-1 (alpha m_k - x)."""
        return _per_time(lambda a, s, x: _responses(self, a, s, x)[1], schedule, x, t)

    def log_prob(self, schedule: Schedule, x: Array, t) -> Array:
        """log p_t(x), (B,)."""
        return _per_time(lambda a, s, x: logsumexp(_log_joint(self, a, s, x)[0], axis=-1), schedule, x, t)

    def sample(self, key, n: int) -> Array:
        """n points of the data, (n, D), row i a function of (key, i)."""

        def one(key):
            k_which, k_eps = jax.random.split(key)
            k = jax.random.categorical(k_which, jnp.log(self.weights))
            eps = jax.random.normal(k_eps, self.means.shape[1:], self.means.dtype)
            return self.means[k] + jnp.linalg.cholesky(self.covariances)[k] @ eps

        return jax.vmap(one)(each(key, n))

    def posterior(self, A: Array, y: Array, noise_std) -> "GaussianMixture":
        """The mixture of x_0 given y = A x_0 + noise_std eps;  A (M, D), y (M,)."""
        D = self.means.shape[1]
        A, y = jnp.asarray(A), jnp.asarray(y)
        if A.ndim != 2 or A.shape[1] != D or y.shape != A.shape[:1]:
            raise ValueError(f"posterior: A has shape {A.shape} and y {y.shape}; expected (M, {D}) and (M,)")
        noise = noise_std**2 * jnp.eye(len(A), dtype=A.dtype)

        def condition(m, C):
            chol = jnp.linalg.cholesky(A @ C @ A.T + noise)
            gain = cho_solve((chol, True), A @ C).T
            return _log_normal(chol, y - A @ m), m + gain @ (y - A @ m), C - gain @ A @ C

        evidence, means, covariances = jax.vmap(condition)(self.means, self.covariances)
        return GaussianMixture(jax.nn.softmax(jnp.log(self.weights) + evidence), means, covariances)

    def moments(self) -> tuple[Array, Array]:
        """(mean (D,), covariance (D, D)) of the data."""
        w = (self.weights / self.weights.sum())[:, None]
        mean = (w * self.means).sum(0)
        away = self.means - mean[None]
        return mean, (w[..., None] * (self.covariances + away[:, :, None] * away[:, None, :])).sum(0)


@noun
class Gaussian(Noun):
    """x_0 ~ N(mean, covariance): a mixture of one, with its probability flow in closed form.

    Args:
        mean: (D,).
        covariance: (D, D).

    Raises:
        ValueError: when the shapes disagree, or the covariance is not symmetric and positive.
    """

    # given as arrays or lists, and arrays from then on
    mean: Any  # (D,)
    covariance: Any  # (D, D)

    def check(self):
        for name in ("mean", "covariance"):
            object.__setattr__(self, name, as_time(getattr(self, name)))
        if self.mean.ndim != 1 or self.covariance.shape != self.mean.shape * 2:
            raise ValueError(
                f"Gaussian: mean {self.mean.shape} and covariance {self.covariance.shape}; expected (D,) and (D, D)"
            )
        _check_covariances("Gaussian", self.covariance)

    @property
    def mixture(self) -> GaussianMixture:
        """This Gaussian as a mixture of one component."""
        return GaussianMixture(jnp.ones(1, self.mean.dtype), self.mean[None], self.covariance[None])

    def denoise(self, schedule: Schedule) -> "MixtureDenoiser":
        """The exact denoiser (x, t) -> E[x_0 | x_t]."""
        return self.mixture.denoise(schedule)

    def score(self, schedule: Schedule, x: Array, t) -> Array:
        """grad log p_t(x), (B, D)."""
        return self.mixture.score(schedule, x, t)

    def log_prob(self, schedule: Schedule, x: Array, t) -> Array:
        """log p_t(x), (B,)."""
        return self.mixture.log_prob(schedule, x, t)

    def sample(self, key, n: int) -> Array:
        """n points of the data, (n, D), row i a function of (key, i)."""
        return self.mixture.sample(key, n)

    def posterior(self, A: Array, y: Array, noise_std) -> "Gaussian":
        """The Gaussian of x_0 given y = A x_0 + noise_std eps;  A (M, D), y (M,)."""
        one = self.mixture.posterior(A, y, noise_std)
        return Gaussian(one.means[0], one.covariances[0])

    def flow(self, schedule: Schedule, x: Array, t, s) -> Array:
        """The exact probability-flow map from t to s, (B, D):  alpha_s m + S_s^(1/2) S_t^(-1/2) (x - alpha_t m).

        S_t = alpha_t^2 C + sigma_t^2 I; all S_t share C's axes, so the flow only rescales along them. t, s: ().
        """
        t, s = as_time(t), as_time(s)
        variances, axes = jnp.linalg.eigh(self.covariance)
        std = [jnp.sqrt(schedule.alpha(u) ** 2 * variances + schedule.sigma(u) ** 2) for u in (t, s)]
        away = (x - (schedule.alpha(t) * self.mean)[None]) @ axes
        return (schedule.alpha(s) * self.mean)[None] + (away * (std[1] / std[0])[None]) @ axes.T


@noun
class MixtureDenoiser(Denoise):
    """E[x_0 | x_t] of a mixture under a schedule, as a pytree."""

    mixture: GaussianMixture
    schedule: Schedule

    def predict(self, x: Array, t) -> Prediction:
        """(E[x_0 | x_t], E[eps | x_t]), each (B, D)."""

        def one(alpha, sigma, x):
            mixture = self.mixture
            r, _, away = _responses(mixture, alpha, sigma, x)
            shift = alpha * jnp.einsum("kde,bke->bkd", mixture.covariances, away)
            return jnp.einsum("bk,bkd->bd", r, mixture.means[None] + shift)

        x0 = _per_time(one, self.schedule, x, t).astype(x.dtype)
        return Prediction(x0, eps_from(self.schedule, x0, x, t))


def _per_time(f, schedule, x, t):
    """f(alpha, sigma, x) at one time, or vmapped over the rows of x when t is (B,)."""
    check_schedule(schedule)
    check_time(t, x)
    check_floating("x", x)
    t = as_time(t)
    alpha, sigma = schedule.alpha(t).astype(x.dtype), schedule.sigma(t).astype(x.dtype)
    if t.ndim == 0:
        return f(alpha, sigma, x)
    return jax.vmap(lambda a, s, x: f(a, s, x[None])[0])(alpha, sigma, x)


def _log_normal(chol, away):
    """log N(away; 0, L L^T) for one vector."""
    z = jax.scipy.linalg.solve_triangular(chol, away, lower=True)
    return -0.5 * z @ z - jnp.log(jnp.diagonal(chol)).sum() - 0.5 * len(away) * jnp.log(2 * jnp.pi)


def _log_joint(mixture, alpha, sigma, x):
    """(log w_k N(x; alpha m_k, C_k,t) (B, K), Cholesky factors of C_k,t (K, D, D), x - alpha m_k (B, K, D))."""
    D = x.shape[-1]
    chol = jnp.linalg.cholesky(alpha**2 * mixture.covariances + sigma**2 * jnp.eye(D, dtype=x.dtype)[None])
    away = x[:, None] - alpha * mixture.means[None]
    log_normal = jax.vmap(jax.vmap(_log_normal), (None, 0))(chol, away)
    log_weights = jnp.log(mixture.weights) - jnp.log(mixture.weights.sum())
    return log_weights[None] + log_normal, chol, away


def _responses(mixture, alpha, sigma, x):
    """(responsibilities (B, K), score (B, D), C_k,t^-1 (x - alpha m_k) (B, K, D))."""
    log_joint, chol, away = _log_joint(mixture, alpha, sigma, x)
    r = jax.nn.softmax(log_joint, axis=-1)
    solved = jax.vmap(jax.vmap(lambda L, v: cho_solve((L, True), v)), (None, 0))(chol, away)
    return r, -jnp.einsum("bk,bkd->bd", r, solved), solved
