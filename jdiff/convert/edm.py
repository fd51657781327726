"""EDM's networks (Karras et al. 2022, arXiv:2206.00364): SongUNet, which is DDPM++ or NCSN++, and DhariwalUNet, or ADM.

The pickles that NVIDIA publishes hold code, and are not read. Export the weights once, in a checkout of EDM:

    python -c "import pickle, sys, torch; torch.save(pickle.load(open(sys.argv[1], 'rb'))['ema'].state_dict(), sys.argv[2])" IN.pkl OUT.pt

The noise label is that of the preconditioning that the network was trained with:

    EDMPrecond, all but the baselines   log(sigma) / 4, `conditioning.EDM()`, target EDM
    VPPrecond                           999 t of `jdiff.VP()`, `conditioning.Continuous()`, target Eps
    iDDPMPrecond                        the index of a table of 1000, `conditioning.Index(1000)`, target Eps, and
                                        learned variance
    VEPrecond                           log(sigma / 2), and the output is -eps; `jdiff` has no such conditioning

Published names hold the size of the images, which our networks do not know. In the table the lowest level is 8x8, and
`select` renames the tensors so.
"""  # noqa: E501

import re
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff.convert import unets
from jdiff.convert.architecture import Architecture
from jdiff.convert.table import AS_IS, DENSE, WIDTH_ONE, Entry, Layout, Mismatch, conv, dense, fused, norm
from jdiff.models.unet import UNet
from jdiff.models.unet_presets import ADM, SONG

IGNORED = ("*.resample_filter", "sigma_*", "u")  # u: the levels of the baseline ADM
LEVEL = re.compile(r"(model\.enc|model\.dec)\.(\d+)x\d+_")
ROLES = dict(norm_0="norm0", conv_0="conv0", embed="affine", norm_1="norm1", conv_1="conv1", skip="skip")


