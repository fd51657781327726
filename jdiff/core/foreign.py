"""Files that others made: their claims are checked before they are read, and nothing in them is executed.

All functions raise ValueError with the reason alone, because the caller knows how to name the file.
"""

import json
import math
import os
import zipfile
from collections.abc import Callable, Collection
from pathlib import Path
from typing import Any

import numpy as np

JSON_BYTES = 2**26  # of a JSON file; the longest index of published weights has a seventh of it
JSON_DEPTH = 100  # of its nesting, because whoever reads the value may recur
UNPACKED_BYTES = 2**30  # any packed file may unpack to so many bytes
UNPACKED_RATIO = 100  # and a large one to so many times its own size
NPY_HEADERS = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}


def one_line(text: Any, most: int = 1000) -> str:
    """The text on one line, without control characters and cut at `most`, because names in files may hold anything.

    >>> one_line("a\\n b\\x1b[31m")
    'a b\\\\x1b[31m'
    """
    words = " ".join(str(text).split())
    shown = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in words[:most])
    return shown + " ..." * (len(words) > most)


def check_file(path, most: float = math.inf) -> None:
    """Check that `path` is, or leads to, a regular file: opening a fifo waits for ever, and a device may have no end.

    Raises:
        ValueError: it is no regular file, or has more than `most` bytes.
    """
    path = Path(path)
    if not path.is_file():
        leads = "a link that leads to none" if path.is_symlink() else "none"
        raise ValueError(f"expected a file, and it is {leads}")
    if (size := path.stat().st_size) > most:
        raise ValueError(f"it has {size:,} bytes; expected at most {most:,}")


def read_json(path, integer: Callable[[str], Any] = int) -> Any:
    """The value in a file of JSON; for `integer` and errors see `parse_json`."""
    check_file(path, JSON_BYTES)
    return parse_json(Path(path).read_bytes(), integer)


def parse_json(text: str | bytes, integer: Callable[[str], Any] = int) -> Any:
    """The value of a text of JSON in which no name stands twice and no number is NaN.

    Args:
        text: as text, or as bytes in UTF-8.
        integer: makes a number of its digits.

    Raises:
        ValueError: the text is no such JSON, or is nested too deep.
    """
    try:
        text = text.decode("utf-8") if isinstance(text, bytes) else text
        value = json.loads(text, parse_int=integer, parse_constant=_constant, object_pairs_hook=_object)
    except UnicodeDecodeError as error:
        raise ValueError(f"it is not text in UTF-8 (byte {error.start:,})") from error
    except RecursionError as error:
        raise ValueError("it is nested too deep") from error
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(JSON_DEPTH):
        level = [v for holder in level for v in (holder.values() if isinstance(holder, dict) else holder)]
        level = [v for v in level if isinstance(v, dict | list)]
        if not level:
            return value
    raise ValueError("it is nested too deep")


def _constant(name: str) -> float:
    if name == "NaN":
        raise ValueError("NaN is not a number")
    return float(name)


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name, value in pairs:
        if name in found:
            raise ValueError(f"the name {name!r} stands in it twice")
        found[name] = value
    return found


def check_size(unpacked: int, packed: int, most: int = UNPACKED_BYTES, advice: str = "") -> None:
    """Check that a packed file does not take too much memory.

    Args:
        unpacked: the bytes that it takes unpacked.
        packed: the bytes that it has.
        most: it may take so many bytes, or 100 times its own, whichever is more.
        advice: what to do about a file that takes more.

    Raises:
        ValueError: it takes more.
    """
    if unpacked > max(most, UNPACKED_RATIO * packed):
        raise ValueError(
            f"it has {packed:,} bytes and takes {unpacked:,} unpacked; expected at most {most:,}, "
            f"or {UNPACKED_RATIO} times its own" + (f": {advice}" if advice else "")
        )


def npz_names(path) -> list[str]:
    """The names of the arrays in a .npz file.

    Raises:
        ValueError: the file is no .npz.
    """
    with _opened(path) as archive:
        return list(_members(archive))


