"""The folder of an export: what is in which file, and how it is checked before anything runs.

`export.json` says what the other files are, with the CRC-32 of each; `params.safetensors` holds the numbers,
`program_*.bin` the programs of `jax.export`, `README.md` the model card.
"""

import importlib.metadata
import json
import zlib
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jax import export

from jdiff.convert import files as tensors
from jdiff.core import files, foreign
from jdiff.core.extras import needs
from jdiff.export import card
from jdiff.export.programs import BATCH, PLATFORMS, Program, Specs, spec_of

FORMAT = 1
RECORD, PARAMS, CARD = "export.json", "params.safetensors", "README.md"


class ExportError(ValueError):
    """A folder is no export, is damaged, or is of versions or platforms that do not fit; the message is one line."""

    def __init__(self, message: str):
        super().__init__(foreign.one_line(message))


class Export(NamedTuple):
    """What a folder holds.

    Args:
        record: the content of its export.json.
        numbers: the parameters and other numbers, by name.
        program: the programs.
    """

    record: dict[str, Any]
    numbers: dict[str, jax.Array]
    program: Program


class Fixed(dict):
    """A dict that is part of the type of a noun: two of one content are one program."""

    def __hash__(self):
        return hash(tuple(self))


def write(
    path: str | Path,
    kind: str,
    numbers: Mapping[str, Any],
    programs: Sequence[tuple[tuple[str, ...], bytes]],
    *,
    rows: Specs,
    about: str,
    **noted: Any,
) -> None:
    """Write a folder, whole or not at all.

    Args:
        path: the folder; nothing may be in it.
        kind: "denoiser" or "sampler".
        numbers: the parameters and other numbers, by name.
        programs: what `programs.make` returned.
        rows: the arguments of a call.
        about: Markdown for the model card.
        noted: what else export.json says.

    Raises:
        OSError: the folder cannot be written, or something is in it.
    """
    arrays = {name: np.asarray(array, spec_of(array).dtype) for name, array in numbers.items()}

    def fill(folder: Path) -> None:
        tensors.write(folder / PARAMS, arrays)
        listed = []
        for platforms, blob in programs:
            name = f"program_{'_'.join(platforms)}.bin"
            (folder / name).write_bytes(blob)
            convention = export.deserialize(bytearray(blob)).calling_convention_version
            listed.append({"platforms": list(platforms), "calling_convention": convention} | _listed(folder / name))
        record = {
            "format": FORMAT, "kind": kind, "versions": versions(), "programs": listed,
            "params": _listed(folder / PARAMS), "numbers": shapes(arrays), "rows": shapes(rows), **noted,
        }  # fmt: skip
        (folder / RECORD).write_text(json.dumps(record, indent=1) + "\n")
        (folder / CARD).write_text(card.text(Path(path).name, record, about))

    files.write_folder(path, fill)


def read(path: str | Path) -> Export:
    """What a folder holds; nothing in it runs.

    Raises:
        ExportError: it is no export, is damaged, or of versions or platforms that do not fit.
    """
    path = Path(path)
    if not (path / RECORD).is_file():
        raise ExportError(f"{path} is no export: it has no {RECORD}; jdiff.export.save writes one")
    try:
        record = foreign.read_json(path / RECORD)
        _check_record(record)
    except (OSError, ValueError) as error:
        raise ExportError(f"{path / RECORD} is damaged: {error}") from error
    _check_versions(path, record)
    _check_platforms(path, [p for program in record["programs"] for p in program["platforms"]])
    _intact(path, record["params"])
    numbers = tensors.read(path / PARAMS)[0]
    if shapes(numbers) != record["numbers"]:
        raise ExportError(f"{path / PARAMS} holds other numbers than {RECORD} lists; export again")
    parts = [_program(path, program, record) for program in record["programs"]]
    batched = frozenset(name for name, row in record["rows"].items() if row["shape"][:1] == [BATCH])
    program = Program(parts, batched, differentiable=record["vjp_order"] > 0)
    return Export(record, {name: jnp.asarray(array) for name, array in numbers.items()}, program)


