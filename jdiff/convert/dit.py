"""DiT: state_dicts of github.com/facebookresearch/DiT, released or within the checkpoints of its training.

The released weights are CC-BY-NC. The noise label is the timestep, 0 to 999.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff.convert.architecture import Architecture
from jdiff.convert.table import AS_IS, Entry, Mismatch, conv, dense
from jdiff.models.dit import SIZES, DiT
from jdiff.models.transformer import sincos_positions

# the positions are fixed and computed by our network; `build` checks that the file has the same ones
IGNORED = ("pos_embed",)

PARTS = {
    ("modulation",): "adaLN_modulation.1",
    ("attention", "qkv"): "attn.qkv",
    ("attention", "out"): "attn.proj",
    ("feed", "in"): "mlp.fc1",
    ("feed", "out"): "mlp.fc2",
}


def select(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, Any]:
    """The state_dict; of a training checkpoint, its averaged one."""
    del settings
    for name in ("ema", "model"):
        if isinstance(content.get(name), Mapping):
            return dict(content[name])
    return dict(content)


def build(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], **overrides) -> DiT:
    """The DiT whose tensors these are. The number of heads is in the config, or known for the published widths.

    Raises:
        Mismatch: where tensors that tell the shapes are missing, where heads are not known, and for other positions.
    """
    needed = (
        "x_embedder.proj.weight",
        "blocks.0.mlp.fc1.weight",
        "y_embedder.embedding_table.weight",
        "final_layer.linear.weight",
    )
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise Mismatch(f"these are not a DiT's tensors: {', '.join(missing)} missing")
    patches, feed, classes, last = (tensors[name].shape for name in needed)
    width, channels, patch = patches[:3]
    heads = {width: heads for width, _, heads in SIZES.values()}.get(width)
    fields = dict(
        width=width,
        depth=len({name.split(".")[1] for name in tensors if name.startswith("blocks.")}),
        heads=config.get("num_heads", heads),
        patch=patch,
        ratio=feed[0] / width,
        num_classes=classes[0] - 1,
        channels=channels,
        out_multiplier=last[0] // (patch * patch * channels),
        label_scale=1.0,
    )
    module = DiT(**fields | overrides)
    if module.heads is None:
        known = ", ".join(str(width) for width, _, _ in SIZES.values())
        raise Mismatch(f"the number of heads is not in the file and known for widths {known}, not {width}; give heads=")
    if "pos_embed" in tensors and module.sincos:
        _check_positions(np.asarray(tensors["pos_embed"]), width)
    return module


def table(module: DiT) -> list[Entry]:
    """The pairs of names, block by block."""
    lines = conv(("patches",), "x_embedder.proj")
    lines += dense(("label_in",), "t_embedder.mlp.0") + dense(("label_out",), "t_embedder.mlp.2")
    lines += [Entry(("params", "class", "table", "embedding"), "y_embedder.embedding_table.weight", AS_IS)]
    for i in range(module.depth):
        for ours, theirs in PARTS.items():
            lines += dense((f"block_{i}", *ours), f"blocks.{i}.{theirs}")
    lines += dense(("modulation",), "final_layer.adaLN_modulation.1") + dense(("out",), "final_layer.linear")
    return lines


def example(module: DiT, tensors: dict):
    """(x, label, cond) of one image of two patches."""
    del tensors
    x = jnp.zeros((1, module.patch, 2 * module.patch, module.channels or 4))
    return x, jnp.zeros(1), jnp.zeros(1, int)


def config(module: DiT, variables: dict) -> dict:
    """The arguments of the published class.

    Raises:
        ValueError: for a module that the published class cannot express.
    """
    del variables
    plain = DiT()
    for name in ("context", "sincos", "rope", "qk_norm"):
        if getattr(module, name) != getattr(plain, name):
            raise ValueError(f"the published DiT has no {name}={getattr(module, name)!r}")
    if not module.num_classes or module.channels is None or module.label_scale != 1:
        raise ValueError("the published DiT has classes, a known number of channels and label_scale=1; set these")
    return dict(
        patch_size=module.patch,
        in_channels=module.channels,
        hidden_size=module.width,
        depth=module.depth,
        num_heads=module.heads,
        mlp_ratio=module.ratio,
        num_classes=module.num_classes,
        learn_sigma=module.out_multiplier == 2,
    )


def _check_positions(given: np.ndarray, width: int) -> None:
    side = math.isqrt(given.shape[1])
    if given.shape != (1, side * side, width) or np.abs(given[0] - sincos_positions(side, side, width)).max() > 1e-5:
        raise Mismatch("pos_embed is not the fixed sin-cos table of a square grid, which is all that is known here")


ARCHITECTURE = Architecture(select, build, table, example, config, ignored=IGNORED)
