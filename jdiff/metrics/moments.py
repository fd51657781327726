"""Means and covariances of features, batch by batch in float64; and their files, as other code bases read them."""

import dataclasses

import numpy as np

from jdiff.core import files, foreign
from jdiff.metrics.points import whole

NAME = "features"  # of the array that says of which network they are


@dataclasses.dataclass(frozen=True)
class Moments:
    """The count, the mean and the scatter of points that came in any number of batches.

    Memory does not grow with the number of points. Batches are merged about their own means: a sum of squares would
    lose digits.

    >>> m = Moments.init(1).update(np.array([[1.0], [2.0]])).update(np.array([[6.0]]))
    >>> m.count, m.mean.tolist(), m.covariance.tolist()
    (3, [3.0], [[7.0]])

    Attributes:
        count: the number of points.
        mean: their mean, (D,).
        scatter: the sum of (x - mean) (x - mean)^T, (D, D).

    Reference:
        Chan, Golub & LeVeque 1983, "Algorithms for computing the sample variance".
    """

    count: int
    mean: np.ndarray
    scatter: np.ndarray

    @classmethod
    def init(cls, d: int) -> "Moments":
        """Those of no points of d numbers."""
        d = whole("Moments.init", "d", d, 1)
        return cls(0, np.zeros(d), np.zeros((d, d)))

    def update(self, features) -> "Moments":
        """Those with further points (N, D) added.

        Raises:
            ValueError: the points have another shape, or hold numbers that are not finite.
        """
        x = np.asarray(features, np.float64)
        if x.ndim != 2 or x.shape[1] != len(self.mean):
            raise ValueError(f"Moments: features have shape {x.shape}; expected (N, {len(self.mean)})")
        if not np.isfinite(x).all():
            raise ValueError("Moments: the features hold numbers that are not finite")
        if not len(x):
            return self
        mean = x.mean(0)
        away = x - mean
        return self.merge(Moments(len(x), mean, away.T @ away))

    def merge(self, other: "Moments") -> "Moments":
        """Those of the points of both, as of several processes."""
        if self.mean.shape != other.mean.shape:
            raise ValueError(f"Moments: {len(self.mean)} and {len(other.mean)} features cannot be merged")
        count = self.count + other.count
        if not count:
            return self
        step, share = other.mean - self.mean, other.count / count
        between = self.count * share * np.outer(step, step)
        return Moments(count, self.mean + share * step, self.scatter + other.scatter + between)

    @property
    def covariance(self) -> np.ndarray:
        """(D, D), the unbiased estimate."""
        if self.count < 2:
            raise ValueError(f"Moments: the covariance of {self.count} points is not defined; it takes 2 or more")
        return self.scatter / (self.count - 1)


def read_statistics(path, features: str | None = None) -> tuple[np.ndarray, np.ndarray]:
    """(mean (D,), covariance (D, D)) of reference features: of a .npz of `mu` and `sigma`, without unpickling anything.

    EDM's files have these arrays, and guided-diffusion's reference batches have them beside their images, `arr_0`.

    Args:
        path: the file.
        features: the network whose features are wanted. If the file names another one, that is an error; if it names
            none, as files of others do, nothing is compared.

    Raises:
        ValueError: the file is damaged, holds no statistics, or those of another network.
        OSError: it cannot be opened.
    """
    try:
        names = foreign.npz_names(path)
        found = foreign.read_npz(path, {"mu", "sigma", NAME})
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error
    if not {"mu", "sigma"} <= set(found):
        raise ValueError(f"{path} holds {', '.join(names) or 'nothing'}; expected `mu` and `sigma`")
    mean, covariance = (np.asarray(found[name], np.float64) for name in ("mu", "sigma"))
    check_gaussian(str(path), mean, covariance)
    own = bytes(found[NAME].astype(np.uint8)).decode(errors="replace") if NAME in found else None
    if features is not None and own not in (None, features):
        raise ValueError(f"{path} has statistics of the features of {own!r}, not of {features!r}; make them anew")
    return mean, covariance


def write_statistics(path, mean, covariance, *, features: str | None = None, images=None) -> None:
    """Write reference statistics as `read_statistics`, EDM and guided-diffusion read them.

    Args:
        path: the file, named .npz.
        mean: (D,).
        covariance: (D, D).
        features: the network whose features they are of, which the file will name.
        images: uint8 (N, H, W, C), for guided-diffusion's other metrics; None for none.

    Raises:
        ValueError: the shapes disagree, or numbers are not finite.
        OSError: the file could not be written.
    """
    mean, covariance = np.asarray(mean, np.float64), np.asarray(covariance, np.float64)
    check_gaussian("write_statistics", mean, covariance)
    arrays = {"mu": mean, "sigma": covariance}
    if features is not None:
        arrays[NAME] = np.frombuffer(features.encode(), np.uint8)
    if images is not None:
        arrays["arr_0"] = np.asarray(images)
    files.write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def check_gaussian(what: str, mean: np.ndarray, covariance: np.ndarray) -> None:
    """Raise ValueError, beginning with `what`, unless they are finite, (D,) and (D, D), and the latter is symmetric."""
    if mean.ndim != 1 or covariance.shape != mean.shape * 2:
        raise ValueError(f"{what}: mean {mean.shape} and covariance {covariance.shape}; expected (D,) and (D, D)")
    if not (np.isfinite(mean).all() and np.isfinite(covariance).all()):
        raise ValueError(f"{what}: mean and covariance hold numbers that are not finite")
    if np.abs(covariance - covariance.T).max(initial=0) > 1e-5 * np.abs(covariance).max(initial=0):
        raise ValueError(f"{what}: the covariance is not symmetric")