def read_npz(
    path,
    wanted: Collection[str] | None = None,
    most: int = UNPACKED_BYTES,
    advice: str = "",
    text: Collection[str] = (),
) -> dict[str, np.ndarray]:
    """The arrays of numbers in a .npz file, by name.

    Args:
        path: the file.
        wanted: the names of the arrays to read; None for all. Others are not looked at.
        most: a file of any size may unpack to so many bytes (see `check_size`).
        advice: what to do about a file that takes more.
        text: the names of arrays that may hold text instead.

    Raises:
        ValueError: the file is damaged, holds anything but numbers, or would take more memory than it may.
    """
    with _opened(path) as archive:
        members = {name: info for name, info in _members(archive).items() if wanted is None or name in wanted}
        check_size(sum(info.file_size for info in members.values()), os.path.getsize(path), most, advice)
        return {name: _array(archive, name, info, "U" * (name in text)) for name, info in members.items()}


def map_npy(path) -> np.ndarray:
    """The array of a .npy file, whose numbers stay in the file until they are used.

    If the file is cut short afterwards, using them ends the process with SIGBUS.

    Raises:
        ValueError: the file holds anything but numbers, or is shorter than its header says.
    """
    with open(path, "rb") as file:
        shape, dtype = npy_header(file)
        offset, size = file.tell(), os.fstat(file.fileno()).st_size
    if offset + _size(shape, dtype) > size:
        raise ValueError(f"it says {dtype} {shape}, for which its {size:,} bytes are too few")
    return np.load(path, mmap_mode="r", allow_pickle=False)


def npy_header(file, more: str = "") -> tuple[tuple[int, ...], np.dtype]:
    """The (shape, dtype) that an open .npy file says it has; it may be of `more` kinds than numbers, as "U" for text.

    Raises:
        ValueError: it holds anything but numbers.
    """
    try:
        version = np.lib.format.read_magic(file)
        if version not in NPY_HEADERS:
            raise ValueError(f"version {version[0]}.{version[1]} of .npy")
        shape, _, dtype = NPY_HEADERS[version](file)
    except Exception as error:  # NumPy reads the header as a literal of Python's: SyntaxError, RecursionError, ...
        raise ValueError(f"not an array ({_reason(error)})") from error
    if dtype.kind not in "biufc" + more or any(length < 0 for length in shape):
        raise ValueError(f"{dtype} {shape}, which are not numbers")
    return shape, dtype


def _opened(path) -> zipfile.ZipFile:
    open(path, "rb").close()  # if the system cannot open the file, its own error says why
    try:
        return zipfile.ZipFile(path)
    except Exception as error:  # a damaged archive fails in any way
        raise ValueError(f"not a .npz file ({_reason(error)})") from error


def _members(archive: zipfile.ZipFile) -> dict[str, zipfile.ZipInfo]:
    """The members of an archive by name. Raises ValueError if two have the same name."""
    members = {info.filename.removesuffix(".npy"): info for info in archive.infolist()}
    if len(members) < len(archive.infolist()):
        raise ValueError("two of its arrays have the same name")
    return members


def _array(archive: zipfile.ZipFile, name: str, info: zipfile.ZipInfo, more: str) -> np.ndarray:
    try:
        with archive.open(info) as member:
            shape, dtype = npy_header(member, more)
            if member.tell() + _size(shape, dtype) != info.file_size:
                raise ValueError(f"{dtype} {shape}, which are not its {info.file_size:,} bytes")
            member.seek(0)
            array = np.lib.format.read_array(member, allow_pickle=False)
            member.read()  # to the end of the member, where its checksum is compared
            return array
    except Exception as error:  # BadZipFile, zlib.error, EOFError, NotImplementedError, MemoryError, ...
        raise ValueError(f"{name}: {_reason(error)}") from error


def _reason(error: Exception) -> str:
    return str(error) or type(error).__name__


def _size(shape: tuple[int, ...], dtype: np.dtype) -> int:
    return math.prod(shape) * dtype.itemsize
