"""diffusers' UNet2DModel, both ways: the google/ddpm-* family, and what users train in the same class.

`load` takes a folder of `save_pretrained`, of the model or of a pipeline around it, or a file of weights with its
config.json beside it. The noise label is the timestep, 0 to 999.
"""

from pathlib import Path

import numpy as np

from jdiff.convert import unets
from jdiff.convert.architecture import Architecture
from jdiff.convert.table import AS_IS, DENSE, Entry, Layout, Mismatch, conv, dense, norm
from jdiff.models.unet import UNet

WHOSE = "diffusers' UNet2DModel"
IGNORED = ("*.Conv2d_0.*",)  # a second name of the same convolution
ROLES = dict(
    norm_0="norm1", conv_0="conv1", embed="time_emb_proj", norm_1="norm2", conv_1="conv2", skip="conv_shortcut"
)
OLD = {".query.": ".to_q.", ".key.": ".to_k.", ".value.": ".to_v.", ".proj_attn.": ".to_out.0."}
# (attention, resampling in blocks) of the names of their blocks
DOWN = {
    "DownBlock2D": (False, False), "AttnDownBlock2D": (True, None), "ResnetDownsampleBlock2D": (False, True),
}  # fmt: skip
UP = {"UpBlock2D": (False, False), "AttnUpBlock2D": (True, None), "ResnetUpsampleBlock2D": (False, True)}
DEFAULTS = dict(
    in_channels=3, out_channels=3, center_input_sample=False, time_embedding_type="positional", freq_shift=0,
    flip_sin_to_cos=True, down_block_types=("DownBlock2D", *("AttnDownBlock2D",) * 3), layers_per_block=2,
    up_block_types=(*("AttnUpBlock2D",) * 3, "UpBlock2D"), block_out_channels=(224, 448, 672, 896),
    mid_block_type="UNetMidBlock2D", mid_block_scale_factor=1, downsample_padding=1, downsample_type="conv",
    upsample_type="conv", dropout=0.0, act_fn="silu", attention_head_dim=8, norm_num_groups=32, norm_eps=1e-5,
    attn_norm_num_groups=None, resnet_time_scale_shift="default", add_attention=True, class_embed_type=None,
    num_class_embeds=None, time_embedding_dim=None,
)  # fmt: skip
WIDEST, DEEPEST = 2**16, 1000  # more than any network has, and fewer than would take hours to build
NEEDED = (
    "in_channels", "out_channels", "block_out_channels", "down_block_types", "up_block_types", "layers_per_block",
    "norm_num_groups",
)  # fmt: skip


def folder(path: Path) -> Path:
    """The folder of the network, where the given one is that of a pipeline."""
    return path / "unet" if (path / "unet" / "config.json").is_file() else path


def select(content: dict, settings: dict) -> dict[str, np.ndarray]:
    """The state_dict under today's names, with the layer that reads the sinusoids in our order, cosines first."""
    tensors = {}
    for name, tensor in content.items():
        for old, new in OLD.items():
            name = name.replace(old, new) if ".attentions." in name else name
        tensors[name] = tensor
    first = "time_embedding.linear_1.weight"
    if first in tensors and not settings.get("flip_sin_to_cos", True):
        tensors[first] = unets.swap(tensors[first], 1)
    return tensors


