"""Distances between sets of points (N, D): Frechet, sliced Wasserstein and nearest neighbour."""

import numpy as np


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """The squared W2 distance of fitted Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    >>> frechet(np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]]))  # equal covariances, means 3 apart
    9.0

    Args:
        a, b: features (N, D) and (M, D).

    Raises:
        ValueError: they have other shapes.

    Reference:
        Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    a, b = _points(a, b)
    Ca, Cb = (np.atleast_2d(np.cov(x.T)) for x in (a, b))
    values, axes = np.linalg.eigh(Ca)
    root = axes * np.sqrt(np.maximum(values, 0)) @ axes.T  # tr (Ca Cb)^1/2 = tr (Ca^1/2 Cb Ca^1/2)^1/2, symmetric
    cross = np.sqrt(np.maximum(np.linalg.eigvalsh(root @ Cb @ root), 0)).sum()
    return float(((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(Ca) + np.trace(Cb) - 2 * cross)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, slices: int = 256, seed: int = 0) -> float:
    """The sliced Wasserstein distance: the root of the mean over directions of W2^2 of the projections.

    Args:
        a, b: points (N, D) each.
        slices: the number of directions; in the plane they are evenly spaced, else they are drawn.
        seed: the seed of that draw.

    Raises:
        ValueError: the sets differ in size, or have other shapes.

    Reference:
        Bonneel et al. 2015, Journal of Mathematical Imaging and Vision 51.
    """
    a, b = _points(a, b)
    if len(a) != len(b):
        raise ValueError(f"sliced_wasserstein: sets of {len(a)} and {len(b)} points; they must be of one size")
    if a.shape[1] == 2:
        angles = np.arange(slices) * np.pi / slices
        directions = np.stack([np.cos(angles), np.sin(angles)])
    else:
        directions = np.random.default_rng(seed).normal(size=(a.shape[1], slices))
        directions /= np.linalg.norm(directions, axis=0)
    return float(np.sqrt(np.mean((np.sort(a @ directions, 0) - np.sort(b @ directions, 0)) ** 2)))


def nearest_distance(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """The Euclidean distances (N,) from each point of a (N, D) to the nearest point of b (M, D)."""
    a, b = _points(a, b)
    squares = (a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T
    return np.sqrt(np.maximum(squares.min(1), 0))


def _points(a, b):
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"expected points (N, D) and (M, D), got {a.shape} and {b.shape}")
    return a, b
