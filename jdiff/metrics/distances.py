"""Distances between sets of points (N, D): Frechet, kernel, energy, sliced Wasserstein, nearest neighbour."""

from typing import NamedTuple

import numpy as np

from jdiff.metrics.moments import Moments, check_gaussian
from jdiff.metrics.points import at_least, blocks, pair, squares, whole


class Estimate(NamedTuple):
    """A value, and the standard deviation of what it is the mean of."""

    value: float
    std: float


def frechet(a: np.ndarray, b: np.ndarray) -> float:
    """`frechet_distance` of the moments of two sets of points.

    >>> frechet(np.array([[0.0], [2.0]]), np.array([[3.0], [5.0]]))  # equal covariances, means 3 apart
    9.0

    Args:
        a: features, (N, D).
        b: features, (M, D).

    Raises:
        ValueError: they have other shapes, fewer than two rows, or numbers that are not finite.

    Reference:
        Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    a, b = pair(a, b, "frechet")
    at_least("frechet", 2, a=a, b=b)
    of_a, of_b = (np.atleast_2d(np.cov(points.T)) for points in (a, b))
    return frechet_distance(a.mean(0), of_a, b.mean(0), of_b)


def frechet_distance(mean_a, cov_a, mean_b, cov_b) -> float:
    """The squared W2 distance of two Gaussians: |m_a - m_b|^2 + tr(C_a + C_b - 2 (C_a C_b)^(1/2)).

    The trace of the root is the sum of the singular values of C_a^(1/2) C_b^(1/2). These are real and keep their digits
    where covariances are singular, on which the root of the product C_a C_b fails.

    Args:
        mean_a: (D,).
        cov_a: (D, D).
        mean_b: (D,).
        cov_b: (D, D).

    Raises:
        ValueError: for other shapes, and for covariances that are none.

    Reference:
        Dowson & Landau 1982; Heusel et al. 2017, arXiv:1706.08500, eq. 6.
    """
    mean_a, cov_a, mean_b, cov_b = (np.asarray(m, np.float64) for m in (mean_a, cov_a, mean_b, cov_b))
    check_gaussian("frechet_distance", mean_a, cov_a)
    check_gaussian("frechet_distance", mean_b, cov_b)
    if mean_a.shape != mean_b.shape:
        raise ValueError(
            f"frechet_distance: {len(mean_a)} and {len(mean_b)} features; statistics of one network are needed"
        )
    (of_a, trace_a), (of_b, trace_b) = _root("cov_a", cov_a), _root("cov_b", cov_b)
    shared = np.linalg.svd(of_a.T @ of_b, compute_uv=False).sum() if of_a.size and of_b.size else 0.0
    return float(max(((mean_a - mean_b) ** 2).sum() + trace_a + trace_b - 2 * shared, 0.0))


def frechet_of(a: Moments, b: Moments) -> float:
    """`frechet_distance` of streamed moments, of which each is of more points than it has features.

    Raises:
        ValueError: for fewer points: the covariance is then singular, and the distance too large.
    """
    for moments in (a, b):
        d = len(moments.mean)
        if moments.count <= d:
            worth = f"about {frechet_bias(moments):.3g} too large" if moments.count > 1 else "not defined"
            raise ValueError(
                f"frechet_of: {moments.count} points of {d} features make a Frechet distance {worth}; "
                f"give more than {d} points, or use kernel_distance, which is unbiased"
            )
    return frechet_distance(a.mean, a.covariance, b.mean, b.covariance)


def frechet_bias(moments: Moments) -> float:
    """How far the Frechet distance of so many points from their own law is expected to be above 0, for a Gaussian law.

    To first order in 1/N it is (5/4 tr C + 1/2 sum_ij l_i l_j / (l_i + l_j)) / N, l being the eigenvalues of C. It is a
    good estimate where N is several times D, and the order of magnitude elsewhere.
    """
    C = moments.covariance
    values = np.maximum(np.linalg.eigvalsh(C), 0)
    values = values[values > 0]
    shared = (values[:, None] * values / (values[:, None] + values)).sum()
    return float((1.25 * np.trace(C) + 0.5 * shared) / moments.count)


def kernel_distance(a, b, *, subsets: int = 100, size: int | None = None, seed: int = 0) -> Estimate:
    """The kernel inception distance: the unbiased squared MMD under the kernel (x.y / D + 1)^3, over random subsets.

    Args:
        a: features, (N, D).
        b: features, (M, D).
        subsets: how many subsets are drawn.
        size: of a subset; the smaller of 1000 and half of the smaller set if None.
        seed: the seed of the draw.

    Returns:
        (the mean over subsets, their standard deviation). The mean is unbiased, and may be below 0.

    Raises:
        ValueError: for other shapes, and subsets larger than a set.

    Reference:
        Binkowski et al. 2018, arXiv:1801.01401, section 4; Gretton et al. 2012, eq. 3.
    """
    a, b = pair(a, b, "kernel_distance")
    at_least("kernel_distance", 4, a=a, b=b)
    least = min(len(a), len(b))
    subsets = whole("kernel_distance", "subsets", subsets, 1)
    size = min(1000, least // 2) if size is None else whole("kernel_distance", "size", size, 2, least)
    random, values = np.random.default_rng(seed), []
    for _ in range(subsets):
        x, y = (points[random.permutation(len(points))[:size]] for points in (a, b))
        values.append(_unbiased(*((u @ v.T / a.shape[1] + 1) ** 3 for u, v in ((x, x), (x, y), (y, y)))))
    return Estimate(float(np.mean(values)), float(np.std(values)))


def mmd(a, b, scale: float | None = None) -> float:
    """The unbiased squared maximum mean discrepancy under the kernel exp(-|x - y|^2 / (2 scale^2)).

    Args:
        a: points, (N, D).
        b: points, (M, D).
        scale: of the kernel; the median distance of the points of both sets if None.

    Raises:
        ValueError: for other shapes, fewer than two points, or a scale that is not positive.

    Reference:
        Gretton et al. 2012, "A kernel two-sample test", eq. 3.
    """
    a, b = pair(a, b, "mmd")
    at_least("mmd", 2, a=a, b=b)
    if scale is None:
        some = np.concatenate([_spread(a, 500), _spread(b, 500)])  # a thousand tell the median
        scale = float(np.sqrt(np.median(squares(some, some)[np.triu_indices(len(some), 1)])))
        scale = scale or 1.0  # of points that are all the same
    if not (isinstance(scale, (int, float, np.number)) and 0 < scale < np.inf):
        raise ValueError(f"mmd: scale must be positive, got {scale!r}")
    return _mean_over_pairs(a, b, lambda d: np.exp(-d / (2 * scale**2)), 1.0)


def energy_distance(a, b) -> float:
    """The energy distance, unbiased: 2 E|x - y| - E|x - x'| - E|y - y'|. It is 0 for equal laws, and may be below it.

    Args:
        a: points, (N, D).
        b: points, (M, D).

    Raises:
        ValueError: for other shapes, or fewer than two points.

    Reference:
        Szekely & Rizzo 2013, "Energy statistics", eq. 5.
    """
    a, b = pair(a, b, "energy_distance")
    at_least("energy_distance", 2, a=a, b=b)
    return -_mean_over_pairs(a, b, np.sqrt, 0.0)


def sliced_wasserstein(a: np.ndarray, b: np.ndarray, slices: int = 256, seed: int = 0) -> float:
    """The sliced Wasserstein distance: the root of the mean over directions of W2^2 of the projections.

    Args:
        a: points, (N, D).
        b: points, (N, D).
        slices: the number of directions; in the plane they are evenly spaced, else they are drawn.
        seed: the seed of that draw.

    Raises:
        ValueError: the sets differ in size, or have other shapes.

    Reference:
        Bonneel et al. 2015, Journal of Mathematical Imaging and Vision 51.
    """
    a, b = pair(a, b, "sliced_wasserstein")
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
    """The Euclidean distances (N,) from each point of a (N, D) to the nearest point of b (M, D).

    Where those of samples to the training data are far below those of held-out data, the samples are copies.

    Raises:
        ValueError: for other shapes, or an empty b.
    """
    a, b = pair(a, b, "nearest_distance")
    at_least("nearest_distance", 1, b=b)
    return np.concatenate([np.sqrt(d.min(1)) for _, d in blocks(a, b)] or [np.zeros(0)])


def _root(name, covariance) -> tuple[np.ndarray, float]:
    """(R with R R^T = C and as many columns as C has eigenvalues that are not 0, tr C)."""
    values, axes = np.linalg.eigh(covariance)
    most = np.abs(values).max(initial=0)
    if values.min(initial=0) < -1e-5 * most:
        raise ValueError(f"frechet_distance: {name} has an eigenvalue of {values.min():.3g}; it is no covariance")
    keep = values > len(values) * np.finfo(float).eps * most
    return axes[:, keep] * np.sqrt(values[keep]), float(np.trace(covariance))


def _unbiased(of_a, between, of_b) -> float:
    """The unbiased squared MMD of the three matrices of a kernel."""
    n, m = between.shape
    own = (of_a.sum() - np.trace(of_a)) / (n * (n - 1)) + (of_b.sum() - np.trace(of_b)) / (m * (m - 1))
    return float(own - 2 * between.mean())


def _mean_over_pairs(a, b, kernel, at_itself) -> float:
    """`_unbiased` of a kernel of the squared distance, which is `at_itself` at 0, in blocks."""

    def total(u, v):
        return sum(float(kernel(d).sum()) for _, d in blocks(u, v))

    n, m = len(a), len(b)
    own = (total(a, a) - n * at_itself) / (n * (n - 1)) + (total(b, b) - m * at_itself) / (m * (m - 1))
    return own - 2 * total(a, b) / (n * m)


def _spread(points, n):
    """n of the points, evenly spread over their order."""
    return points[np.unique(np.linspace(0, len(points) - 1, min(n, len(points))).astype(int))]
