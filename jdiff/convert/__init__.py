"""Published PyTorch weights to and from our networks.

`load(path, architecture) -> (module, variables)` reads them, `save` writes them, and `denoiser(path, tag)` makes a
denoiser of them.
"""

from jdiff.convert.published import denoiser
from jdiff.convert.table import Mismatch
from jdiff.convert.weights import ARCHITECTURES, load, save, variables_of

__all__ = ["ARCHITECTURES", "Mismatch", "denoiser", "load", "save", "variables_of"]


def __dir__() -> list[str]:
    return sorted(__all__)
