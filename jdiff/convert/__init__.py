"""Published PyTorch weights to and from our networks: `load(path, architecture) -> (module, variables)`.

Each architecture is a module with five functions and a tuple:

    select(content, settings) -> tensors    where in a file the tensors are, in one form; settings: config and overrides
    build(tensors, config, **overrides)     the Linen module, from the config or from names and shapes
    table(module) -> [Entry, ...]           the pairs of names
    example(module, tensors) -> (x, label, cond)     what the module takes
    config(module, variables) -> dict       what is written beside exported weights
    IGNORED                                 patterns of names without a place
"""

import importlib
import json
from pathlib import Path
from types import ModuleType
from typing import Any

import jax
import numpy as np

from jdiff.convert import files
from jdiff.convert.table import Mismatch, to_tensors, to_variables

ARCHITECTURES = ("adm", "diffusers", "dit", "edm", "edm2", "resnet", "score_sde")

__all__ = ["ARCHITECTURES", "Mismatch", "load", "save", "variables_of"]


def load(path: str | Path, architecture: str, **overrides) -> tuple[Any, dict]:
    """(module, variables) of the published weights in a local file or folder.

    architecture: one of `ARCHITECTURES`; overrides: fields of the module that the file does not tell, such as `heads`.
    `module.apply(variables, x, label, cond)` takes x (B, H, W, C) and the label in the network's own units. Files are
    safetensors or those of torch.save, which are read without running code.
    Raises ValueError for an unknown architecture, OSError for a file that is not there, and `Mismatch` with what was
    missing, unexpected and mis-shaped.
    """
    kind = _architecture(architecture)
    content, config = files.read(kind.folder(Path(path)) if hasattr(kind, "folder") else path)
    tensors = kind.select(content, config | overrides)
    module = kind.build(tensors, config, **overrides)
    return module, variables_of(module, architecture, tensors)


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
    tensors, config = to_tensors(kind.table(module), variables), kind.config(module, variables)
    path = Path(path)
    path.mkdir(parents=True, exist_ok=True)
    files.write(path / "diffusion_pytorch_model.safetensors", tensors, {"format": "pt"})
    (path / "config.json").write_text(json.dumps(config, indent=2) + "\n")


def _architecture(name: str) -> ModuleType:
    if name not in ARCHITECTURES:
        raise ValueError(f"unknown architecture {name!r}; one of {', '.join(ARCHITECTURES)}")
    return importlib.import_module(f"jdiff.convert.{name}")
