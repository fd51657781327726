"""The data sets that scikit-learn ships or makes: no download."""

import difflib

import numpy as np

from jdiff.data.dataset import Dataset


def scurve_points(n: int, seed: int, noise: float = 0.1) -> np.ndarray:
    """n fresh points of the S curve seen from its side: coordinates 0 and 2, divided by 10; float32 (n, 2)."""
    from sklearn.datasets import make_s_curve

    points, _ = make_s_curve(n, noise=noise, random_state=seed)
    return (points[:, [0, 2]] / 10).astype(np.float32)


def scurve(n: int = 10_000, seed: int = 0, noise: float = 0.1) -> Dataset:
    """The S curve in the plane, n points to train on and as many held out."""
    return Dataset("scurve", scurve_points(n, seed, noise), None, scurve_points(n, seed + 1, noise), None)


def digits(held_out: float = 0.2, seed: int = 0) -> Dataset:
    """scikit-learn's 1,797 handwritten digits, 8x8 real scans with 17 grey levels, split by class.

    uint8 (N, 8, 8, 1), grey level g of 0..16 stored as round(255 g / 16). Raises ValueError unless 0 < held_out < 1.
    """
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    if not 0 < held_out < 1:
        raise ValueError(f"digits: held_out is a share of the data, between 0 and 1; got {held_out}")
    images, labels = load_digits(return_X_y=True)
    x = np.rint(images.reshape(-1, 8, 8, 1) * (255 / 16)).astype(np.uint8)
    labels = labels.astype(np.int32)
    x, held_x, labels, held_labels = train_test_split(x, labels, test_size=held_out, random_state=seed, stratify=labels)
    return Dataset("digits", x, labels, held_x, held_labels, classes=10)


DATASETS = {"digits": digits, "scurve": scurve}


def load(name: str, **args) -> Dataset:
    """The named data set. Raises ValueError for an unknown name, listing the valid ones."""
    if name not in DATASETS:
        close = difflib.get_close_matches(name, DATASETS, 1)
        hint = f" (did you mean {close[0]!r}?)" if close else ""
        raise ValueError(f"unknown data set {name!r}{hint}; one of {', '.join(DATASETS)}")
    return DATASETS[name](**args)
