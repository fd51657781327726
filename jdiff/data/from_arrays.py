"""Arrays in a file: .npz with samples and perhaps labels, or .npy."""

from pathlib import Path

import numpy as np

from jdiff.data.dataset import DataError, Dataset
from jdiff.data.order import hold_out
from jdiff.data.registry import register_dataset

SAMPLES, LABELS = ("x", "images", "samples", "arr_0"), ("labels", "label", "y", "arr_1")


@register_dataset
def arrays(path: str, held_out: float = 0.0, seed: int = 0, labels: bool = True) -> Dataset:
    """Samples of a .npy file, or of a .npz file under x, images, samples or arr_0.

    Images are uint8 (N, H, W, C), C in 1 to 4, or (N, H, W), read as C = 1; planes are floats (N, D). Labels (N,), of
    whole numbers from 0, are looked for in a .npz under labels, label, y or arr_1 unless labels=False; the largest
    tells the number of classes. A share `held_out` is set aside. Raises DataError for anything else.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise DataError(f"arrays: there is no file {path}")
    x, of_x = _open(path)
    x = _checked(x, path)
    of_x = _checked_labels(of_x, len(x), path) if labels and of_x is not None else None
    keep, held = hold_out(len(x), held_out, seed)
    if len(held) == 0:
        held_x, x = x[:0], x
    else:
        held_x, x = x[held], x[keep]
    pick = (lambda rows: None) if of_x is None else (lambda rows: of_x[rows])
    classes = 0 if of_x is None else int(of_x.max()) + 1
    return Dataset(path.stem, x, pick(keep), held_x, pick(held), classes)


def _open(path: Path):
    """(samples, labels or None) as they are in the file; a .npy is mapped, not read."""
    try:
        loaded = np.load(path, mmap_mode="r" if path.suffix == ".npy" else None, allow_pickle=False)
        if isinstance(loaded, np.ndarray):
            return loaded, None
        with loaded:
            name = next((name for name in SAMPLES if name in loaded), None)
            if name is None:
                have = ", ".join(loaded) or "nothing"
                raise DataError(f"arrays: {path} holds {have}; expected samples under one of {', '.join(SAMPLES)}")
            label = next((name for name in LABELS if name in loaded), None)
            return loaded[name], None if label is None else loaded[label]
    except DataError:
        raise
    except (ValueError, OSError, EOFError) as error:
        raise DataError(f"arrays: {path} is no .npy or .npz file of plain numbers: {error}") from error
    except Exception as error:  # a damaged archive: zipfile.BadZipFile, zlib.error
        raise DataError(f"arrays: {path} is damaged: {error}") from error


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
        x = np.asarray(x, np.float32)
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
