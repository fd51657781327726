"""Published PyTorch weights to and from our networks: `load(path, architecture) -> (module, variables)`.

Each architecture is a module with these, of which the last three may be absent:

    select(content, settings) -> tensors    where in a file the tensors are, in one form; settings: config and overrides
    build(tensors, config, **overrides)     the Linen module, from the config or from names and shapes
    table(module) -> [Entry, ...]           the pairs of names
    example(module, tensors) -> (x, label, cond)     what the module takes
    config(module, variables) -> dict       what is written beside exported weights
    IGNORED                                 patterns of names without a place
    SETTINGS                                what `load` takes beside the fields of what `build` returns
    one_spelling(settings) -> settings      what can be said in several words, in one
    folder(path) -> path                    where the files lie within what was given
"""

import importlib
import json
import typing
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jdiff.convert import files
from jdiff.convert.table import Mismatch, to_tensors, to_variables
from jdiff.core.names import did_you_mean

ARCHITECTURES = ("adm", "diffusers", "dit", "edm", "edm2", "resnet", "score_sde")

__all__ = ["ARCHITECTURES", "Mismatch", "load", "save", "variables_of"]


def load(path: str | Path, architecture: str, **overrides) -> tuple[Any, dict]:
    """(module, variables) of the published weights in a local file or folder.

    architecture: one of `ARCHITECTURES`; overrides: fields of the module that the file does not tell, such as `heads`.
    `module.apply(variables, x, label, cond)` takes x (B, H, W, C) and the label in the network's own units. Files are
    safetensors or those of torch.save, which are read without running code.
    Raises ValueError for an unknown architecture or override, OSError for a file that is not there, ImportError for a
    library that is not, and `Mismatch` with what was missing, unexpected and mis-shaped.
    """
    kind = _architecture(architecture)
    _check_overrides(kind, architecture, overrides)
    overrides = kind.one_spelling(overrides) if hasattr(kind, "one_spelling") else overrides
    content, config = files.read(kind.folder(Path(path)) if hasattr(kind, "folder") else path)
    try:
        tensors = kind.select(content, config | overrides)
        module = kind.build(tensors, config, **overrides)
        return module, variables_of(module, architecture, tensors)
    except Mismatch:
        raise
    except MemoryError as error:
        raise Mismatch(f"{path} holds a network of {architecture} that takes more memory than there is") from error
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        raise Mismatch(f"not a network of {architecture}: {_reason(error)}") from error  # any file may come


def variables_of(module: Any, architecture: str, tensors: dict[str, np.ndarray], dtype: Any = np.float32) -> dict:
    """The module's variables from named tensors, such as a state_dict as NumPy arrays. Raises `Mismatch`."""
    kind = _architecture(architecture)
    expected = jax.eval_shape(module.init, jax.random.key(0), *kind.example(module, tensors))
    return to_variables(kind.table(module), tensors, expected, kind.IGNORED, dtype)


def save(path: str | Path, architecture: str, module: Any, variables: dict) -> None:
    """Write a folder that `load`, and for diffusers `from_pretrained`, opens: safetensors and config.json.

    Raises ValueError where the architecture cannot express the module.
    """
    kind = _architecture(architecture)
    table, config = kind.table(module), kind.config(module, variables)
    tensors = to_tensors(table, variables)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    files.write(path / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _architecture(name: str) -> ModuleType:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; one of {', '.join(ARCHITECTURES)}")
    return importlib.import_module(f"jdiff.convert.{name}")


def _check_overrides(kind: ModuleType, architecture: str, overrides: dict) -> None:
    made = typing.get_type_hints(kind.build)["return"]
    fields = {field for module in typing.get_args(made) or (made,) for field in module.__dataclass_fields__}
    known = sorted(fields - {"parent", "name"} | set(getattr(kind, "SETTINGS", ())))
    for name in overrides:
        if name not in known:
            raise ValueError(
                f"{architecture!r} has no field {name!r}{did_you_mean(name, known)}; one of {', '.join(known)}"
            )


def _reason(error: Exception) -> str:
    if isinstance(error, KeyError):
        return f"1 missing: {error.args[0]}"
    return str(error) or type(error).__name__
