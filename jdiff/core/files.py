"""Files that appear whole or not at all."""

import contextlib
import os
import re
import secrets
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write(path, fill: Callable[[BinaryIO], object]) -> None:
    """Let `fill(file)` write a new file beside `path`, then rename it to `path`, over what was there.

    The bytes are on the disk before the name is. A link at `path` is replaced, never followed.

    Args:
        path: the file; folders that are missing are made.
        fill: writes the content into the open binary file that it is given.

    Raises:
        OSError: the file could not be written; the message names `path`, and what was there is as it was.
    """
    path = Path(path)
    temporary = path.with_name(f"tmp{secrets.token_hex(4)}{path.suffix}")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("xb") as file:  # x: fails where a file or a link has that name already
            fill(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        with contextlib.suppress(OSError):  # it was never made, or its folder is gone
            temporary.unlink()
        if isinstance(error, OSError):
            raise OSError(f"cannot write {path}: {error.strerror or error}") from error
        raise


def write_folder(path, fill: Callable[[Path], object]) -> None:
    """Let `fill(folder)` write the files of a new folder beside `path`, then rename the folder to `path`.

    The bytes of the files are on the disk before the name is.

    Args:
        path: the folder; it may be there already if nothing is in it. Folders above it that are missing are made.
        fill: writes files into the folder whose path it is given.

    Raises:
        OSError: the folder could not be written, or holds something already; the message names `path`.
    """
    path = Path(path)
    temporary = path.with_name(f"tmp{secrets.token_hex(4)}")
    try:
        if path.is_symlink() or (path.exists() and not (path.is_dir() and not any(path.iterdir()))):
            raise FileExistsError(f"{path} exists already; remove it, or name another folder")
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary.mkdir()
        fill(temporary)
        for file in temporary.iterdir():
            with file.open("rb") as opened:
                os.fsync(opened.fileno())
        os.replace(temporary, path)
    except BaseException as error:
        shutil.rmtree(temporary, ignore_errors=True)
        if isinstance(error, OSError) and error.strerror:
            raise OSError(f"cannot write {path}: {error.strerror}") from error
        raise


def leftovers(directory) -> list[Path]:
    """The temporary files in `directory`, which killed calls of `write` have left or running ones are writing."""
    directory = Path(directory)
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(path for path in paths if re.fullmatch(r"tmp[a-z0-9_]{8}(\.\w+)?", path.name))
