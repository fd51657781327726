"""Files of tensors: read without executing anything that is in them, written as safetensors."""

import argparse
import json
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.convert.table import Mismatch

TORCH = (".bin", ".pt", ".pth", ".ckpt", ".pth.tar", ".pkl")
# below it a file can break out of weights_only: CVE-2025-32434 (below 2.6), CVE-2026-24747 (below 2.10)
SAFE_TORCH = (2, 10)


def read(path: str | Path) -> tuple[dict[str, Any], dict[str, Any]]:
    """(what the file holds, the config beside it): tensors as NumPy arrays by name, nested as the file nests them.

    `path` is a .safetensors or .npz file, a file of torch.save, or a folder that holds one of them, whole or in the
    shards of an index, and perhaps a config.json. Torch files are read with weights_only=True: a pickle that wants to
    run code is refused. Raises OSError for what is not there, `Mismatch` for what is not such a file, and ImportError
    for libraries that are missing or too old to be safe.
    """
    path = Path(path)
    if not path.exists():
        raise FileNotFoundError(f"{path} does not exist; expected a file of weights or a folder with one")
    config = path / "config.json" if path.is_dir() else path.with_name("config.json")
    settings = _read_json(config) if config.is_file() else {}
    if not path.is_dir():
        return _read_file(path), settings
    index = sorted(path.glob("*.safetensors.index.json")) or sorted(path.glob("*.index.json"))
    if index:
        shards = sorted({Path(str(shard)).name for shard in _weight_map(index[0]).values()})
        return {name: array for shard in shards for name, array in _read_file(path / shard).items()}, settings
    for pattern in ("*.safetensors", "*.npz", *(f"*{suffix}" for suffix in TORCH)):
        found = sorted(path.glob(pattern))
        if len(found) > 1:
            raise Mismatch(f"{path} holds {', '.join(p.name for p in found)}; give the path of the one to read")
        if found:
            return _read_file(found[0]), settings
    raise FileNotFoundError(f"{path} holds no file of weights (.safetensors, .npz, {', '.join(TORCH)})")


def write(path: str | Path, tensors: Mapping[str, np.ndarray], metadata: Mapping[str, str] | None = None) -> None:
    """Write named tensors as a .safetensors file, whole or not at all."""
    path = Path(path)
    part = path.with_name(path.name + ".part")
    arrays = {name: np.asarray(array, order="C") for name, array in tensors.items()}
    _safetensors().save_file(arrays, part, dict(metadata or {}))
    part.replace(path)


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text())
    except ValueError as error:
        raise Mismatch(f"{path} is not readable JSON: {error}") from error
    if not isinstance(content, dict):
        raise Mismatch(f"{path} holds a {type(content).__name__}; expected names and values, {{...}}")
    return content


def _weight_map(path: Path) -> dict[str, Any]:
    shards = _read_json(path).get("weight_map")
    if not isinstance(shards, dict):
        raise Mismatch(f'{path} has no "weight_map" of names and files')
    return shards


def _read_file(path: Path) -> dict[str, Any]:
    if path.suffix == ".safetensors":
        return _read_safetensors(path)
    if path.suffix == ".npz":
        return _read_npz(path)
    if path.name.endswith(TORCH):
        return _read_torch(path)
    raise Mismatch(f"{path} is not a file of weights by its name; expected .safetensors, .npz, {', '.join(TORCH)}")


def _read_safetensors(path: Path) -> dict[str, np.ndarray]:
    library = _safetensors()
    try:
        return dict(library.load_file(path))
    except OSError:
        raise
    except Exception as error:  # safetensors' own error type is not public
        raise Mismatch(f"{path} is not a readable safetensors file: {error}") from error


def _read_npz(path: Path) -> dict[str, np.ndarray]:
    try:
        with np.load(path, allow_pickle=False) as arrays:
            return dict(arrays)
    except (ValueError, EOFError, zipfile.BadZipFile) as error:  # objects are pickles, and are not read
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
    try:
        with torch.serialization.safe_globals([argparse.Namespace]):  # plain data, kept beside weights by many
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
    return _to_numpy(content, torch)


def _why(error: Exception) -> str:
    """What a file is that torch refused, in a line: torch's own lines advise to load it all the same."""
    reason = str(error).rpartition("WeightsUnpickler error:")[2].strip() or type(error).__name__
    if code := re.search(r"GLOBAL (\S+)", reason):
        return f"holds {code[1]}, which is code"
    return f"holds more than tensors, or is damaged ({reason.splitlines()[0].partition('. ')[0]})"


def _to_numpy(content, torch):
    if isinstance(content, torch.Tensor):
        content = content.detach()
        known = (torch.float16, torch.float32, torch.float64)
        return (content.float() if content.is_floating_point() and content.dtype not in known else content).numpy()
    if isinstance(content, Mapping):
        return {str(k): _to_numpy(v, torch) for k, v in content.items()}
    if isinstance(content, list | tuple):
        return [_to_numpy(v, torch) for v in content]
    return content


def _safetensors():
    try:
        import safetensors.numpy
    except ImportError as error:
        raise ImportError("published weights need safetensors; pip install 'jdiff[convert]'") from error
    return safetensors.numpy
