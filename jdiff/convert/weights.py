"""Reading and writing the weights of an architecture: a converter's table, applied to a file."""

import importlib
import json
import typing
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdiff.convert import files
from jdiff.convert.architecture import Architecture
from jdiff.convert.table import Mismatch, to_tensors, to_variables
from jdiff.core.files import write as write_whole
from jdiff.core.names import choose, did_you_mean

ARCHITECTURES = (
    "adm",
    "diffusers",
    "dit",
    "edm",
    "edm2",
    "inception",
    "resnet",
    "score_sde",
)  # each a file of this folder


def load(path: str | Path, architecture: str, **overrides) -> tuple[Any, dict]:
    """Read the published weights in a local file or folder.

    Args:
        path: a file, or a folder with one, of safetensors or of torch.save. The latter are read without running code.
        architecture: one of `ARCHITECTURES`.
        overrides: fields of the module that the file does not tell, such as `heads`.

    Returns:
        (module, variables). `module.apply(variables, x, label, cond)` takes x (B, H, W, C) and the label in the
        network's own units.

    Raises:
        ValueError: for an unknown architecture or override.
        OSError: for a file that is not there.
        ImportError: for a library that is missing.
        Mismatch: for a file of another network, with what is missing, unexpected and mis-shaped.
    """
    kind = _architecture(architecture)
    _check_overrides(kind, architecture, overrides)
    overrides = kind.one_spelling(overrides)
    try:
        content, config = files.read(kind.folder(Path(path)))
    except FileNotFoundError as error:
        if kind.source:
            raise FileNotFoundError(f"{path} is not there; get {kind.source}") from error
        raise
    try:
        tensors = kind.select(content, config | overrides)
        module = kind.build(tensors, config, **overrides)
        return module, variables_of(module, architecture, tensors)
    except Mismatch:
        raise
    except MemoryError as error:
        raise Mismatch(f"{path} holds a network of {architecture} that takes more memory than there is") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Mismatch(f"not a network of {architecture}: {_reason(error)}") from error  # a file may hold anything


def variables_of(module: Any, architecture: str, tensors: dict[str, np.ndarray], dtype: Any = np.float32) -> dict:
    """The variables of a module from named tensors, such as a state_dict as NumPy arrays.

    Args:
        module: the Linen module.
        architecture: one of `ARCHITECTURES`.
        tensors: by their published names.
        dtype: of all variables that are floating-point numbers.

    Returns:
        The variables, nested as those of `module.init`.

    Raises:
        Mismatch: where the tensors are not those of the module.
    """
    kind = _architecture(architecture)
    expected = jax.eval_shape(module.init, jax.random.key(0), *kind.example(module, tensors))
    return to_variables(kind.table(module), tensors, expected, kind.ignored, dtype)


def save(path: str | Path, architecture: str, module: Any, variables: dict) -> None:
    """Write a folder with safetensors and config.json, which `load` opens, and for diffusers `from_pretrained`.

    Args:
        path: the folder, which is made if it is not there.
        architecture: one of `ARCHITECTURES`.
        module: the Linen module.
        variables: its variables.

    Raises:
        ValueError: where the architecture cannot express the module.
    """
    kind = _architecture(architecture)
    table, config = kind.table(module), kind.config(module, variables)
    tensors = to_tensors(table, variables)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    files.write(path / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    text = json.dumps(config, indent=2) + "\n"
    write_whole(path / "config.json", lambda file: file.write(text.encode()))


def _architecture(name: str) -> Architecture:
    module = choose("architecture", name, {known: f"jdiff.convert.{known}" for known in ARCHITECTURES})
    return importlib.import_module(module).ARCHITECTURE


def _check_overrides(kind: Architecture, architecture: str, overrides: dict) -> None:
    built = typing.get_type_hints(kind.build)["return"]
    fields = {field for module in typing.get_args(built) or (built,) for field in module.__dataclass_fields__}
    known = sorted(fields - {"parent", "name"} | set(kind.settings))
    for name in overrides:
        if name not in known:
            raise ValueError(
                f"{architecture!r} has no field {name!r}{did_you_mean(name, known)}; one of {', '.join(known)}"
            )


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"1 missing: {error.args[0]}"
    return str(error) or type(error).__name__
