"""InceptionV3: torchvision's state_dict, and that of pytorch-fid, which has the weights from TensorFlow."""

import jax.numpy as jnp
import numpy as np

from jdiff.convert.architecture import Architecture
from jdiff.convert.resnet import norm_with_statistics, select
from jdiff.convert.table import Entry, Mismatch, conv, dense
from jdiff.models.inception import BLOCKS, STEM, InceptionV3, Layer

SOURCE = (
    "https://github.com/mseitzer/pytorch-fid/releases/download/fid_weights/pt_inception-2015-12-05-6726825d.pth, "
    "whose SHA-256 begins with 6726825d"
)
IGNORED = ("*.num_batches_tracked", "AuxLogits.*")


def build(tensors: dict[str, np.ndarray], config: dict, **overrides) -> InceptionV3:
    """The network whose tensors these are. With 1008 classes they are from TensorFlow, and the pooling is patched.

    Raises:
        Mismatch: the last layer is missing.
    """
    del config
    if "fc.weight" not in tensors:
        raise Mismatch("not InceptionV3: 1 missing: fc.weight")
    classes = len(tensors["fc.weight"])
    return InceptionV3(**dict(num_classes=classes, patched=classes == 1008) | overrides)


def table(module: InceptionV3) -> list[Entry]:
    """The pairs of names."""
    del module
    lines = dense(("fc",), "fc")
    for block, layer in _layers():
        ours = layer.name if block is None else f"{block}_{layer.name}"
        theirs = layer.name if block is None else f"{block}.{layer.name}"
        lines += conv((ours, "conv"), f"{theirs}.conv", bias=False) + norm_with_statistics((ours, "bn"), f"{theirs}.bn")
    return lines


def _layers():
    """(block or None, layer) of each convolution."""
    for block, branches in ((None, (STEM,)), *BLOCKS.items()):
        steps = [step for branch in branches for step in branch if not isinstance(step, str)]
        for step in steps:
            yield from ((block, layer) for layer in ([step] if isinstance(step, Layer) else step))


def example(module: InceptionV3, tensors: dict):
    """(x, label, cond) of an image of the smallest size."""
    del module, tensors
    return jnp.zeros((1, 75, 75, 3)), None, None


def config(module: InceptionV3, variables: dict) -> dict:
    """The fields of the network, for readers; `build` finds them in the tensors."""
    del variables
    return {"architectures": ["InceptionV3"], "num_classes": module.num_classes, "patched": module.patched}


ARCHITECTURE = Architecture(select, build, table, example, config, ignored=IGNORED, source=SOURCE)
