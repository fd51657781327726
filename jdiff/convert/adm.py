"""ADM: checkpoints of github.com/openai/guided-diffusion (Dhariwal & Nichol 2021, arXiv:2105.05233), and of its parent.

The tensors tell neither the attention heads nor the order of queries, keys and values. The published networks are known
by their shapes. For others `load` asks for guided-diffusion's flags, as overrides or in a config.json beside the file:
num_heads or num_head_channels (`heads` and `head_channels` mean the same), and use_new_attention_order. A flag that is
given overrides what is known. The noise label is the index, 0 to 999.
"""

from typing import Any

import numpy as np

from jdiff.convert import unets
from jdiff.convert.architecture import Architecture
from jdiff.convert.table import AS_IS, Entry, Layout, Mismatch, conv, dense, norm
from jdiff.models.unet import UNet
from jdiff.models.unet_presets import ADM

ROLES = dict(
    norm_0="in_layers.0", conv_0="in_layers.2", embed="emb_layers.1", norm_1="out_layers.0", conv_1="out_layers.3",
    skip="skip_connection",
)  # fmt: skip
WHOSE = "guided-diffusion's UNetModel"
SETTINGS = ("num_heads", "num_head_channels", "use_new_attention_order")
WORDS = {"heads": "num_heads", "head_channels": "num_head_channels"}
BY_4 = dict(num_heads=4, use_new_attention_order=False)
OF_64 = dict(num_head_channels=64, use_new_attention_order=False)
# the flags in the README, by (channels, multipliers, blocks, attention, image channels in and out, classes)
PUBLISHED = {
    (192, (1, 2, 3, 4), 3, (1, 2, 3), 3, 6, 1000): OF_64 | dict(use_new_attention_order=True),  # 64x64_diffusion
    (256, (1, 1, 2, 3, 4), 2, (2, 3, 4), 3, 6, 1000): BY_4,  # 128x128_diffusion
    (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 3, 6, 1000): OF_64,  # 256x256_diffusion
    (256, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 3, 6, 0): OF_64,  # 256x256_diffusion_uncond, lsun_*
    (256, (0.5, 1, 1, 2, 2, 4, 4), 2, (4, 5, 6), 3, 6, 1000): OF_64,  # 512x512_diffusion
    (192, (1, 1, 2, 2, 4, 4), 2, (3, 4, 5), 6, 6, 1000): BY_4,  # 64_256_upsampler
    (192, (1, 1, 2, 2, 4, 4), 2, (4, 5), 6, 6, 1000): OF_64,  # 128_512_upsampler
}


def one_spelling(settings: dict) -> dict:
    """The settings in the words of the flags; a number of heads replaces a width of each head."""
    found = {WORDS.get(name, name): value for name, value in settings.items()}
    return dict(num_head_channels=0) | found if "num_heads" in found else found