def shapes(arrays: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    """{name: shape and dtype} as JSON can hold them; the size of any batch is "b"."""

    def shape(a):
        return [size if isinstance(size, int) else BATCH for size in a.shape]

    return {name: {"shape": shape(a), "dtype": str(a.dtype)} for name, a in arrays.items()}


def check_libraries() -> None:
    """Raise MissingExtra where a library is not installed that exporting and loading need."""
    with needs("jdiff.export needs", "export"):
        import flatbuffers  # noqa: F401
        import safetensors  # noqa: F401


def versions() -> dict[str, str]:
    """The versions of this library and of JAX, where they are installed."""
    found = {}
    for name in ("jdiff", "jax", "jaxlib"):
        try:
            found[name] = importlib.metadata.version(name)
        except importlib.metadata.PackageNotFoundError:  # run from a clone
            continue
    return found


def _listed(file: Path) -> dict[str, Any]:
    content = file.read_bytes()
    return {"file": file.name, "bytes": len(content), "crc32": zlib.crc32(content)}


def _check_record(record: Any) -> None:
    """Raise ValueError unless a record has the fields that this version reads, each of its kind."""
    kinds: dict[str, type] = {
        "format": int, "kind": str, "versions": dict, "programs": list, "params": dict, "numbers": dict, "rows": dict,
        "vjp_order": int,
    }  # fmt: skip
    listed = {"file": str, "bytes": int, "crc32": int}
    program = listed | {"platforms": list, "calling_convention": int}
    array = {"shape": list, "dtype": str}
    _has(record, {"format": int})
    if record["format"] > FORMAT:
        return  # what a later version writes, `_check_versions` refuses by name
    _has(record, kinds)
    for part, fields in [(record["params"], listed), *((one, program) for one in record["programs"])]:
        _has(part, fields)
        if Path(part["file"]).name != part["file"]:
            raise ValueError(f"{part['file']} is no name of a file in the folder")
    for one in [*record["numbers"].values(), *record["rows"].values()]:
        _has(one, array)
    if not record["programs"] or not all(p in PLATFORMS for one in record["programs"] for p in one["platforms"]):
        raise ValueError("it lists no program, or one for unknown platforms")


def _has(record: Any, fields: Mapping[str, type]) -> None:
    for name, kind in fields.items():
        value = record.get(name) if isinstance(record, dict) else None
        if not isinstance(value, kind) or isinstance(value, bool):
            raise ValueError(f"it has no {name!r} of kind {kind.__name__}")


def _check_versions(path: Path, record: dict) -> None:
    made = ", ".join(f"{name} {version}" for name, version in record.get("versions", {}).items()) or "unknown versions"
    if record["format"] != FORMAT:
        raise ExportError(f"{path} has format {record['format']} ({made}), and this jdiff reads {FORMAT}; update jdiff")
    low, high = export.minimum_supported_calling_convention_version, export.maximum_supported_calling_convention_version
    for program in record["programs"]:
        if not low <= program["calling_convention"] <= high:
            raise ExportError(
                f"{path} was exported by {made} with calling convention {program['calling_convention']}, and this jax "
                f"{jax.__version__} reads {low} to {high}; use a jax of about that version, or export again"
            )


def _check_platforms(path: Path, platforms: list[str]) -> None:
    here = {export.default_export_platform(), "cpu"}
    if not here & set(platforms):
        raise ExportError(
            f"{path} was exported for {', '.join(platforms)}, and this is {export.default_export_platform()}; "
            "export again with platforms="
        )


def _intact(path: Path, listed: dict) -> bytes:
    """The bytes of a file that export.json lists, compared with what it says of them."""
    file = path / listed["file"]
    if not (file.exists() or file.is_symlink()):
        raise ExportError(f"{file} is missing; copy the whole folder again")
    try:
        foreign.check_file(file)
        content = file.read_bytes()
    except (OSError, ValueError) as error:
        raise ExportError(f"{file} cannot be read: {error}") from error
    if len(content) != listed["bytes"]:
        raise ExportError(f"{file} has {len(content):,} bytes, and {RECORD} says {listed['bytes']:,}; copy it again")
    if zlib.crc32(content) != listed["crc32"]:
        raise ExportError(f"{file} is damaged: its bytes do not match the checksum in {RECORD}; copy it again")
    return content


def _program(path: Path, listed: dict, record: dict) -> export.Exported:
    content = _intact(path, listed)
    try:
        program = export.deserialize(bytearray(content))
    except Exception as error:  # of another version, in any way
        made = record["versions"].get("jax", "unknown")
        raise ExportError(
            f"{path / listed['file']} cannot be read by jax {jax.__version__} ({error}); jax {made} exported it, "
            "and JAX reads programs of six months back: use that version, or export again"
        ) from error
    if tuple(program.platforms) != tuple(listed["platforms"]):
        raise ExportError(f"{path / listed['file']} is for {', '.join(program.platforms)}, which {RECORD} does not say")
    return program