def build(tensors: dict[str, np.ndarray], config: dict, **overrides) -> UNet:
    """The network of a config.json.

    Raises:
        Mismatch: for settings that our UNet does not have.
    """
    del tensors
    if "block_out_channels" not in config:
        raise Mismatch("a UNet2DModel needs the config.json that lies beside its weights; there is none")
    c = DEFAULTS | config
    if empty := [key for key in NEEDED if not c[key]]:
        raise Mismatch(f"the config.json of a UNet2DModel says {', '.join(f'{key} {c[key]!r}' for key in empty)}")
    widths, depth = c["block_out_channels"], len(c["block_out_channels"])
    large = max(c["in_channels"], c["out_channels"], c["norm_num_groups"], *widths)
    if large > WIDEST or c["layers_per_block"] * depth > DEEPEST:
        raise Mismatch(
            f"the config.json of a UNet2DModel says {depth} levels of {c['layers_per_block']} blocks and up to {large} "
            f"channels; expected at most {DEEPEST} blocks and {WIDEST} channels"
        )
    head = c["attention_head_dim"]
    scale_shift = c["resnet_time_scale_shift"] == "scale_shift"
    blocks = (DOWN, c["down_block_types"]), (UP, c["up_block_types"])
    kinds = [[known.get(name.removeprefix("UNetRes")) for name in names] for known, names in blocks]
    expected = {
        "center_input_sample": (False,), "time_embedding_type": ("positional",), "freq_shift": (0, 1),
        "mid_block_type": ("UNetMidBlock2D",), "mid_block_scale_factor": (1,), "act_fn": ("silu", "swish"),
        "class_embed_type": (None,), "downsample_padding": (0, 1), "downsample_type": ("conv", "resnet"),
        "upsample_type": ("conv", "resnet"), "resnet_time_scale_shift": ("default", "scale_shift"),
        "time_embedding_dim": (None, 4 * widths[0]),
        "attn_norm_num_groups": (c["norm_num_groups"],) if scale_shift else (None, c["norm_num_groups"]),
    }  # fmt: skip
    wrong = [f"{key} {c[key]!r}" for key, valid in expected.items() if c[key] not in valid]
    names = zip([*c["down_block_types"], *c["up_block_types"]], [*kinds[0], *kinds[1]], strict=True)
    wrong += [f"block {name!r}" for name, kind in names if kind is None]
    if not wrong:
        down, up = ([kind for kind in side if kind is not None] for side in kinds)
        attention = [kind[0] for kind in down]
        if attention != [kind[0] for kind in reversed(up)]:
            wrong.append("attention on other levels on the way up than on the way down")
        moves = [(kind[1], c["downsample_type"] == "resnet") for kind in down[:-1]]
        moves += [(kind[1], c["upsample_type"] == "resnet") for kind in up[:-1]]
        # blocks without attention say themselves whether they resample; for the others the config says it
        blocky = {by_config if by_name is None else by_name for by_name, by_config in moves}
        if len(blocky) > 1:
            wrong.append("resampling in blocks on some levels, by convolutions on others")
    if wrong:
        raise Mismatch(f"this UNet2DModel is not one that can be converted: {', '.join(wrong)}")
    fields = dict(
        channels=widths[0], multipliers=tuple(unets.ratio(w, widths[0]) for w in widths),
        blocks=c["layers_per_block"], attention=tuple(i for i in range(depth) if attention[i]),
        heads=1, head_channels=head or 0, middle_attention=c["add_attention"], adaptive=scale_shift,
        resample="block" if True in blocky else "conv", dropout=c["dropout"],
        conv_padding=(0, 1) if c["downsample_padding"] == 0 else (1, 1), label_scale=1.0, wave_multiplier=1,
        endpoint=c["freq_shift"] == 1, groups=c["norm_num_groups"], min_group_width=1, epsilon=c["norm_eps"],
        num_classes=c["num_class_embeds"] or 0, null_class=False,
        out_multiplier=unets.ratio(c["out_channels"], c["in_channels"]),
    )  # fmt: skip
    return UNet(**fields | overrides)


def table(net: UNet) -> list[Entry]:
    """The pairs of names.

    Raises:
        ValueError: where UNet2DModel has no such network.
    """
    valid = dict(
        filter=((1, 1),), pyramid_in=("",), pyramid_out=("",), wave_multiplier=(1,), label_scale=(1,), skip_scale=(1,),
        fourier=(0,), augment_dim=(0,), first_channels=(0, net.channels), project=(False,), resample=("conv", "block"),
        decoder_attention=("each",), multipliers=((1, *net.multipliers[1:]),),
    )  # fmt: skip
    unets.check_fields(net, WHOSE, valid | (dict(class_at=("embedding",)) if net.num_classes else {}))
    lines = conv(("in",), "conv_in") + dense(("noise", "hidden"), "time_embedding.linear_1")
    lines += dense(("noise", "out"), "time_embedding.linear_2")
    if net.num_classes:
        lines.append(Entry(("params", "class", "table", "embedding"), "class_embedding.weight", AS_IS))
    for part in net.encoder():
        prefix = f"down_blocks.{part.level}"
        lines += _stage(net, part, f"{prefix}.downsamplers.0", prefix)
    for part in net.middle():
        lines += _stage(net, part, "", "mid_block")
    for part in net.decoder():
        prefix = f"up_blocks.{net.depth - 1 - part.level}"
        lines += _stage(net, part, f"{prefix}.upsamplers.0", prefix)
    return lines + norm(("norm_out",), "conv_norm_out") + conv(("out",), "conv_out")


