"""score_sde_pytorch's checkpoints of DDPM, DDPM++ and NCSN++ (Song et al. 2021, arXiv:2011.13456), averaged weights.

Variance-preserving networks, of the vp and subvp configs, give eps. They take 999 t (`conditioning.Continuous`), or the
index where they were trained with 1000 steps. Variance-exploding networks, of the ve configs, give the score and come
as `InSigma`. Those with Fourier features take sigma (`conditioning.Sigma`). The others take an index into their table
of sigmas, round(999 (1 - t)), whose first sigma is the largest.

The tensors do not tell everything. `load` takes these settings, under the names of the published configs, as overrides
or in the config.json that `save` writes:

    scale_by_sigma    True for ve; it must be given for DDPM, and for NCSN++ without Fourier features
    centered          whether the data lie in [-1, 1]; by default False, for [0, 1], where scale_by_sigma is True
    filter            by default (1, 3, 3, 1) for NCSN++ and (1, 1) for DDPM++
"""

from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff.convert import unets
from jdiff.convert.architecture import Architecture
from jdiff.convert.table import AS_IS, Entry, Layout, Mismatch, conv, dense, norm
from jdiff.models.unet import InSigma, UNet
from jdiff.models.unet_presets import DDPM, SONG

WHOSE = "score_sde_pytorch"
IGNORED = ("module.sigmas",)
SETTINGS = ("scale_by_sigma", "centered")
FROM_CONFIG = ("filter", "skip_scale", "dropout")  # fields of the UNet that the tensors do not tell
ROLES = dict(norm_0="GroupNorm_0", conv_0="Conv_0", embed="Dense_0", norm_1="GroupNorm_1", conv_1="Conv_1")
NIN = Layout(lambda w: w[None, None], lambda k: k[0, 0])  # their matrices are (in, out) already
SIDE_BY_SIDE = Layout(lambda *w: np.concatenate(w, -1), lambda k: np.split(k, 3, -1))


