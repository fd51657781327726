"""score_sde_pytorch's checkpoints of DDPM, DDPM++ and NCSN++ (Song et al. 2021, arXiv:2011.13456), averaged weights.

The label is 999 t for the variance-preserving networks (`conditioning.Continuous`, target eps in units of -sigma score)
and sigma for the variance-exploding ones (`conditioning.Sigma`), whose output is the score: they come as `InSigma`.
What the tensors do not tell is taken as in the published configs, and can be overridden: `filter`, (1, 3, 3, 1) with
Fourier features and (1, 1) without, and `centered`, False with them.
"""

import numpy as np

from jdiff.convert import unets
from jdiff.convert.table import AS_IS, Entry, Layout, Mismatch, conv, dense, norm
from jdiff.models.unet import DDPM, SONG, InSigma, UNet

IGNORED = ("sigmas",)
ROLES = dict(norm_0="GroupNorm_0", conv_0="Conv_0", embed="Dense_0", norm_1="GroupNorm_1", conv_1="Conv_1")
NIN = Layout(lambda w: w[None, None], lambda k: k[0, 0])  # their matrices are (in, out) already
SIDE_BY_SIDE = Layout(lambda *w: np.concatenate(w, -1), lambda k: np.split(k, 3, -1))


def select(content: dict, settings: dict) -> dict[str, np.ndarray]:
    """The state_dict, with the moving averages in place of what they average where the file has them."""
    del settings
    model = content.get("model", content)
    tensors = {name.removeprefix("module.").removeprefix("all_modules."): w for name, w in model.items()}
    averages = content.get("ema", {}).get("shadow_params") if isinstance(content.get("ema"), dict) else None
    if averages is not None:
        names = [name for name, w in tensors.items() if name not in ("sigmas", "0.W")]
        if len(names) != len(averages):
            raise Mismatch(
                f"{len(averages)} averages for {len(names)} parameters: not a checkpoint of score_sde_pytorch"
            )
        tensors |= dict(zip(names, averages, strict=True))
    return tensors


def build(tensors: dict[str, np.ndarray], config: dict, **overrides) -> UNet | InSigma:
    """The network from the sequence of its layers."""
    del config
    layers = _layers(tensors)
    fourier = layers and "W" in layers[0]
    layers = layers[1:] if fourier else layers
    if len(layers) < 6 or "weight" not in layers[0] or layers[0]["weight"].ndim != 2:
        raise Mismatch("not a network of score_sde_pytorch: its all_modules do not begin with two linear layers")
    channels = len(layers[0]["weight"]) // 4
    width, levels, pyramid, blocky = len(layers[2]["weight"]), [[]], "", False
    for layer in layers[3:]:
        if "GroupNorm_0.weight" in layer and "Dense_0.weight" in layer:
            if len(layer["GroupNorm_0.weight"]) != width:
                break  # the first block on the way up takes a kept output too
            last, width = width, len(layer["Conv_0.weight"])
            if "Conv_2.weight" in layer and last == width:  # a projection although the width stays: it resamples
                levels.append([])
                blocky = True
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
    plus = blocky or fourier or norms > 1
    fields = dict(
        channels=channels,
        multipliers=tuple(unets.ratio(blocks[0][0], channels) for blocks in levels),
        blocks=len(levels[0]),
        attention=tuple(i for i, blocks in enumerate(levels) if blocks[0][1]),
        decoder_attention="last",
        pyramid_in=pyramid,
        pyramid_out="skip" if norms > 1 else "",
        resample="block" if blocky else "conv",
        project=blocky,
        fourier=16.0 if fourier else 0.0,
        wave_multiplier=2 if fourier else 1,
        filter=(1, 3, 3, 1) if fourier else (1, 1),
    )
    centered = overrides.pop("centered", False)
    net = UNet(**(SONG if plus else DDPM) | fields | overrides)
    return InSigma(net, centered) if fourier else net


def table(module: UNet | InSigma) -> list[Entry]:
    """Their layers are numbered in the order of use."""
    if isinstance(module, InSigma):
        return [line._replace(path=("params", "net", *line.path[1:])) for line in table(module.net)]
    net, lines, n = module, [], -1

    def name() -> str:
        nonlocal n
        n += 1
        return str(n)

    def stage(part) -> list[Entry]:
        if part.resample and net.resample == "conv":
            return conv((part.name,), f"{name()}.Conv_0")
        there = name()
        roles = ROLES | ({"skip": "Conv_2"} if net.resample == "block" else {})
        found = unets.block(net, part, there, roles)
        if "skip" not in roles and unets.has_skip(net, part):
            path = ("params", part.name, "skip")
            found += [Entry((*path, "kernel"), f"{there}.NIN_0.W", NIN)]
            found += [Entry((*path, "bias"), f"{there}.NIN_0.b", AS_IS)]
        if part.attention:
            there, path = name(), ("params", f"{part.name}_attention")
            found += norm((path[1], "norm"), f"{there}.GroupNorm_0")
            for ours, theirs in (("kernel", "W"), ("bias", "b")):
                names = tuple(f"{there}.NIN_{i}.{theirs}" for i in range(3))
                found.append(Entry((*path, "qkv", ours), names, SIDE_BY_SIDE))
                found.append(Entry((*path, "out", ours), f"{there}.NIN_3.{theirs}", AS_IS))
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


def example(module: UNet | InSigma, tensors: dict):
    """(x, label, cond) of the smallest size."""
    net = module.net if isinstance(module, InSigma) else module
    x, label, cond = unets.example(net, tensors, f"{3 if net.fourier else 2}.weight")
    return x, label + 1, cond


def config(module: UNet | InSigma, variables: dict) -> dict:
    """What `load` cannot find in the tensors."""
    del variables
    net = module.net if isinstance(module, InSigma) else module
    return {"filter": list(net.filter)}


def _layers(tensors: dict[str, np.ndarray]) -> list[dict[str, np.ndarray]]:
    """The tensors of each numbered layer by their names within it."""
    layers: dict[int, dict[str, np.ndarray]] = {}
    for name, tensor in tensors.items():
        number, _, rest = name.partition(".")
        if number.isdigit():
            layers.setdefault(int(number), {})[rest] = tensor
    return [layers[i] for i in sorted(layers)]
