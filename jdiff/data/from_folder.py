"""Data sets from a folder of images of any size, which are decoded as they are read or kept in memory."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jdiff.core import foreign
from jdiff.data.dataset import DataError
from jdiff.data.images import from_bytes
from jdiff.data.order import hold_out, spread
from jdiff.data.records import CACHE, HELD, Records, decode, fits
from jdiff.data.registry import register_dataset

LARGEST = 2**30  # bytes of an image file
SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")


@register_dataset
def folder(
    path: str,
    size: int,
    channels: int = 3,
    labels: bool = True,
    held_out: float = 0.0,
    seed: int = 0,
    corrupt: str = "stop",
    cache: int = CACHE,
    threads: int = 4,
) -> Records:
    """The png, jpg, jpeg and webp images under a folder: their central squares, resized.

    The class of an image is its first-level sub-folder, in alphabetical order. Images have no class if they lie in the
    folder itself, or all in one sub-folder.

    Args:
        path: the folder; links are followed.
        size: the side of the samples, in pixels.
        channels: 3 for colour, 1 for grey (modes of files: see `images.to_array`).
        labels: whether the sub-folders are classes.
        held_out: the share of the images that is held out.
        seed: the seed of the draw of those.
        corrupt: "stop": an image that cannot be read is an error when it is read. "skip": all images are tried at the
            start, those that cannot be read are left out, and a warning says how many.
        cache: a set of at most these bytes is kept in memory.
        threads: how many threads decode.

    Raises:
        DataError: there are no images, or there are images both beside and inside sub-folders.
    """
    if size < 1 or channels not in (1, 3) or corrupt not in ("stop", "skip") or threads < 1:
        raise DataError(
            "folder: size and threads must be positive, channels 1 or 3, corrupt 'stop' or 'skip'; "
            f"got size={size}, threads={threads}, channels={channels}, corrupt={corrupt!r}"
        )
    root = Path(path).expanduser()
    files = _files(root)
    if corrupt == "skip":
        files = _readable(root, files, size, channels, threads)
    names, of_file = _classes(root, files) if labels else ([], None)
    keep, held = hold_out(len(files), held_out, seed)
    held = held[spread(len(held), HELD)]
    shape = (size, size, channels)

    def take_of(files, of_file):
        def take(rows):
            x = np.empty((len(rows), *shape), np.uint8)
            for i, row in enumerate(rows):
                x[i] = _read(files[row], size, channels)
            return x, None if of_file is None else of_file[rows]

        return take

    take = take_of(files, of_file)
    train = take_of([files[i] for i in keep], None if of_file is None else of_file[keep])
    return Records(
        name=root.name or "folder",
        size=len(keep),
        shape=shape,
        take=train,
        held=lambda: decode(take, held, shape, threads),
        classes=len(names),
        in_memory=fits(len(keep), shape, cache),
        threads=threads,
    )


def _files(root: Path) -> list[Path]:
    """All images under a folder, links followed, in an order that does not depend on the file system."""
    if not root.is_dir():
        raise DataError(f"folder: {root} is no directory; expected one with images in it or in its sub-folders")
    found: list[Path] = []
    repeated: list[Path] = []
    for where, names in _walk(root, repeated):
        found += [where / name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if repeated:
        count = f"{len(repeated):,} links" if len(repeated) > 1 else "a link"
        text = f"folder: {count} in {root} to folders read before left out, the first {repeated[0]}"
        warnings.warn(text, stacklevel=3)
    if not found:
        raise DataError(f"folder: no images in {root}; expected files ending in {', '.join(SUFFIXES)}")
    return sorted(found)


def _walk(root: Path, repeated: list[Path]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) of every folder under a root, once, under its own name before any link to it.

    Links to folders that were visited before are appended to `repeated` and not followed: where a link leads up, there
    is no end to them.
    """
    visited, starts = set(), [root]
    for start in starts:  # which grows
        for where, below, names in os.walk(start):
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in visited:
                repeated.append(Path(where))
                below.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            below.sort()
            starts += [Path(where, name) for name in below if os.path.islink(os.path.join(where, name))]
            yield Path(where), names


def _classes(root: Path, files: list[Path]) -> tuple[list[str], np.ndarray | None]:
    """(names of the classes, class of each file (n,) int32), or ([], None) where there are none."""
    parts = [file.relative_to(root).parts for file in files]
    first = [part[0] if len(part) > 1 else "" for part in parts]
    if "" in first and any(first):
        flat = files[first.index("")].name
        raise DataError(
            f"folder: {root} has images beside its sub-folders, such as {flat}, so their class is unclear; "
            "move them into a sub-folder, or give labels=False"
        )
    names = sorted({name for name in first if name})
    if len(names) < 2:
        return [], None
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[name] for name in first], np.int32)


def _read(file: Path, size: int, channels: int) -> np.ndarray:
    try:
        foreign.check_file(file, LARGEST)
        return from_bytes(file.read_bytes(), size, channels)
    except (ValueError, OSError) as error:
        raise DataError(
            f"folder: {file} cannot be read ({error}); remove it, or give corrupt='skip' to leave such files out"
        ) from error


def _readable(root: Path, files: list[Path], size: int, channels: int, threads: int) -> list[Path]:
    def good(file):
        try:
            _read(file, size, channels)
        except DataError:
            return False
        return True

    with ThreadPoolExecutor(threads) as pool:
        keep = list(pool.map(good, files))
    bad = [file for file, ok in zip(files, keep, strict=True) if not ok]
    if len(bad) == len(files):
        raise DataError(f"folder: none of the {len(files):,} images in {root} can be read, the first being {files[0]}")
    if bad:
        count = f"{len(bad):,} of {len(files):,} images"
        warnings.warn(f"folder: {count} in {root} cannot be read and are left out, the first {bad[0]}", stacklevel=3)
    return [file for file, ok in zip(files, keep, strict=True) if ok]
