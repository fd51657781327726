"""EDM's networks (Karras et al. 2022, arXiv:2206.00364): SongUNet, which is DDPM++ or NCSN++, and DhariwalUNet, or ADM.

The pickles that NVIDIA publishes hold code and are not read. Export the weights once, where EDM's repository is at hand:

    python -c "import pickle, sys, torch; torch.save(pickle.load(open(sys.argv[1], 'rb'))['ema'].state_dict(), sys.argv[2])" IN.pkl OUT.pt

The label is that of the preconditioning the network was trained with, log(sigma) / 4 for EDM's.
"""  # noqa: E501

import re

import numpy as np

from jdiff.convert import unets
from jdiff.convert.table import AS_IS, DENSE, WIDTH_ONE, Entry, Layout, Mismatch, conv, dense, fused, norm
from jdiff.models.unet import ADM, SONG, UNet

IGNORED = ("*.resample_filter", "sigma_*")
ROLES = dict(norm_0="norm0", conv_0="conv0", embed="affine", norm_1="norm1", conv_1="conv1", skip="skip")


def select(content: dict, settings: dict) -> dict[str, np.ndarray]:
    """The state_dict of the preconditioned network or of the network alone, blocks named by level, not resolution."""
    del settings
    tensors = {name.removeprefix("model."): tensor for name, tensor in content.items()}
    found = {match[2] for name in tensors if (match := re.match(r"(enc|dec)\.(\d+)x\d+_", name))}
    level = {size: i for i, size in enumerate(sorted(found, key=int, reverse=True))}
    return {
        re.sub(r"^(enc|dec)\.(\d+)x\d+_", lambda m: f"{m[1]}.{level[m[2]]}_", name): tensor
        for name, tensor in tensors.items()
    }


def build(tensors: dict[str, np.ndarray], config: dict, **overrides) -> UNet:
    """Everything but the dropout rate from names and shapes."""
    del config
    if "map_layer0.weight" not in tensors or "enc.0_conv.weight" not in tensors:
        raise Mismatch("not a network of EDM: 2 missing: map_layer0.weight, enc.RESxRES_conv.weight")
    adm = "out_norm.weight" in tensors
    first, in_channels = tensors["enc.0_conv.weight"].shape[:2]
    width, waves = tensors["map_layer0.weight"].shape
    channels = width // 4
    depth = 1 + max(int(m[1]) for name in tensors if (m := re.match(r"enc\.(\d+)_", name)))
    widths = [len(tensors[f"enc.{level}_block0.conv0.weight"]) for level in range(depth)]
    blocks = len({name.split(".")[1] for name in tensors if name.startswith("enc.0_block")})
    filters = [
        np.asarray(w).sum((0, 1, 2)) for name, w in tensors.items() if name.endswith("_down.conv0.resample_filter")
    ]
    out = tensors["out_conv.weight" if adm else "dec.0_aux_conv.weight"].shape[0]
    fields = dict(
        channels=channels,
        first_channels=0 if first == channels else first,
        multipliers=tuple(unets.ratio(w, channels) for w in widths),
        blocks=blocks,
        attention=tuple(level for level in range(depth) if f"enc.{level}_block0.qkv.weight" in tensors),
        out_multiplier=out // in_channels,
        wave_multiplier=waves // channels,
        filter=tuple((filters[0] / filters[0][0]).tolist()) if filters else (1, 1),
        fourier=16.0 if "map_noise.freqs" in tensors else 0.0,
        num_classes=tensors["map_label.weight"].shape[1] if "map_label.weight" in tensors else 0,
        augment_dim=tensors["map_augment.weight"].shape[1] if "map_augment.weight" in tensors else 0,
        pyramid_in="residual"
        if any("aux_residual" in n for n in tensors)
        else "skip"
        if any("aux_skip" in n for n in tensors)
        else "",
        pyramid_out="skip" if "dec.1_aux_conv.weight" in tensors else "",
    )
    return UNet(**(ADM | dict(min_group_width=4) if adm else SONG) | fields | overrides)


def table(net: UNet) -> list[Entry]:
    """ADM adds classes to the embedding, without bias; Song's networks to the waves, with one."""
    adm = net.class_at == "embedding"
    lines = conv(("in",), "enc.0_conv")
    lines += unets.hidden("map_layer0", swapped=not adm)
    lines += dense(("noise", "out"), "map_layer1")
    if net.fourier:
        lines += [Entry(("params", "noise", "fourier", "frequencies"), "map_noise.freqs", AS_IS)]
    if net.num_classes:
        path = ("params", "class", "table", "embedding")
        rows = [
            Entry(path, "map_label.weight", ADM_CLASSES),
            Entry(path, ("map_label.weight", "map_label.bias"), SONG_CLASSES),
        ]
        lines.append(rows[0 if adm else 1])
    if net.augment_dim:
        swapped = DENSE if adm else Layout(lambda w: unets.swap(w.T, 1), lambda k: unets.swap(k, 1).T)
        lines.append(Entry(("params", "augment", "kernel"), "map_augment.weight", swapped))
    for part in net.encoder():
        level = part.level
        lines += _stage(
            net, part, f"enc.{level + 1}_down" if part.resample else f"enc.{level}_block{unets.index(part)}"
        )
        if part.resample and net.pyramid_in:
            lines += conv((f"pyramid_in_{level}",), f"enc.{level + 1}_aux_{net.pyramid_in}")
    for part in net.middle():
        lines += _stage(net, part, f"dec.{part.level}_in{unets.index(part)}")
    for part in net.decoder():
        level = part.level
        lines += _stage(net, part, f"dec.{level - 1}_up" if part.resample else f"dec.{level}_block{unets.index(part)}")
    for level in range(net.depth if net.pyramid_out else 1):
        name = f"pyramid_out_{level}" if level else "out"
        lines += norm((f"norm_{name}",), "out_norm" if adm else f"dec.{level}_aux_norm")
        lines += conv((name,), "out_conv" if adm else f"dec.{level}_aux_conv")
    return lines


def example(net: UNet, tensors: dict):
    """(x, label, cond) of the smallest size."""
    return unets.example(net, tensors, "enc.0_conv.weight")


def config(net: UNet, variables: dict) -> dict:
    """Raises ValueError: EDM's names hold the image size, which our network does not know."""
    raise ValueError("weights are not exported to EDM's names, which hold the image size; save as 'diffusers'")


def _stage(net: UNet, part, name: str) -> list[Entry]:
    lines = unets.block(net, part, name, ROLES)
    if part.attention:
        heads = unets.heads(net, part)
        qkv = (fused(heads, "hd3", 2), fused(heads, "hd3")), (f"{name}.qkv.weight", f"{name}.qkv.bias")
        lines += unets.attention(part, *qkv, WIDTH_ONE, AS_IS, f"{name}.proj", f"{name}.norm2")
    return lines


def _song_classes(weight, bias):
    """A row a class, one-hot times sqrt(classes) in theirs, and the bias alone for none."""
    rows = np.concatenate([weight.T * np.sqrt(weight.shape[1]), np.zeros_like(bias)[None]]) + bias
    return unets.swap(rows, 1)


def _song_classes_back(rows):
    rows = unets.swap(rows, 1)
    return ((rows[:-1] - rows[-1]) / np.sqrt(len(rows) - 1)).T, rows[-1]


SONG_CLASSES = Layout(_song_classes, _song_classes_back)
ADM_CLASSES = Layout(lambda w: np.concatenate([w.T, np.zeros_like(w[:, :1]).T]), lambda rows: (rows[:-1] - rows[-1]).T)
