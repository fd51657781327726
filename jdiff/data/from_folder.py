"""Data sets from a folder of images of any size, which are decoded as they are read or kept in memory."""

import os
import warnings
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np

from jdiff.core import foreign
from jdiff.data import fingerprint
from jdiff.data.dataset import DataError, DataWarning
from jdiff.data.images import check_whole, from_bytes
from jdiff.data.order import hold_out, spread
from jdiff.data.records import CACHE, HELD, Records, decode, fits
from jdiff.data.registry import register_dataset

LARGEST = 2**30  # bytes of an image file
LOOKED_AT = 100_000  # images of a set, when it is opened
ADVICE = "remove it, or give corrupt='skip' to leave such files out"
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
    folder itself, or all in one sub-folder. Hidden files and folders, and `__MACOSX`, are left out.

    Args:
        path: the folder; links are followed.
        size: the side of the samples, in pixels.
        channels: 3 for colour, 1 for grey (modes of files: see `images.to_array`).
        labels: whether the sub-folders are classes.
        held_out: the share of the images that is held out.
        seed: the seed of the draw of those.
        corrupt: "stop": all images are looked at when the set is opened (of more than 100,000 images, so many, evenly
            spaced), and one that cannot be read is an error. "skip": all images are tried, those that cannot be read
            are left out, and a warning says how many.
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
    files = _files(root, corrupt)
    files, original = _looked_at(root, files, size, channels, corrupt, threads)
    names, of_file = _classes(root, files) if labels else ([], None)
    keep, held = hold_out(len(files), held_out, seed)
    if not len(keep):
        raise DataError(f"folder: held_out={held_out} leaves none of the {len(files)} images in {root} to train on")
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
        name=root.resolve().name or "folder",
        size=len(keep),
        shape=shape,
        take=train,
        held=lambda: decode(take, held, shape, threads),
        classes=len(names),
        in_memory=fits(len(keep), shape, cache),
        threads=threads,
        class_names=tuple(names),
        identify=lambda: fingerprint.of_files(root, files, spread(len(files), fingerprint.LOOKED_AT)),
        original=original,
    )


def _files(root: Path, corrupt: str) -> list[Path]:
    """All images under a folder, links followed, in an order that does not depend on the file system."""
    if not root.is_dir():
        raise DataError(f"folder: {root} is no directory; expected one with images in it or in its sub-folders")
    found: list[Path] = []
    repeated: list[Path] = []
    closed: list[OSError] = []
    for where, names in _walk(root, repeated, closed):
        found += [where / name for name in names if name.lower().endswith(SUFFIXES) and not name.startswith(".")]
    if closed:
        first = f"{closed[0].filename} ({closed[0].strerror})"
        if corrupt == "stop":
            raise DataError(f"folder: cannot look into {first}; open it, or give corrupt='skip' to leave it out")
        _warn(f"{_count(len(closed), 'folder')} in {root} cannot be looked into and left out, the first {first}")
    if repeated:
        _warn(f"{_count(len(repeated), 'link')} in {root} to folders read before left out, the first {repeated[0]}")
    if not found:
        raise DataError(f"folder: no images in {root}; expected files ending in {', '.join(SUFFIXES)}")
    return sorted(found)


def _walk(root: Path, repeated: list[Path], closed: list[OSError]) -> Iterator[tuple[Path, list[str]]]:
    """(folder, names of its files) of every folder under a root, once, under its own name before any link to it.

    Links to folders that were visited before are appended to `repeated` and not followed: where a link leads up, there
    is no end to them. Why a folder cannot be looked into is appended to `closed`.
    """
    visited, starts = set(), [root]
    for start in starts:  # which grows
        for where, below, names in os.walk(start, onerror=closed.append):
            status = os.stat(where)
            if (status.st_dev, status.st_ino) in visited:
                repeated.append(Path(where))
                below.clear()
                continue
            visited.add((status.st_dev, status.st_ino))
            below[:] = sorted(name for name in below if not _is_hidden(name))
            starts += [Path(where, name) for name in below if os.path.islink(os.path.join(where, name))]
            yield Path(where), names


def _is_hidden(name: str) -> bool:
    return name.startswith(".") or name == "__MACOSX"


def _warn(text: str) -> None:
    warnings.warn(f"folder: {text}", DataWarning, stacklevel=4)


def _count(n: int, what: str) -> str:
    return f"{n:,} {what}s" if n > 1 else f"a {what}"


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
    below = [path for path in sorted(root.iterdir()) if path.is_dir() and not path.is_symlink()] if names else []
    empty = [path.name for path in below if path.name not in names and not _is_hidden(path.name)]
    if empty:
        _warn(f"{_count(len(empty), 'sub-folder')} of {root} without images, no class: {', '.join(empty[:5])}")
    if len(names) < 2:
        return [], None
    number = {name: i for i, name in enumerate(names)}
    return names, np.array([number[name] for name in first], np.int32)


def _read(file: Path, size: int, channels: int) -> np.ndarray:
    try:
        foreign.check_file(file, LARGEST)
        return from_bytes(file.read_bytes(), size, channels)
    except (ValueError, OSError) as error:
        raise DataError(f"folder: {file} cannot be read ({error}); {ADVICE}") from error


def _looked_at(root: Path, files: list[Path], size: int, channels: int, corrupt: str, threads: int):
    """(files that are good, their heights and widths (n, 2)). With "stop" one that is not is an error, else left out.

    With "stop" files are not decoded, so that this takes seconds.
    """

    def look(file):
        try:
            foreign.check_file(file, LARGEST)
            found = check_whole(file)
            if corrupt == "skip":
                _read(file, size, channels)
            return found
        except (ValueError, OSError) as error:
            return error

    looked_at = files if corrupt == "skip" else [files[i] for i in spread(len(files), LOOKED_AT)]
    with ThreadPoolExecutor(threads) as pool:
        found = list(pool.map(look, looked_at, chunksize=64))
    bad = [(file, error) for file, error in zip(looked_at, found, strict=True) if isinstance(error, Exception)]
    if len(bad) == len(files) > 0 and (corrupt == "skip" or len(bad) > 1):
        first = f"the first being {bad[0][0]} ({bad[0][1]})"
        raise DataError(f"folder: none of the {len(files):,} images in {root} can be read, {first}")
    if bad and corrupt == "stop":
        others = "" if len(bad) == 1 else f", nor can {len(bad) - 1:,} more in {root}"
        raise DataError(f"folder: {bad[0][0]} cannot be read ({bad[0][1]}){others}; {ADVICE}")
    if bad:
        count = f"{len(bad):,} of {len(looked_at):,} images in {root}"
        _warn(f"{count} cannot be read and are left out, the first {bad[0][0]}")
    good = [(file, one) for file, one in zip(looked_at, found, strict=True) if not isinstance(one, Exception)]
    return files if corrupt == "stop" else [file for file, _ in good], np.array([one for _, one in good])
