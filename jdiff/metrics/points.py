"""What the metrics share: checks of sets of points, and squared distances in blocks."""

import operator
from collections.abc import Iterator

import numpy as np

BLOCK = 2**24  # numbers of a matrix of distances that are in memory together


def pair(a, b, verb: str = "") -> tuple[np.ndarray, np.ndarray]:
    """Two sets of points (N, D) and (M, D) in float64.

    Raises:
        ValueError: they have other shapes, or hold numbers that are not finite; the message begins with `verb`.
    """
    a, b = np.asarray(a, np.float64), np.asarray(b, np.float64)
    said = f"{verb}: " if verb else ""
    if a.ndim != 2 or b.ndim != 2 or a.shape[1] != b.shape[1]:
        raise ValueError(f"{said}expected points (N, D) and (M, D), got {a.shape} and {b.shape}")
    if not (np.isfinite(a).all() and np.isfinite(b).all()):
        raise ValueError(f"{said}the points hold numbers that are not finite")
    return a, b


def at_least(verb: str, n: int, **sets) -> None:
    """Raise ValueError for a set of fewer than n points."""
    for name, points in sets.items():
        if len(points) < n:
            raise ValueError(f"{verb}: {name} has {len(points)} points; expected {n} or more")


def whole(verb: str, name: str, value, low: int, high: int | None = None) -> int:
    """A setting as an integer. Raises ValueError unless it is one, from `low` to `high`."""
    try:
        number = operator.index(value)
    except TypeError:
        number = None
    if number is None or isinstance(value, bool) or number < low or (high is not None and number > high):
        upto = "" if high is None else f", at most {high}"
        raise ValueError(f"{verb}: {name} must be an integer, {low} or more{upto}, got {value!r}")
    return number


def squares(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Squared Euclidean distances, (N, M)."""
    centre = a.mean(0)  # about which rounding is least
    a, b = a - centre, b - centre
    return np.maximum((a**2).sum(1)[:, None] + (b**2).sum(1)[None] - 2 * a @ b.T, 0)


def blocks(a: np.ndarray, b: np.ndarray) -> Iterator[tuple[slice, np.ndarray]]:
    """(rows of a, their squared distances from all of b), a block at a time."""
    rows = max(1, BLOCK // max(1, len(b)))
    for first in range(0, len(a), rows):
        here = slice(first, first + rows)
        yield here, squares(a[here], b)
