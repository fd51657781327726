"""Files that appear whole or not at all."""

import contextlib
import os
import re
import secrets
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


def leftovers(directory) -> list[Path]:
    """The temporary files in `directory`, which killed calls of `write` have left or running ones are writing."""
    directory = Path(directory)
    paths = directory.iterdir() if directory.is_dir() else ()
    return sorted(path for path in paths if re.fullmatch(r"tmp[a-z0-9_]{8}(\.\w+)?", path.name))
