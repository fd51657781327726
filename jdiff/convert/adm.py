"""ADM: checkpoints of github.com/openai/guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233), and of its parent.

What the tensors do not tell is asked in the words of its flags, as settings of `load` or in a config.json beside:
num_head_channels (64, as in all published models) or num_heads, and use_new_attention_order (False; True for the
64x64 models). The label is the index, 0 to 999.
"""

import numpy as np

from jdiff.convert import unets
from jdiff.convert.table import AS_IS, Entry, Layout, Mismatch, conv, dense, norm
from jdiff.models.unet import ADM, UNet

IGNORED = ()
ROLES = dict(
    norm_0="in_layers.0", conv_0="in_layers.2", embed="emb_layers.1", norm_1="out_layers.0", conv_1="out_layers.3",
    skip="skip_connection",
)  # fmt: skip
FLAGS = ("num_heads", "num_head_channels", "use_new_attention_order")


def select(content: dict, settings: dict) -> dict[str, np.ndarray]:
    """The state_dict, queries, keys and values in the new order: all of each together."""
    if settings.get("use_new_attention_order", False):
        return dict(content)
    tensors = dict(content)
    for name, w in content.items():
        if ".qkv." in name:
            heads = _heads(settings, len(w) // 3)
            split = np.asarray(w).reshape(heads, 3, -1, *w.shape[1:])
            tensors[name] = split.swapaxes(0, 1).reshape(w.shape)
    return tensors


def build(tensors: dict[str, np.ndarray], config: dict, **overrides) -> UNet:
    """Shape and classes from names and shapes, heads from the flags, the rest by overrides."""
    settings = config | overrides
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"):
        if name not in tensors:
            raise Mismatch(f"not a network of guided-diffusion: 1 missing: {name}")
    channels = tensors["time_embed.0.weight"].shape[1]
    first, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    levels, level = [[]], 0  # of each level: (width, attention) of its blocks
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))
    blocky = False
    for i in range(1, count):
        width = tensors.get(f"input_blocks.{i}.0.in_layers.2.weight")
        # a block that resamples keeps its width and is followed by the next level: its place tells
        strided = f"input_blocks.{i}.0.op.weight" in tensors
        if strided or _resamples(tensors, i, count):
            blocky = blocky or not strided
            levels.append([])
            level += 1
        else:
            levels[level].append((len(width), f"input_blocks.{i}.1.qkv.weight" in tensors))
    affine = tensors["input_blocks.1.0.emb_layers.1.weight"]
    fields = dict(
        channels=channels,
        first_channels=0 if first == channels else first,
        multipliers=tuple(unets.ratio(blocks[0][0], channels) for blocks in levels),
        blocks=len(levels[0]),
        attention=tuple(i for i, blocks in enumerate(levels) if blocks[0][1]),
        out_multiplier=len(tensors["out.2.weight"]) // in_channels,
        num_classes=len(tensors["label_emb.weight"]) if "label_emb.weight" in tensors else 0,
        null_class=False,
        adaptive=len(affine) == 2 * len(tensors["input_blocks.1.0.in_layers.2.weight"]),
        resample="block" if blocky else "conv",
    )
    own = {k: v for k, v in overrides.items() if k not in FLAGS}
    if settings.get("num_heads") and not settings.get("num_head_channels", 0) > 0:
        fields |= dict(heads=settings["num_heads"], head_channels=0)
    elif settings.get("num_head_channels", 0) > 0:
        fields |= dict(head_channels=settings["num_head_channels"])
    return UNet(**ADM | fields | own)


def table(net: UNet) -> list[Entry]:
    """The numbered blocks of theirs, in the order of our stages."""
    lines = unets.hidden("time_embed.0", swapped=False) + dense(("noise", "out"), "time_embed.2")
    if net.num_classes:
        lines.append(Entry(("params", "class", "table", "embedding"), "label_emb.weight", AS_IS))
    lines += conv(("in",), "input_blocks.0.0")
    for i, part in enumerate(net.encoder(), 1):
        lines += _stage(net, part, f"input_blocks.{i}", 0)
    for part, place in zip(net.middle(), (0, 2), strict=True):
        lines += _stage(net, part, "middle_block", place)
    n, place = -1, 0
    for part in net.decoder():
        n, place = (n, place) if part.resample else (n + 1, 0)
        lines += _stage(net, part, f"output_blocks.{n}", place)
        place += 1 + part.attention  # what resamples is the last layer of the block before it
    return lines + norm(("norm_out",), "out.0") + conv(("out",), "out.2")


def example(net: UNet, tensors: dict):
    """(x, label, cond) of the smallest size."""
    return unets.example(net, tensors, "input_blocks.0.0.weight")


def config(net: UNet, variables: dict) -> dict:
    """The flags that `load` asks for."""
    del variables
    return {
        "num_head_channels": net.head_channels or -1, "num_heads": net.heads, "use_new_attention_order": True
    }  # fmt: skip


def _stage(net: UNet, part, name: str, place: int) -> list[Entry]:
    if part.resample and net.resample == "conv":
        return conv((part.name,), f"{name}.{place}.{'op' if part.resample == 'down' else 'conv'}")
    lines = unets.block(net, part, f"{name}.{place}", ROLES)
    if part.attention:
        there = f"{name}.{place + 1}"
        flat = Layout(lambda w: w[..., 0].T, lambda k: k.T[..., None])
        names = f"{there}.qkv.weight", f"{there}.qkv.bias"
        lines += unets.attention(part, (flat, AS_IS), names, flat, AS_IS, f"{there}.proj_out", f"{there}.norm")
    return lines


def _resamples(tensors, i: int, count: int) -> bool:
    """Whether input block i is a residual block that resamples: it has no attention, keeps its width, has no skip
    layer, and the output block that mirrors it ends with another block."""
    if f"input_blocks.{i}.0.in_layers.2.weight" not in tensors or f"input_blocks.{i}.1.qkv.weight" in tensors:
        return False
    mirror = f"output_blocks.{count - 1 - i}."
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith(mirror))
    return last > 0 and f"{mirror}{last}.in_layers.2.weight" in tensors


def _heads(settings: dict, channels: int) -> int:
    per_head = settings.get("num_head_channels", 0)
    if per_head and per_head > 0:
        return channels // per_head
    return settings["num_heads"] if settings.get("num_heads") else channels // ADM["head_channels"]
