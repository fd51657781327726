"""Libraries that the base install does not bring: one clear line where one of them is missing."""

import contextlib
from collections.abc import Iterator

PACKAGES = {"PIL": "pillow", "sklearn": "scikit-learn", "tensorflow_datasets": "tensorflow-datasets"}  # by other names


class MissingExtra(ImportError):
    """A library of an extra is not installed; the message is one line that names the extra."""


@contextlib.contextmanager
def needs(what: str, extra: str = "train") -> Iterator[None]:
    """Import libraries of an extra in the block.

    Args:
        what: what needs them, with its verb, as "jdiff sweep needs".
        extra: the extra of this project that installs them.

    Raises:
        MissingExtra: one of them is not installed.
    """
    try:
        yield
    except ImportError as error:
        library = (error.name or str(error)).partition(".")[0]
        raise MissingExtra(f"{what} {PACKAGES.get(library, library)}: pip install 'jdiff[{extra}]'") from error
