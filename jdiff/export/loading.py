"""What is in the folder of an export, ready to be called."""

from pathlib import Path
from typing import Any

from jdiff.export import denoise, folder, sampler
from jdiff.export.folder import ExportError


def load(path: str | Path) -> denoise.ExportedDenoise | sampler.ExportedSampler:
    """Read what `save` or `save_sampler` wrote. Nothing in the folder is unpickled or executed as Python.

    The networks' code is not needed: the folder holds compiled programs, which XLA runs. Load folders of people whom
    you trust.

    Args:
        path: the folder.

    Returns:
        A `Denoise`, or a sampler to call.

    Raises:
        ExportError: the folder is no export, is damaged, or does not fit the versions and devices here.
        MissingExtra: the libraries of the extra `export` are not installed.
    """
    folder.check_libraries()
    found = folder.read(path)
    kinds: dict[str, Any] = {"denoiser": denoise.of_export, "sampler": sampler.of_export}
    if found.record["kind"] not in kinds:
        raise ExportError(f"{path} is an export of a {found.record['kind']}; this jdiff reads {' and '.join(kinds)}")
    try:
        return kinds[found.record["kind"]](found)
    except ValueError as error:
        raise ExportError(f"{Path(path) / folder.RECORD} is damaged: {error}") from error
