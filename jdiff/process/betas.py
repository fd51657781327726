"""DDPM's noise tables: beta_1, ..., beta_T, in NumPy float64, and the schedule they make.

x_k = sqrt(1 - beta_k) x_{k-1} + sqrt(beta_k) eps, hence alpha_bar_k = prod_{j <= k} (1 - beta_j).
Ho et al. 2020, arXiv:2006.11239, eq. 2 to 4.
"""

import jax.numpy as jnp
import numpy as np

from jdiff.process.table import Discrete

LOG_NSR_CAP = 40.0  # alpha = 2e-9: nothing of the data is left, and every product stays finite in float32


def linear(T: int, start: float = 1e-4, end: float = 0.02) -> np.ndarray:
    """beta_k evenly spaced from `start` to `end`.

    Args:
        T: the number of steps.
        start: beta_1.
        end: beta_T.

    Returns:
        The betas, (T,), in float64.

    Reference:
        Ho et al. 2020, arXiv:2006.11239, section 4.
    """
    _check_ends(start=start, end=end)
    return np.linspace(start, end, _steps(T))


def scaled_linear(T: int, start: float = 0.00085, end: float = 0.012) -> np.ndarray:
    """sqrt(beta_k) evenly spaced: the table of latent diffusion.

    Args:
        T: the number of steps.
        start: beta_1.
        end: beta_T.

    Returns:
        The betas, (T,), in float64.

    Reference:
        Rombach et al. 2022, arXiv:2112.10752.
    """
    _check_ends(start=start, end=end)
    return np.linspace(np.sqrt(start), np.sqrt(end), _steps(T)) ** 2


def cosine(T: int, max_beta: float = 0.999, offset: float = 0.008) -> np.ndarray:
    """alpha_bar_k = cos^2(((k/T) + offset) / (1 + offset) pi/2), the betas capped.

    Args:
        T: the number of steps.
        max_beta: the cap.
        offset: keeps the first betas from being too small.

    Returns:
        The betas, (T,), in float64.

    Reference:
        Nichol & Dhariwal 2021, arXiv:2102.09672, eq. 17.
    """
    t = np.arange(_steps(T) + 1) / T
    alpha_bar = np.cos((t + offset) / (1 + offset) * np.pi / 2) ** 2
    return np.minimum(1 - alpha_bar[1:] / alpha_bar[:-1], max_beta)


def sigmoid(T: int, start: float = 1e-5, end: float = 0.5e-2, low: float = -6.0, high: float = 6.0) -> np.ndarray:
    """beta_k = start + (end - start) sigmoid(l_k), with l_k evenly spaced.

    Args:
        T: the number of steps.
        start: what beta rises from.
        end: what beta rises to.
        low: l_1.
        high: l_T.

    Returns:
        The betas, (T,), in float64.
    """
    return start + (end - start) / (1 + np.exp(-np.linspace(low, high, _steps(T))))


def zero_terminal_snr(betas) -> np.ndarray:
    """A table shifted and scaled so that alpha_bar_T = 0 while alpha_bar_1 stays.

    Args:
        betas: (T,), in (0, 1].

    Returns:
        The new betas, (T,), in float64; the last one is 1.

    Reference:
        Lin et al. 2023, arXiv:2305.08891, algorithm 1.
    """
    root = np.sqrt(np.cumprod(1 - _checked(betas)))
    root = (root - root[-1]) * root[0] / (root[0] - root[-1])
    alpha_bar = root**2
    return np.concatenate([1 - alpha_bar[:1], 1 - alpha_bar[1:] / alpha_bar[:-1]])


def discrete(betas, *, exact: bool = False) -> Discrete:
    """The schedule of a table, its alpha_bar accumulated in float64 on the host.

    Args:
        betas: (T,), in (0, 1], a 1 only at the end.
        exact: whether a last beta of 1 gives alpha = 0 exactly; else log(sigma^2/alpha^2) = 40 there.

    Returns:
        The schedule.

    Raises:
        ValueError: for betas outside (0, 1], or a 1 before the last.
    """
    betas = _checked(betas)
    with np.errstate(divide="ignore"):
        log_bar = np.cumsum(np.log1p(-betas))  # log alpha_bar; -inf after a beta of 1
        log_nsr = np.log(-np.expm1(log_bar)) - log_bar
    last = exact and betas[-1] == 1
    return Discrete(jnp.asarray(np.minimum(log_nsr, LOG_NSR_CAP), float), float(last))


def _steps(T: int) -> int:
    if not isinstance(T, (int, np.integer)) or not 1 <= T <= 1_000_000:
        raise ValueError(f"T is the number of steps of the table, a positive integer up to 1,000,000; got {T!r}")
    return T


def _check_ends(**ends) -> None:
    for name, value in ends.items():
        if not 0 < value <= 1:
            raise ValueError(f"{name} is a beta and must lie in (0, 1]; got {value}")


def _checked(betas) -> np.ndarray:
    betas = np.asarray(betas, np.float64)
    if betas.ndim != 1 or not betas.size:
        raise ValueError(f"betas have shape {betas.shape}; expected (T,) with T >= 1")
    bad = np.flatnonzero(~((betas > 0) & (betas <= 1)))
    if bad.size:
        raise ValueError(f"betas must lie in (0, 1]; betas[{bad[0]}] is {betas[bad[0]]}")
    if (betas[:-1] == 1).any():
        raise ValueError(f"betas[{int(np.argmax(betas == 1))}] is 1, which removes all signal; only the last may be 1")
    return betas