def select(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state_dict, under the names that a network of images with 8x8 positions at its lowest level has.

    It may be that of the preconditioned network, or of the network alone.
    """
    del settings
    inside = any(name.startswith("model.") for name in content)
    tensors = content if inside else {f"model.{name}": tensor for name, tensor in content.items()}
    sizes = {size: 8 << i for i, size in enumerate(sorted(_sizes(tensors)))}
    return {
        LEVEL.sub(lambda m: f"{m[1]}.{sizes[int(m[2])]}x{sizes[int(m[2])]}_", name): tensors[name] for name in tensors
    }


def build(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], **overrides) -> UNet:
    """The network whose tensors these are; only the rate of dropout is not told by names and shapes.

    Raises:
        Mismatch: where tensors that tell the shapes are missing.
    """
    del config
    sizes = [f"model.enc.{size}x{size}" for size in sorted(_sizes(tensors), reverse=True)] or ["model.enc.RESxRES"]
    adm = any(name.startswith("model.out_") for name in tensors)
    last = "model.out_conv.weight" if adm else f"{sizes[0].replace('enc', 'dec')}_aux_conv.weight"
    needed = ["model.map_layer0.weight", f"{sizes[0]}_conv.weight", last]
    needed += [f"{size}_block0.conv0.weight" for size in sizes]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise Mismatch(f"not a network of EDM: {len(missing)} missing: {', '.join(missing)}")
    first, in_channels = tensors[needed[1]].shape[:2]
    width, waves = tensors[needed[0]].shape
    channels = width // 4
    classes, augment = tensors.get("model.map_label.weight"), tensors.get("model.map_augment.weight")
    filters = [np.sum(w, (0, 1, 2)) for name, w in tensors.items() if name.endswith("_down.conv0.resample_filter")]
    fields = dict(
        channels=channels,
        first_channels=0 if first == channels else first,
        multipliers=tuple(unets.ratio(len(tensors[name]), channels) for name in needed[3:]),
        blocks=len({name.split(".")[2] for name in tensors if name.startswith(f"{sizes[0]}_block")}),
        attention=tuple(i for i, size in enumerate(sizes) if f"{size}_block0.qkv.weight" in tensors),
        out_multiplier=len(tensors[last]) // in_channels,
        wave_multiplier=waves // channels,
        filter=tuple((filters[0] / filters[0][0]).tolist()) if filters else (1, 1),
        fourier=16.0 if "model.map_noise.freqs" in tensors else 0.0,
        num_classes=0 if classes is None else classes.shape[1],
        augment_dim=0 if augment is None else augment.shape[1],
        pyramid_in=next((kind for kind in ("residual", "skip") if any(f"_aux_{kind}." in n for n in tensors)), ""),
        pyramid_out="skip" if sum(name.endswith("_aux_conv.weight") for name in tensors) > 1 else "",
    )
    return UNet(**(ADM | dict(min_group_width=4) if adm else SONG) | fields | overrides)


def table(net: UNet) -> list[Entry]:
    """The pairs of names. In ADM the layer of classes has no bias; in Song's networks it has one."""
    adm = net.class_at == "embedding"
    sizes = [f"{8 << i}x{8 << i}" for i in reversed(range(net.depth))]
    lines = conv(("in",), f"model.enc.{sizes[0]}_conv")
    lines += unets.hidden("model.map_layer0", swapped=not adm)
    lines += dense(("noise", "out"), "model.map_layer1")
    if net.fourier:
        lines += [Entry(("params", "noise", "fourier", "frequencies"), "model.map_noise.freqs", AS_IS)]
    if net.num_classes:
        path = ("params", "class", "table", "embedding")
        rows = [
            Entry(path, "model.map_label.weight", ADM_CLASSES),
            Entry(path, ("model.map_label.weight", "model.map_label.bias"), SONG_CLASSES),
        ]
        lines.append(rows[0 if adm else 1])
    if net.augment_dim:
        swapped = DENSE if adm else Layout(lambda w: unets.swap(w.T, 1), lambda k: unets.swap(k, 1).T)
        lines.append(Entry(("params", "augment", "kernel"), "model.map_augment.weight", swapped))
    for part in net.encoder():
        prefix = f"model.enc.{sizes[part.level + bool(part.resample)]}"
        lines += _stage(net, part, f"{prefix}_down" if part.resample else f"{prefix}_block{unets.index(part)}")
        if part.resample and net.pyramid_in:
            lines += conv((f"pyramid_in_{part.level}",), f"{prefix}_aux_{net.pyramid_in}")
    for part in net.middle():
        lines += _stage(net, part, f"model.dec.{sizes[-1]}_in{unets.index(part)}")
    for part in net.decoder():
        prefix = f"model.dec.{sizes[part.level - bool(part.resample)]}"
        lines += _stage(net, part, f"{prefix}_up" if part.resample else f"{prefix}_block{unets.index(part)}")
    for level in range(net.depth if net.pyramid_out else 1):
        name = f"pyramid_out_{level}" if level else "out"
        prefix = "model.out" if adm else f"model.dec.{sizes[level]}_aux"
        lines += norm((f"norm_{name}",), f"{prefix}_norm") + conv((name,), f"{prefix}_conv")
    return lines


def example(net: UNet, tensors: dict):
    """The smallest (x, label, cond) that the network takes."""
    return unets.example(net, tensors, f"model.enc.{4 << net.depth}x{4 << net.depth}_conv.weight")


def config(net: UNet, variables: dict) -> dict:
    """Raise ValueError: weights are not written in this form."""
    raise ValueError("weights are not exported to EDM's names, which hold the image size; save as 'diffusers'")


def _sizes(tensors: Mapping[str, np.ndarray]) -> set[int]:
    """The sizes of the image at the levels of the network."""
    return {int(match[2]) for name in tensors if (match := LEVEL.match(name))}


def _stage(net: UNet, part, name: str) -> list[Entry]:
    lines = unets.block(net, part, name, ROLES)
    if part.attention:
        heads = unets.heads(net, part)
        qkv = (fused(heads, "hd3", 2), fused(heads, "hd3")), (f"{name}.qkv.weight", f"{name}.qkv.bias")
        lines += unets.attention(part, *qkv, WIDTH_ONE, AS_IS, f"{name}.proj", f"{name}.norm2")
    return lines


def _song_classes(weight, bias):
    """A row for each class, and the bias alone for "no class"; published one-hot vectors are times sqrt(classes)."""
    rows = np.concatenate([weight.T * np.sqrt(weight.shape[1]), np.zeros_like(bias)[None]]) + bias
    return unets.swap(rows, 1)


def _song_classes_back(rows):
    rows = unets.swap(rows, 1)
    return ((rows[:-1] - rows[-1]) / np.sqrt(len(rows) - 1)).T, rows[-1]


SONG_CLASSES = Layout(_song_classes, _song_classes_back)
ADM_CLASSES = Layout(lambda w: np.concatenate([w.T, np.zeros_like(w[:, :1]).T]), lambda rows: (rows[:-1] - rows[-1]).T)


ARCHITECTURE = Architecture(select, build, table, example, config, ignored=IGNORED)
