"""torchvision's ResNet: state_dicts of resnet18, 34, 50 and of others of BasicBlock or Bottleneck of plain width."""

import jax.numpy as jnp
import numpy as np

from jdiff.convert.architecture import Architecture
from jdiff.convert.table import AS_IS, Entry, Mismatch, conv, dense
from jdiff.models.resnet import ResNet

IGNORED = ("*.num_batches_tracked",)


def select(content: dict, settings: dict) -> dict[str, np.ndarray]:
    """The state_dict, which the file may hold as "state_dict" or "model", and which may be that of DataParallel."""
    del settings
    for key in ("state_dict", "model"):
        if isinstance(content.get(key), dict):
            content = content[key]
    return {name.removeprefix("module."): tensor for name, tensor in content.items()}


def build(tensors: dict[str, np.ndarray], config: dict, **overrides) -> ResNet:
    """The network whose tensors these are, by their names and shapes.

    Raises:
        Mismatch: where tensors that tell the shapes are missing.
    """
    del config
    for name in ("conv1.weight", "layer1.0.conv1.weight", "fc.weight"):
        if name not in tensors:
            raise Mismatch(f"not torchvision's ResNet: 1 missing: {name}")
    stages = sorted({name.split(".")[0] for name in tensors if name.startswith("layer")})
    depths = tuple(len({n.split(".")[1] for n in tensors if n.startswith(f"{stage}.")}) for stage in stages)
    width, channels, kernel, _ = tensors["conv1.weight"].shape
    fields = dict(
        depths=depths,
        bottleneck="layer1.0.conv3.weight" in tensors,
        width=width,
        num_classes=len(tensors["fc.weight"]),
        in_channels=channels,
        stem="imagenet" if kernel == 7 else "small",
    )
    return ResNet(**fields | overrides)


def table(module: ResNet) -> list[Entry]:
    """The pairs of names.

    Raises:
        ValueError: for a network that is told the noise level, which torchvision's is not.
    """
    if module.noise:
        raise ValueError("torchvision's ResNet has no noise level; noise must be False")
    lines = _layer(("conv_in",), "conv1") + norm_with_statistics(("norm_in",), "bn1") + dense(("out",), "fc")
    for stage, depth in enumerate(module.depths):
        for i in range(depth):
            ours, theirs = f"stage_{stage}_{i}", f"layer{stage + 1}.{i}"
            for k in range(3 if module.bottleneck else 2):
                lines += _layer((ours, f"conv_{k}"), f"{theirs}.conv{k + 1}")
                lines += norm_with_statistics((ours, f"norm_{k}"), f"{theirs}.bn{k + 1}")
            if i == 0 and (stage or module.bottleneck):
                lines += _layer((ours, "conv_skip"), f"{theirs}.downsample.0")
                lines += norm_with_statistics((ours, "norm_skip"), f"{theirs}.downsample.1")
    return lines


def example(module: ResNet, tensors: dict):
    """(x, label, cond) of an image, which has three channels unless the module says otherwise."""
    del tensors
    return jnp.zeros((1, 32, 32, module.in_channels or 3)), None, None


def config(module: ResNet, variables: dict) -> dict:
    """The fields of the network, for readers; `build` finds them in the tensors."""
    del variables
    return {
        "architectures": ["ResNet"], "depths": list(module.depths), "bottleneck": module.bottleneck,
        "width": module.width, "num_classes": module.num_classes, "stem": module.stem,
    }  # fmt: skip


def _layer(path, name):
    return conv(path, name, bias=False)


def norm_with_statistics(path, name):
    """The entries of a batch norm."""
    names = {"scale": "weight", "bias": "bias", "mean": "running_mean", "var": "running_var"}
    kind = {"scale": "params", "bias": "params", "mean": "batch_stats", "var": "batch_stats"}
    return [Entry((kind[ours], *path, ours), f"{name}.{theirs}", AS_IS) for ours, theirs in names.items()]


ARCHITECTURE = Architecture(select, build, table, example, config, ignored=IGNORED)
