"""Data sets from arrays in a file: .npz with samples and perhaps labels, or .npy with samples."""

from pathlib import Path

import numpy as np

from jdiff.core import foreign
from jdiff.data.dataset import DataError, Dataset
from jdiff.data.order import hold_out
from jdiff.data.records import CACHE
from jdiff.data.registry import register_dataset

SAMPLES, LABELS = ("x", "images", "samples", "arr_0"), ("labels", "label", "y", "arr_1")
NAMES = ("class_names", "names")  # of the classes


@register_dataset
def arrays(
    path: str,
    held_out: float = 0.0,
    seed: int = 0,
    labels: bool = True,
    classes: int | None = None,
    cache: int = CACHE,
) -> Dataset:
    """The samples of a .npy file, or of a .npz file under x, images, samples or arr_0.

    Images are uint8 (N, H, W, C) with C from 1 to 4, or (N, H, W), which is read as C = 1. Points are floats (N, D).
    Labels are whole numbers (N,) from 0, in a .npz under labels, label, y or arr_1; the classes may have
    names there, texts under class_names or names. A .npy is mapped and not read: do
    not cut it short while it is in use.

    Args:
        path: the file.
        held_out: the share of the samples that is held out.
        seed: the seed of the draw of those.
        labels: whether labels are read.
        classes: the number of classes. Without it the largest label tells it, and then more than 1,000 classes of which
            fewer than half occur are refused.
        cache: a packed .npz that takes more than these bytes, and more than 100 times its own size, is refused.

    Raises:
        DataError: the file is not there, damaged, or holds anything else.
    """
    file = Path(path).expanduser()
    if not file.is_file():
        raise DataError(f"arrays: there is no file {file}")
    x, of_x, names = _open(file, LABELS if labels else (), cache)
    x = _checked(x, file)
    of_x = None if of_x is None else _checked_labels(of_x, len(x), file)
    keep, held = hold_out(len(x), held_out, seed)
    if len(held) == 0:
        held_x, x = x[:0], x
    else:
        held_x, x = x[held], x[keep]
    pick = (lambda rows: None) if of_x is None else (lambda rows: of_x[rows])
    number = _number(of_x, len(names) if classes is None and names else classes, file)
    if number and names and len(set(names)) != number:
        raise DataError(f"arrays: {file} has {number:,} classes, and {len(set(names)):,} different names for them")
    return Dataset(file.stem, x, pick(keep), held_x, pick(held), number, names if number else ())


def _open(path: Path, of_labels: tuple[str, ...], cache: int):
    """(samples, labels or None, names of the classes) as they are in the file; a .npy is mapped and not read."""
    try:
        with path.open("rb") as file:
            packed = file.read(2) == b"PK"
        if not packed:
            return foreign.map_npy(path), None, ()
        names = foreign.npz_names(path)
        kinds = (SAMPLES, of_labels, NAMES if of_labels else ())
        name, label, of_classes = (next((name for name in known if name in names), None) for known in kinds)
        if name is None:
            have = ", ".join(names) or "nothing"
            raise DataError(f"arrays: {path} holds {have}; expected samples under one of {', '.join(SAMPLES)}")
        wanted = [one for one in (name, label, of_classes) if one is not None]
        found = foreign.read_npz(path, wanted, cache, "give a larger cache=", NAMES)
        texts = () if of_classes is None else _checked_names(found[of_classes], path)
        return found[name], None if label is None else found[label], texts
    except DataError:
        raise
    except (ValueError, OSError) as error:
        raise DataError(f"arrays: {path} is no .npy or .npz file of plain numbers: {error}") from error


def _checked(x: np.ndarray, path: Path) -> np.ndarray:
    expected = "images, uint8 (N, H, W, C) or (N, H, W), or points of a plane, floats (N, D)"
    if x.dtype == np.uint8 and x.ndim == 3:
        x = x[..., None]
    image = x.dtype == np.uint8 and x.ndim == 4
    plane = np.issubdtype(x.dtype, np.floating) and x.ndim == 2
    if not (image or plane) or 0 in x.shape:
        raise DataError(f"arrays: {path} holds {x.dtype} {x.shape}; expected {expected}")
    if image and x.shape[-1] > 4:
        raise DataError(
            f"arrays: {path} holds images {x.shape}, of {x.shape[-1]} channels; expected (N, H, W, C), channels last"
        )
    if plane:
        try:
            x = np.asarray(x, np.float32)
        except MemoryError as error:
            raise DataError(
                f"arrays: {path} holds {x.dtype} {x.shape}, for which there is not enough memory"
            ) from error
        if not np.isfinite(x).all():
            raise DataError(f"arrays: {path} holds numbers that are not finite in float32")
    return x


def _checked_labels(labels: np.ndarray, n: int, path: Path) -> np.ndarray:
    whole = np.issubdtype(labels.dtype, np.integer)
    if labels.shape != (n,) or not whole or labels.min() < 0 or labels.max() >= 2**31:
        raise DataError(
            f"arrays: the labels in {path} are {labels.dtype} {labels.shape}; expected whole numbers from 0, ({n},)"
        )
    return labels.astype(np.int32)


def _checked_names(names: np.ndarray, path: Path) -> tuple[str, ...]:
    if names.ndim != 1 or names.dtype.kind != "U":
        raise DataError(
            f"arrays: the names of the classes in {path} are {names.dtype} {names.shape}; expected texts (classes,)"
        )
    return tuple(map(str, names))


def _number(labels: np.ndarray | None, classes: int | None, path: Path) -> int:
    """The number of classes. Raises DataError where one stray label would make thousands of classes."""
    if labels is None:
        if classes:
            raise DataError(f"arrays: classes={classes}, and {path} has no labels that are read")
        return 0
    largest, occur = int(labels.max()), len(np.unique(labels))
    if classes is not None and largest >= classes:
        raise DataError(
            f"arrays: the labels in {path} go up to {largest:,}; classes={classes} expects 0 to {classes - 1}"
        )
    if classes is None and largest >= max(1000, 2 * occur):
        raise DataError(
            f"arrays: the labels in {path} go up to {largest:,}, and {occur:,} of these classes occur; number the "
            f"classes from 0, or give classes={largest + 1} if there are as many"
        )
    return classes or largest + 1
