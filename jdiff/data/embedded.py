"""Data sets that scikit-learn contains or makes, so nothing is downloaded."""

import numpy as np

from jdiff.core.extras import needs
from jdiff.data.dataset import Dataset
from jdiff.data.registry import register_dataset


@register_dataset
def digits(held_out: float = 0.2, seed: int = 0) -> Dataset:
    """scikit-learn's 1,797 handwritten digits: scans of 8x8 pixels with 17 grey levels, in 10 classes.

    Samples are uint8 (N, 8, 8, 1); the grey level g of 0..16 is stored as round(255 g / 16).

    Args:
        held_out: the share of each class that is held out.
        seed: the seed of the draw of those.

    Raises:
        ValueError: held_out is not between 0 and 1.
    """
    with needs("jdiff.data needs"):
        from sklearn.datasets import load_digits
        from sklearn.model_selection import train_test_split

    if not 0 < held_out < 1:
        raise ValueError(f"digits: held_out is a share of the data, between 0 and 1; got {held_out}")
    images, labels = load_digits(return_X_y=True)
    x = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    x, held_x, labels, held_labels = train_test_split(x, labels, test_size=held_out, random_state=seed, stratify=labels)
    return Dataset("digits", x, labels, held_x, held_labels, classes=10)


def scurve_points(n: int, seed: int, noise: float = 0.1) -> np.ndarray:
    """n fresh points of the S curve seen from its side: coordinates 0 and 2, divided by 10; float32 (n, 2)."""
    with needs("jdiff.data needs"):
        from sklearn.datasets import make_s_curve

    points, _ = make_s_curve(n, noise=noise, random_state=seed)
    return (points[:, [0, 2]] / 10).astype(np.float32)


@register_dataset
def scurve(n: int = 10_000, seed: int = 0, noise: float = 0.1) -> Dataset:
    """The S curve in the plane, n points to train on and as many held out."""
    return Dataset("scurve", scurve_points(n, seed, noise), None, scurve_points(n, seed + 1, noise), None)


@register_dataset
def swiss_roll(n: int = 10_000, seed: int = 0, noise: float = 0.5) -> Dataset:
    """The Swiss roll seen from its side, coordinates 0 and 2 divided by 15; n points, and as many held out."""
    with needs("jdiff.data needs"):
        from sklearn.datasets import make_swiss_roll

    def points(seed):
        return make_swiss_roll(n, noise=noise, random_state=seed)[0][:, [0, 2]] / 15

    return _plane("swiss_roll", points, seed)


@register_dataset
def moons(n: int = 10_000, seed: int = 0, noise: float = 0.05) -> Dataset:
    """Two interleaved half circles of radius 1, their common centre moved to 0; n points, and as many held out."""
    with needs("jdiff.data needs"):
        from sklearn.datasets import make_moons

    def points(seed):
        return make_moons(n, noise=noise, random_state=seed)[0] - [0.5, 0.25]

    return _plane("moons", points, seed)


@register_dataset
def circles(n: int = 10_000, seed: int = 0, noise: float = 0.05, factor: float = 0.5) -> Dataset:
    """Two concentric circles of radius 1 and `factor`; n points, and as many held out."""
    with needs("jdiff.data needs"):
        from sklearn.datasets import make_circles

    def points(seed):
        return make_circles(n, noise=noise, factor=factor, random_state=seed)[0]

    return _plane("circles", points, seed)


def _plane(name: str, points, seed: int) -> Dataset:
    return Dataset(name, points(seed).astype(np.float32), None, points(seed + 1).astype(np.float32), None)
