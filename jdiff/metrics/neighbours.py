"""Fidelity and variety told apart, by balls about points that reach to their k-th neighbour."""

from typing import NamedTuple

import numpy as np

from jdiff.metrics.points import at_least, blocks, pair, whole


class PrecisionRecall(NamedTuple):
    """Shares in [0, 1]: of the fake points that are near real ones, and of the real points that are near fake ones."""

    precision: float
    recall: float


class DensityCoverage(NamedTuple):
    """Density: real balls that a fake point is in, over k; 1 for equal laws. Coverage: real balls that a fake is in."""

    density: float
    coverage: float


def precision_recall(real, fake, k: int = 3) -> PrecisionRecall:
    """Precision is the share of fake points within the ball of any real point; recall, the share of real within fake.

    The ball of a point reaches to its k-th neighbour in its own set.

    Args:
        real: features, (N, D).
        fake: features, (M, D).
        k: the neighbour; fewer than either set has points.

    Raises:
        ValueError: for other shapes, and a k that is none.

    Reference:
        Kynkaanniemi et al. 2019, arXiv:1904.06991, eq. 1 and 2.
    """
    real, fake, k = _checked("precision_recall", real, fake, k, real_only=False)
    of_real, of_fake = radii(real, k) ** 2, radii(fake, k) ** 2
    recalled = np.zeros(len(real), bool)
    precise = 0
    for here, d in blocks(fake, real):
        precise += int((d <= of_real[None]).any(1).sum())
        recalled |= (d <= of_fake[here, None]).any(0)
    return PrecisionRecall(precise / len(fake), float(recalled.mean()))


def density_coverage(real, fake, k: int = 5) -> DensityCoverage:
    """Density and coverage: like precision and recall, but outliers among the real points count for less.

    Density is the mean over fake points of the number of real balls that they are in, over k. Coverage is the share of
    real balls that hold a fake point; for equal laws and equally many points it is 1 - 2^-k or so.

    Args:
        real: features, (N, D).
        fake: features, (M, D).
        k: the neighbour to which a ball reaches; fewer than the real set has points.

    Raises:
        ValueError: for other shapes, and a k that is none.

    Reference:
        Naeem et al. 2020, arXiv:2002.09797, eq. 3 and 4.
    """
    real, fake, k = _checked("density_coverage", real, fake, k, real_only=True)
    of_real = radii(real, k) ** 2
    covered, inside = np.zeros(len(real), bool), 0
    for _, d in blocks(fake, real):
        within = d <= of_real[None]
        inside += int(within.sum())
        covered |= within.any(0)
    return DensityCoverage(inside / (k * len(fake)), float(covered.mean()))


def radii(points: np.ndarray, k: int) -> np.ndarray:
    """The distance (N,) of each point from its k-th neighbour in its own set."""
    found = np.empty(len(points))
    for here, d in blocks(points, points):
        d[np.arange(len(d)), np.arange(here.start, here.start + len(d))] = np.inf  # not from itself
        found[here] = np.sqrt(np.partition(d, k - 1, axis=1)[:, k - 1])
    return found


def _checked(verb, real, fake, k, *, real_only):
    real, fake = pair(real, fake, verb)
    at_least(verb, 1 if real_only else 2, fake=fake)
    at_least(verb, 2, real=real)
    return real, fake, whole(verb, "k", k, 1, (len(real) if real_only else min(len(real), len(fake))) - 1)