def example(net: UNet, tensors: dict):
    """The smallest (x, label, cond) that the network takes."""
    return unets.example(net, tensors, "conv_in.weight")


def config(net: UNet, variables: dict) -> dict:
    """The config.json that `UNet2DModel.from_pretrained` reads.

    Raises:
        ValueError: for groups or heads that UNet2DModel cannot express.
    """
    channels = unets.image_channels(variables, WHOSE)
    unets.check_groups(net, WHOSE)
    attended = {part.features for part in [*net.encoder(), *net.middle()] if part.attention}
    head = net.head_channels or (max(attended, default=1) // net.heads if net.heads > 1 else None)
    if not net.head_channels and net.heads > 1 and len(attended) > 1:
        raise ValueError(f"{WHOSE} has a width per head; {net.heads} heads of {sorted(attended)} have not")
    attends = [level in net.attention for level in range(net.depth)]
    blocky = net.resample == "block"
    down = [name for a in attends for name, kind in DOWN.items() if kind == ((True, None) if a else (False, blocky))]
    up = [name for a in attends[::-1] for name, kind in UP.items() if kind == ((True, None) if a else (False, blocky))]
    middle = attends[-1] if net.middle_attention is None else net.middle_attention
    widths = {part.level: part.features for part in net.encoder()}
    return {
        "_class_name": "UNet2DModel", "in_channels": channels, "out_channels": int(channels * net.out_multiplier),
        "center_input_sample": False, "time_embedding_type": "positional", "freq_shift": int(net.endpoint),
        "flip_sin_to_cos": True, "down_block_types": down, "up_block_types": up,
        "block_out_channels": [widths[level] for level in range(net.depth)], "layers_per_block": net.blocks,
        "downsample_padding": 0 if tuple(net.conv_padding) == (0, 1) else 1,
        "downsample_type": "resnet" if blocky else "conv", "upsample_type": "resnet" if blocky else "conv",
        "dropout": net.dropout, "act_fn": "silu", "attention_head_dim": head, "norm_num_groups": net.groups,
        "attn_norm_num_groups": net.groups, "norm_eps": net.epsilon, "add_attention": middle,
        "resnet_time_scale_shift": "scale_shift" if net.adaptive else "default",
        "num_class_embeds": net.num_classes + net.null_class if net.num_classes else None,
    }  # fmt: skip


def _stage(net: UNet, part, resampler: str, prefix: str) -> list[Entry]:
    if part.resample:
        if net.resample == "block":
            return unets.block(net, part, resampler, ROLES)
        return conv((part.name,), f"{resampler}.conv")
    i = unets.index(part)
    lines = unets.block(net, part, f"{prefix}.resnets.{i}", ROLES)
    if part.attention:
        name = f"{prefix}.attentions.{i}"
        names = tuple(tuple(f"{name}.to_{which}.{end}" for which in "qkv") for end in ("weight", "bias"))
        kernels = Layout(lambda *w: np.concatenate(w).T, lambda k: np.split(k.T, 3))
        biases = Layout(lambda *b: np.concatenate(b), lambda b: np.split(b, 3))
        lines += unets.attention(part, (kernels, biases), names, DENSE, AS_IS, f"{name}.to_out.0", f"{name}.group_norm")
    return lines


ARCHITECTURE = Architecture(select, build, table, example, config, ignored=IGNORED, folder=folder)
