"""Where another library's code is: installed, or in a checkout of its repository."""

import importlib
import importlib.util
import sys
import types
from pathlib import Path
from unittest import mock

from jdiff import config as configs


def find(name: str, module: str, checkout: Path | None):
    """A peer's module, installed or in a checkout, whose unused requirements may be missing; None if there is none."""
    try:
        return importlib.import_module(f"{name}.{module}")
    except ImportError:
        for broken in [key for key in sys.modules if key.split(".")[0] == name]:
            del sys.modules[broken]
    if checkout is None:
        return None
    if not (checkout / name / f"{module}.py").is_file():
        raise configs.ConfigError(f"{checkout} holds no {name}/{module}.py; give the folder of a checkout of {name}")
    package = types.ModuleType(name)  # not its own __init__, which imports everything
    package.__path__ = [str(checkout / name)]
    stubs = ("torchsde", "torchdiffeq", "torchvision", "torchvision.transforms", "safetensors", "PIL")
    missing = {stub: mock.MagicMock() for stub in stubs if importlib.util.find_spec(stub.split(".")[0]) is None}
    with mock.patch.dict(sys.modules, missing):
        sys.modules[name] = package
        return importlib.import_module(f"{name}.{module}")