def select(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state_dict; where the file has moving averages, they replace the parameters that they average."""
    del settings
    tensors = {_published(name): w for name, w in content.get("model", content).items()}
    averages = content["ema"].get("shadow_params") if isinstance(content.get("ema"), Mapping) else None
    if averages is not None:
        names = [name for name in tensors if name not in ("module.sigmas", "module.all_modules.0.W")]
        if len(names) != len(averages):
            raise Mismatch(
                f"{len(averages)} averages for {len(names)} parameters: not a checkpoint of score_sde_pytorch"
            )
        tensors |= dict(zip(names, averages, strict=True))
    return tensors


def build(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], **overrides) -> UNet | InSigma:
    """The network whose tensors these are, from the sequence of its layers and the settings.

    Raises:
        Mismatch: for layers of another network, and where a setting must be given.
    """
    layers = _layers(tensors)
    fourier = bool(layers) and "W" in layers[0]
    try:
        fields = _fields(layers[1:] if fourier else layers)
    except LookupError as error:
        raise Mismatch("not a network of score_sde_pytorch: its all_modules are others or incomplete") from error
    plus = fields["resample"] == "block"
    if not plus and (fourier or fields["pyramid_in"] or fields["pyramid_out"]):
        raise Mismatch("NCSN++ with resblock_type='ddpm' is not among our networks")
    fields["filter"] = (1, 3, 3, 1) if fourier or fields["pyramid_in"] else (1, 1)
    if fourier:
        fields |= dict(fourier=16.0, wave_multiplier=2)
    settings = {name: config[name] for name in (*FROM_CONFIG, *SETTINGS) if name in config} | overrides
    known = fourier or (False if plus and not fields["pyramid_in"] else None)  # as all published configs have it
    scaled = settings.pop("scale_by_sigma", known)
    if scaled is None:
        raise Mismatch(
            "the tensors do not tell whether the network divides by sigma: give scale_by_sigma=True for those of the "
            "ve configs, False for vp and subvp"
        )
    centered = settings.pop("centered", not scaled)
    if not scaled and (fourier or not centered):
        raise Mismatch(f"not among our networks: scale_by_sigma={scaled}, centered={centered}, fourier={fourier}")
    fields |= settings
    if len(fields["filter"]) > 64:
        raise Mismatch(f"a filter of {len(fields['filter']):,} numbers; those of score_sde_pytorch have 2 or 4")
    net = UNet(**(SONG if plus else DDPM) | fields | dict(filter=tuple(fields["filter"])))
    if not scaled:
        return net
    if not fourier and "module.sigmas" not in tensors:
        raise Mismatch("1 missing: module.sigmas, the table that the network divides by")
    return InSigma(net, centered, 0 if fourier else len(tensors["module.sigmas"]))


def table(module: UNet | InSigma) -> list[Entry]:
    """The pairs of names; the published layers are numbered in the order of their use.

    Raises:
        ValueError: where score_sde_pytorch has no such network.
    """
    net = _unet(module)
    _check(module, net)
    lines = _table(net)
    if module is net:
        return lines
    lines = [line._replace(path=("params", "net", *line.path[1:])) for line in lines]
    return lines + [Entry(("params", "sigmas"), "module.sigmas", AS_IS)] * bool(module.levels)


def example(module: UNet | InSigma, tensors: Mapping[str, np.ndarray]):
    """The smallest (x, label, cond) that the network takes."""
    net = _unet(module)
    x, label, cond = unets.example(net, tensors, f"module.all_modules.{3 if net.fourier else 2}.weight")
    return x, label + 1, cond


def config(module: UNet | InSigma, variables: Mapping[str, Any]) -> dict:
    """The settings that the tensors do not tell.

    Raises:
        ValueError: for networks of signals that are not images.
    """
    net, centered = _unet(module), module.centered if isinstance(module, InSigma) else True
    unets.image_channels(variables if net is module else {"params": variables["params"]["net"]}, WHOSE)
    settings = {name: getattr(net, name) for name in FROM_CONFIG}
    return settings | dict(filter=list(net.filter), scale_by_sigma=net is not module, centered=centered)


def _unet(module: UNet | InSigma) -> UNet:
    """The UNet of a network, alone or in an `InSigma`. Raises ValueError where that holds another network."""
    net = module.net if isinstance(module, InSigma) else module
    if not isinstance(net, UNet):
        raise ValueError(f"{WHOSE} has no such network: a {type(net).__name__} in InSigma")
    return net


def _check(module: UNet | InSigma, net: UNet) -> None:
    plain = dict(pyramid_in="", pyramid_out="", fourier=0.0, skip_scale=1.0, decoder_attention="last")
    kind = dict(min_group_width=4) | SONG if net.resample == "block" else DDPM | plain
    kind |= dict(num_classes=0, augment_dim=0, out_multiplier=1, first_channels=0, head_channels=0, groups=32)
    kind |= dict(wave_multiplier=2 if net.fourier else 1)
    free = ("kernel_init", "out_scale", "qkv_scale", "class_at")  # initial values, and where classes would be
    valid = {field: (value,) for field, value in kind.items() if field not in free}
    unets.check_fields(net, WHOSE, valid | dict(skip_scale=(1.0, kind["skip_scale"])))  # 1: their skip_rescale=False
    levels = module.levels if net is not module else None
    if bool(net.fourier) != (levels == 0):
        raise ValueError(f"{WHOSE} has no such network: fourier={net.fourier!r} in InSigma of levels={levels!r}")


def _table(net: UNet) -> list[Entry]:
    lines, n = [], -1

    def name() -> str:
        nonlocal n
        n += 1
        return f"module.all_modules.{n}"

    def stage(part) -> list[Entry]:
        if part.resample and net.resample == "conv":
            return conv((part.name,), f"{name()}.Conv_0")
        prefix = name()
        roles = ROLES | ({"skip": "Conv_2"} if net.resample == "block" else {})
        found = unets.block(net, part, prefix, roles)
        if "skip" not in roles and unets.has_skip(net, part):
            skip = ("params", part.name, "skip")
            found += [Entry((*skip, "kernel"), f"{prefix}.NIN_0.W", NIN)]
            found += [Entry((*skip, "bias"), f"{prefix}.NIN_0.b", AS_IS)]
        if part.attention:
            prefix, path = name(), ("params", f"{part.name}_attention")
            found += norm((path[1], "norm"), f"{prefix}.GroupNorm_0")
            for ours, theirs in (("kernel", "W"), ("bias", "b")):
                names = tuple(f"{prefix}.NIN_{i}.{theirs}" for i in range(3))
                found.append(Entry((*path, "qkv", ours), names, SIDE_BY_SIDE))
                found.append(Entry((*path, "out", ours), f"{prefix}.NIN_3.{theirs}", AS_IS))
        return found

    if net.fourier:
        lines.append(Entry(("params", "noise", "fourier", "frequencies"), f"{name()}.W", AS_IS))
    lines += unets.hidden(name(), swapped=True) + dense(("noise", "out"), name()) + conv(("in",), name())
    for part in net.encoder():
        lines += stage(part)
        if part.resample and net.pyramid_in:
            layer = "Conv_0" if net.pyramid_in == "skip" else "Conv2d_0"
            lines += conv((f"pyramid_in_{part.level}",), f"{name()}.{layer}")
    for part in net.middle():
        lines += stage(part)
    for part in net.decoder():
        if part.resample and net.pyramid_out:
            ours = f"pyramid_out_{part.level}"
            lines += norm((f"norm_{ours}",), name()) + conv((ours,), name())
        lines += stage(part)
    return lines + norm(("norm_out",), name()) + conv(("out",), name())


def _published(name: str) -> str:
    """As in the checkpoints, which hold the network in DataParallel."""
    name = name.removeprefix("module.")
    return f"module.all_modules.{name}" if name[:1].isdigit() else f"module.{name}"


def _layers(tensors: Mapping[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The tensors of each numbered layer by their names within it."""
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        number, _, rest = name.removeprefix("module.all_modules.").partition(".")
        if number.isdigit():
            layers.setdefault(int(number), {})[rest] = tensor
    return [layers[i] for i in sorted(layers)]


def _fields(layers: list[dict[str, np.ndarray]]) -> dict[str, Any]:
    """The shape of the network from its layers, after the Fourier features."""
    if len(layers) < 6 or "weight" not in layers[0] or layers[0]["weight"].ndim != 2:
        raise Mismatch("not a network of score_sde_pytorch: its all_modules do not begin with two linear layers")
    channels = len(layers[0]["weight"]) // 4
    width, pyramid = len(layers[2]["weight"]), ""
    levels: list[list[list[Any]]] = [[]]  # of each level: [width, attention] of its blocks
    for layer in layers[3:]:
        if "GroupNorm_0.weight" in layer and "Dense_0.weight" in layer:
            if len(layer["GroupNorm_0.weight"]) != width:
                break  # the first block on the way up takes a kept output too
            last, width = width, len(layer["Conv_0.weight"])
            if "Conv_2.weight" in layer and last == width:  # a projection although the width stays: it resamples
                levels.append([])
            else:
                levels[-1].append([width, False])
        elif "NIN_3.W" in layer:
            levels[-1][-1][1] = True
        elif "Conv2d_0.weight" in layer:
            pyramid = "residual"
        elif layer["Conv_0.weight"].shape[-1] == 1:
            pyramid = "skip"
        else:
            levels.append([])  # a strided convolution
    del levels[-1][-2:]  # the two blocks in the middle, and the attention between them
    if not levels[-1] or len({len(blocks) for blocks in levels}) > 1:
        raise Mismatch("not a UNet of score_sde_pytorch: its levels differ in their number of blocks")
    norms = sum(1 for layer in layers if "weight" in layer and layer["weight"].ndim == 1)  # before each output
    return dict(
        channels=channels,
        multipliers=tuple(unets.ratio(blocks[0][0], channels) for blocks in levels),
        blocks=len(levels[0]),
        attention=tuple(i for i, blocks in enumerate(levels) if blocks[0][1]),
        decoder_attention="last",
        pyramid_in=pyramid,
        pyramid_out="skip" if norms > 1 else "",
        resample="block" if any("Conv_2.weight" in layer for layer in layers) else "conv",
    )


ARCHITECTURE = Architecture(select, build, table, example, config, ignored=IGNORED, settings=SETTINGS)
