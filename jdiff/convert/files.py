"""Files of tensors: read without running anything that they hold, and written as safetensors."""

import argparse
import re
import warnings
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.convert.table import Mismatch
from jdiff.core import foreign
from jdiff.core.extras import needs
from jdiff.core.files import write as write_whole

TORCH = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar", ".pkl")
# below it a file can break out of weights_only: CVE-2025-32434 (below 2.6), CVE-2026-24747 (below 2.10)
SAFE_TORCH = (2, 10)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """Read a file of tensors, and the config beside it.

    Files of PyTorch are read with weights_only=True: a pickle that would run code is refused. So is a packed file that
    takes more than 1 GiB and 100 times its own size in memory.

    Args:
        path: a .safetensors or .npz file, a file of torch.save, or a folder that holds one of them, whole or in the
            shards of an index, and perhaps a config.json.

    Returns:
        (content, config): tensors as NumPy arrays by name, nested as the file nests them, and the config, {} if there
        is none.

    Raises:
        OSError: for what is not there.
        Mismatch: for what is not such a file.
        ImportError: for libraries that are missing, or too old to be safe.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file of weights or a folder with one")
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    settings = _read_json(config) if config.exists() or config.is_symlink() else {}
    if not path.is_dir():
        return _read_file(path), settings
    index = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.index.json"))
    if index:
        return {name: array for shard in _shards(index[0]) for name, array in _read_file(shard).items()}, settings
    for pattern in ("*.safetensors", "*.npz", *(f"*{suffix}" for suffix in TORCH)):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise Mismatch(f"{path} holds {', '.join(p.name for p in found)}; give the path of the one to read")
        if found:
            return _read_file(found[0]), settings
    raise FileNotFoundError(f"{path} holds no file of weights (.safetensors, .npz, {', '.join(TORCH)})")


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as a .safetensors file, whole or not at all.

    Args:
        path: the file.
        tensors: by name.
        metadata: texts that the file says about itself.

    Raises:
        ImportError: where the library safetensors is missing.
    """
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    content = _safetensors().save(arrays, dict(metadata or {}))
    write_whole(path, lambda file: file.write(content))


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = foreign.read_json(path)
    except ValueError as error:
        raise Mismatch(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise Mismatch(f"{path} holds a {type(content).__name__}; expected names and values, {{...}}")
    return content


def _shards(index: Path) -> list[Path]:
    """The files that an index lists, all in its own folder."""
    shards = _read_json(index).get("weight_map")
    if not isinstance(shards, dict) or not shards:
        raise Mismatch(f'{index} has no "weight_map" of names and files')
    present = {path.name for path in index.parent.iterdir()}
    for shard in shards.values():
        if not isinstance(shard, str) or shard not in present:
            raise Mismatch(f"{index} lists {shard!r}, which is not the name of a file in its own folder")
    return [index.with_name(shard) for shard in sorted(set(shards.values()))]


def _read_file(path: Path) -> dict[str, Any]:
    readers = {".safetensors": _read_safetensors, ".npz": _read_npz}
    read_it = _read_torch if path.name.endswith(TORCH) else readers.get(path.suffix)
    if read_it is None:
        raise Mismatch(f"{path} is not a file of weights by its name; expected .safetensors, .npz, {', '.join(TORCH)}")
    try:
        foreign.check_file(path)
    except ValueError as error:
        raise Mismatch(f"{path} cannot be read: {error}") from error
    try:
        return read_it(path)
    except MemoryError as error:
        raise Mismatch(f"{path} takes more memory than there is") from error


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    library = _safetensors()
    try:
        _check_header(path)
        return dict(library.load_file(path))
    except (OSError, MemoryError):
        raise
    except Exception as error:  # safetensors' own error type is not public
        raise Mismatch(f"{path} is not a readable safetensors file: {error}") from error


def _check_header(path: Path) -> None:
    """Raise ValueError for a header that the library would read, though two tensors in it have one name."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if length > foreign.JSON_BYTES:
            raise ValueError(f"its header has {length:,} bytes; expected at most {foreign.JSON_BYTES:,}")
        header = file.read(length)
    foreign.parse_json(header)


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        return foreign.read_npz(path, advice="save it again by np.savez, which does not pack")
    except ValueError as error:  # objects are pickles, and are not read
        raise Mismatch(f"{path} is not a readable .npz file of numbers: {error}") from error


def _read_torch(path: Path) -> dict[str, Any]:
    try:
        import torch
    except ImportError as error:
        raise ImportError(f"reading {path.name} needs PyTorch; pip install torch, or use .safetensors") from error
    if tuple(int(n) for n in re.findall(r"\d+", torch.__version__)[:2]) < SAFE_TORCH:
        least = ".".join(map(str, SAFE_TORCH))
        raise ImportError(
            f"reading {path.name} safely needs PyTorch {least} or newer, and this is {torch.__version__}; "
            f"pip install 'torch>={least}', or use .safetensors"
        )
    _check_archive(path)
    try:
        with warnings.catch_warnings(action="ignore"), torch.serialization.safe_globals([argparse.Namespace]):
            # argparse's are plain data, kept beside weights by many; the warnings are of files that are refused
            content = torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # a damaged pickle fails in any way, IndexError and struct.error among them
        raise Mismatch(
            f"{path} {_why(error)}, and is not unpickled; save its tensors alone where its code is trusted: "
            "torch.save(net.state_dict(), 'weights.pt')"
        ) from error
    if not isinstance(content, Mapping):
        raise Mismatch(f"{path} holds a {type(content).__name__}; expected named tensors (a state_dict)")
    try:
        foreign.check_size(_bytes(content, torch, {}), path.stat().st_size)  # views may be larger than what they show
        return _to_numpy(content, torch, {})
    except Exception as error:  # torch: sparse, quantized and meta tensors have no numbers that NumPy could hold
        reason = "it is nested too deep" if isinstance(error, RecursionError) else error
        raise Mismatch(f"{path} cannot be read: {reason}") from error


def _check_archive(path: Path) -> None:
    """Raise `Mismatch` for an archive of torch.save whose checksums, which torch does not look at, are not right."""
    with path.open("rb") as file:
        if file.read(2) != b"PK":
            return  # the form before torch 1.6, without checksums
    try:
        with zipfile.ZipFile(path) as archive:
            foreign.check_size(sum(info.file_size for info in archive.infolist()), path.stat().st_size)
            bad = archive.testzip()
    except Exception as error:  # a damaged archive fails in any way
        raise Mismatch(f"{path} is damaged: {str(error) or type(error).__name__}") from error
    if bad is not None:
        raise Mismatch(f"{path} is damaged: the checksum of {bad} in it is not right; fetch or save it again")


def _why(error: Exception) -> str:
    """What a file is that torch refused, in a line: torch's own lines advise to load it all the same."""
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    if code := re.search(r"GLOBAL (\S+)", reason):
        return f"holds {code[1]}, which is code"
    return f"holds more than tensors, or is damaged ({reason.splitlines()[0].partition('. ')[0]})"


def _bytes(content, torch, seen: dict) -> int:
    """The bytes of all tensors in nested content, each object counted once."""
    if id(content) in seen:
        return 0
    seen[id(content)] = content
    if isinstance(content, torch.Tensor):
        return content.numel() * max(content.element_size(), 4 if content.is_floating_point() else 0)
    if isinstance(content, Mapping):
        content = list(content.values())
    return sum(_bytes(v, torch, seen) for v in content) if isinstance(content, list | tuple) else 0


def _to_numpy(content, torch, done: dict):
    """The content with arrays for tensors; `done`: by identity, since a pickle may hold one object in many places."""
    if id(content) in done:
        if done[id(content)] is content:
            raise ValueError("something that holds itself")
        return done[id(content)]
    made = content
    if isinstance(content, torch.Tensor):
        tensor = content.detach()
        known = (torch.float16, torch.float32, torch.float64)
        made = (tensor.float() if tensor.is_floating_point() and tensor.dtype not in known else tensor).numpy()
    elif isinstance(content, Mapping | list | tuple):
        done[id(content)] = content  # until it is made
        if isinstance(content, Mapping):
            made = {str(k): _to_numpy(v, torch, done) for k, v in content.items()}
        else:
            made = [_to_numpy(v, torch, done) for v in content]
    else:
        return content
    done[id(content)] = made
    return made


def _safetensors():
    with needs("published weights need", "convert"):
        import safetensors.numpy
    return safetensors.numpy