def select(content: dict, settings: dict) -> dict[str, np.ndarray]:
    """The state_dict in the new attention order: all queries, then all keys, then all values."""
    flags, tensors = _flags(_shape(content), settings), dict(content)
    if flags["use_new_attention_order"]:
        return tensors
    for name, w in content.items():
        if ".qkv." in name:
            split = np.asarray(w).reshape(_heads(flags, len(w) // 3), 3, -1, *w.shape[1:])
            tensors[name] = split.swapaxes(0, 1).reshape(w.shape)
    return tensors


def build(tensors: dict[str, np.ndarray], config: dict, **overrides) -> UNet:
    """The network whose tensors these are: widths and classes from names and shapes, heads from the flags.

    Raises:
        Mismatch: for another network's tensors, and where heads or their order are not known.
    """
    shape, overrides = _shape(tensors), one_spelling(overrides)
    flags = _flags(shape, config | overrides)
    channels, out = shape.pop("in_channels"), shape.pop("out_channels")
    fields = shape | dict(
        out_multiplier=unets.ratio(out, channels),
        heads=flags.get("num_heads", UNet.heads),
        head_channels=flags["num_head_channels"],
        dropout=config.get("dropout", 0.0),
    )
    return UNet(**ADM | fields | {name: value for name, value in overrides.items() if name not in SETTINGS})


def _shape(tensors: dict[str, np.ndarray]) -> dict[str, Any]:
    """The fields of the UNet that names and shapes tell, and the channels of the images in and out."""
    for name in ("time_embed.0.weight", "input_blocks.0.0.weight", "out.2.weight"):
        if name not in tensors:
            raise Mismatch(f"not a network of guided-diffusion: 1 missing: {name}")
    channels = tensors["time_embed.0.weight"].shape[1]
    first, in_channels = tensors["input_blocks.0.0.weight"].shape[:2]
    levels: list[list[tuple[int, bool]]] = [[]]  # of each level: (width, attention) of its blocks
    level = 0
    count = 1 + max(int(name.split(".")[1]) for name in tensors if name.startswith("input_blocks."))
    blocky = False
    for i in range(1, count):
        # a block that resamples looks like others: it is known by its place among them
        strided = f"input_blocks.{i}.0.op.weight" in tensors
        if strided or _resamples(tensors, i, count):
            blocky = blocky or not strided
            levels.append([])
            level += 1
        else:
            width = len(tensors[f"input_blocks.{i}.0.in_layers.2.weight"])
            levels[level].append((width, f"input_blocks.{i}.1.qkv.weight" in tensors))
    affine = tensors["input_blocks.1.0.emb_layers.1.weight"]
    return dict(
        channels=channels,
        first_channels=0 if first == channels else first,
        multipliers=tuple(unets.ratio(blocks[0][0], channels) for blocks in levels),
        blocks=len(levels[0]),
        attention=tuple(i for i, blocks in enumerate(levels) if blocks[0][1]),
        in_channels=in_channels,
        out_channels=len(tensors["out.2.weight"]),
        num_classes=len(tensors["label_emb.weight"]) if "label_emb.weight" in tensors else 0,
        null_class=False,
        adaptive=len(affine) == 2 * len(tensors["input_blocks.1.0.in_layers.2.weight"]),
        resample="block" if blocky else "conv",
    )


def table(net: UNet) -> list[Entry]:
    """The pairs of names: their numbered blocks are in the order of our stages."""
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
    """The smallest (x, label, cond) that the network takes."""
    return unets.example(net, tensors, "input_blocks.0.0.weight")


def config(net: UNet, variables: dict) -> dict:
    """The flags that `load` asks for.

    Raises:
        ValueError: for a network that guided-diffusion's UNetModel cannot express.
    """
    first = int(net.channels * net.multipliers[0])
    attends = (True, None) if net.depth - 1 in net.attention else (True,)
    valid: dict[str, tuple] = dict(
        decoder_attention=("each",), middle_attention=attends, skip_scale=(1,), groups=(32,), epsilon=(1e-5,),
        resample=("conv", "block"), pyramid_in=("",), pyramid_out=("",), label_scale=(1,), wave_multiplier=(1,),
        endpoint=(False,), fourier=(0,), augment_dim=(0,),
        first_channels=(0, first) if first == net.channels else (first,),
    )  # fmt: skip
    valid |= dict(class_at=("embedding",)) if net.num_classes else {}
    valid |= dict(conv_padding=((1, 1),)) if net.resample == "conv" else dict(filter=((1, 1),), project=(False,))
    unets.check_fields(net, WHOSE, valid)
    unets.check_groups(net, WHOSE)
    unets.image_channels(variables, WHOSE)
    return {
        "num_head_channels": net.head_channels or -1, "num_heads": net.heads, "use_new_attention_order": True,
        "dropout": net.dropout,
    }  # fmt: skip


def _stage(net: UNet, part, name: str, place: int) -> list[Entry]:
    if part.resample and net.resample == "conv":
        return conv((part.name,), f"{name}.{place}.{'op' if part.resample == 'down' else 'conv'}")
    lines = unets.block(net, part, f"{name}.{place}", ROLES)
    if part.attention:
        prefix = f"{name}.{place + 1}"
        flat = Layout(lambda w: w[..., 0].T, lambda k: k.T[..., None])
        names = f"{prefix}.qkv.weight", f"{prefix}.qkv.bias"
        lines += unets.attention(part, (flat, AS_IS), names, flat, AS_IS, f"{prefix}.proj_out", f"{prefix}.norm")
    return lines


def _resamples(tensors, i: int, count: int) -> bool:
    """Whether input block i is a residual block that resamples.

    Such a block has no attention, and the output block that mirrors it ends with another residual block.
    """
    if f"input_blocks.{i}.0.in_layers.2.weight" not in tensors or f"input_blocks.{i}.1.qkv.weight" in tensors:
        return False
    mirror = f"output_blocks.{count - 1 - i}."
    last = max(int(name.split(".")[2]) for name in tensors if name.startswith(mirror))
    return last > 0 and f"{mirror}{last}.in_layers.2.weight" in tensors


def _flags(shape: dict, settings: dict) -> dict[str, Any]:
    """The flags of a published network, overridden by the settings; num_head_channels is 0 where num_heads holds."""
    published = {}
    if shape["adaptive"] and shape["resample"] == "block":
        names = ("channels", "multipliers", "blocks", "attention", "in_channels", "out_channels", "num_classes")
        published = PUBLISHED.get(tuple(shape[name] for name in names), {})
    flags = published | one_spelling(settings)
    flags["num_head_channels"] = max(flags.get("num_head_channels") or 0, 0)
    unknown = [] if flags["num_head_channels"] or flags.get("num_heads") else ["num_heads or num_head_channels"]
    unknown += [] if "use_new_attention_order" in flags else ["use_new_attention_order"]
    if unknown:
        raise Mismatch(f"not one of guided-diffusion's published networks: give its flags {' and '.join(unknown)}")
    return flags


def _heads(flags: dict, channels: int) -> int:
    head_channels, heads = flags["num_head_channels"], flags.get("num_heads", 0)
    if channels % (head_channels or heads):
        parts = f"heads of {head_channels}" if head_channels else f"{heads} heads"
        raise Mismatch(f"{channels} channels do not divide into {parts}")
    return channels // head_channels if head_channels else heads


ARCHITECTURE = Architecture(select, build, table, example, config, settings=SETTINGS, one_spelling=one_spelling)
