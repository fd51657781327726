"""EDM2: state_dicts of the published networks, `Precond` or the UNet in it (arXiv:2312.02696).

The published files are pickles of code, and are not read. Export the weights once, in a checkout of NVlabs/edm2:

    torch.save(pickle.load(open("edm2-img512-xs-2147483-0.135.pkl", "rb"))["ema"].state_dict(), "edm2-img512-xs.pt")

The licence of weights and code is CC BY-NC-SA 4.0. The network is called with x / sqrt(sigma² + 1/4) and the noise
label log(sigma) / 4: `conditioning.EDM` with sigma_data = 0.5.
"""

import math
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff.convert.architecture import Architecture
from jdiff.convert.table import AS_IS, WIDTH_ONE, Entry, Mismatch, conv, dense, fused
from jdiff.models.edm2 import EDM2UNet

FROM_CONFIG = {  # fields that the tensors do not tell, by the arguments of the published class
    "head_channels": "channels_per_head", "dropout": "dropout", "label_balance": "label_balance",
    "concat_balance": "concat_balance", "residual_balance": "res_balance", "attention_balance": "attn_balance",
}  # fmt: skip


def select(content: Mapping[str, Any], settings: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """The state_dict, which the file may hold as "ema" or "net", under the names of a UNet in `Precond`."""
    del settings
    for key in ("ema", "net"):
        if isinstance(content.get(key), Mapping):
            content = content[key]
    inside = any(name.startswith("unet.") for name in content)
    return {name if inside else f"unet.{name}": tensor for name, tensor in content.items()}


def build(tensors: Mapping[str, np.ndarray], config: Mapping[str, Any], **overrides) -> EDM2UNet:
    """The network whose tensors these are.

    Names and shapes tell all but `head_channels`, dropout and the balances: of these an override holds, else what the
    config says, else what the paper says.

    Raises:
        Mismatch: where tensors that tell the shapes are missing.
    """
    encoder = [name.removeprefix("unet.enc.") for name in tensors if name.startswith("unet.enc.")]
    sizes = sorted({int(name.split("x")[0]) for name in encoder if "_block0." in name}, reverse=True)
    needed = ["unet.emb_noise.weight"] + [f"unet.enc.{r}x{r}_block0.conv_res0.weight" for r in sizes]
    needed += [f"unet.enc.{sizes[0]}x{sizes[0]}_conv.weight"] if sizes else ["unet.enc.64x64_conv.weight"]
    missing = [name for name in needed if name not in tensors]
    if missing:
        raise Mismatch(f"these are not an EDM2 network's tensors: {', '.join(missing)} missing")
    widths = [len(tensors[name]) for name in needed[1:-1]]
    features, noise = tensors[needed[0]].shape
    classes, logvar = tensors.get("unet.emb_label.weight"), tensors.get("logvar_linear.weight")
    fields = dict(
        channels=math.gcd(*widths),
        multipliers=tuple(width // math.gcd(*widths) for width in widths),
        blocks=len({name.split(".")[0] for name in encoder if name.startswith(f"{sizes[0]}x{sizes[0]}_block")}),
        attention=tuple(i for i, r in enumerate(sizes) if f"{r}x{r}_block0.attn_qkv.weight" in encoder),
        num_classes=0 if classes is None else classes.shape[1],
        noise_channels=None if noise == widths[0] else noise,
        embed_channels=None if features == max(widths) else features,
        logvar_channels=0 if logvar is None else logvar.shape[1],
        in_channels=tensors[needed[-1]].shape[1] - 1,
        resolution=sizes[0],
    )
    settings = {field: config[name] for field, name in FROM_CONFIG.items() if name in config}
    return EDM2UNet(**fields | settings | overrides)


def table(module: EDM2UNet) -> list[Entry]:
    """The pairs of names. The published queries, keys and values lie together head by head; ours lie apart."""
    lines = _fourier("fourier", "unet.emb_fourier") + dense(("noise",), "unet.emb_noise", bias=False)
    if module.num_classes:
        lines += dense(("class",), "unet.emb_label", bias=False)
    widths = [module.channels * m for m in module.multipliers]
    sizes = [f"{module.resolution >> level}x{module.resolution >> level}" for level in range(len(widths))]
    lines += conv(("in",), f"unet.enc.{sizes[0]}_conv", bias=False)
    skips, width = [widths[0]], widths[0]
    for level, size in enumerate(sizes):
        if level:
            lines += _block(module, f"down_{level}", f"unet.enc.{size}_down", width, width)
            skips.append(width)
        for i in range(module.blocks):
            attends, names = level in module.attention, (f"encoder_{level}_{i}", f"unet.enc.{size}_block{i}")
            lines += _block(module, *names, width, widths[level], attends)
            width = widths[level]
            skips.append(width)
    for i in (0, 1):
        lines += _block(module, f"middle_{i}", f"unet.dec.{sizes[-1]}_in{i}", width, width, i == 0)
    for level, size in reversed(list(enumerate(sizes))):
        if level < len(sizes) - 1:
            lines += _block(module, f"up_{level}", f"unet.dec.{size}_up", width, width)
        for i in range(module.blocks + 1):
            attends, names = level in module.attention, (f"decoder_{level}_{i}", f"unet.dec.{size}_block{i}")
            lines += _block(module, *names, width + skips.pop(), widths[level], attends)
            width = widths[level]
    lines += conv(("out",), "unet.out_conv", bias=False) + [Entry(("params", "gain"), "unet.out_gain", AS_IS)]
    if module.logvar_channels:
        lines += _fourier("logvar_fourier", "logvar_fourier") + dense(("logvar",), "logvar_linear", bias=False)
    return lines


def example(module: EDM2UNet, tensors: dict):
    """The smallest (x, label, cond) that the network takes."""
    del tensors
    size = 2 ** (len(module.multipliers) - 1)
    cond = jnp.zeros(1, int) if module.num_classes else None
    return jnp.zeros((1, size, size, module.in_channels or 3)), jnp.zeros(1), cond


def config(module: EDM2UNet, variables: dict) -> dict:
    """The arguments of the published class.

    Raises:
        ValueError: where the channels of the images are not known.
    """
    del variables
    if module.in_channels is None:
        raise ValueError("EDM2's files know the channels of the images; set in_channels")
    return dict(
        img_resolution=module.resolution,
        img_channels=module.in_channels,
        label_dim=module.num_classes,
        model_channels=module.channels,
        channel_mult=list(module.multipliers),
        num_blocks=module.blocks,
        attn_resolutions=[module.resolution >> level for level in module.attention],
        logvar_channels=module.logvar_channels,
        **{name: getattr(module, field) for field, name in FROM_CONFIG.items()},
    )


def _block(module, ours, theirs, before, after, attends=False):
    lines = [Entry(("params", ours, "gain"), f"{theirs}.emb_gain", AS_IS)]
    for name, other in (("conv_0", "conv_res0"), ("conv_1", "conv_res1")):
        lines += conv((ours, name), f"{theirs}.{other}", bias=False)
    lines += dense((ours, "embed"), f"{theirs}.emb_linear", bias=False)
    if before != after:
        lines += [Entry(("params", ours, "skip", "kernel"), f"{theirs}.conv_skip.weight", WIDTH_ONE)]
    if attends:
        layout = fused(after // module.head_channels, "hd3", 2)
        lines += [Entry(("params", ours, "qkv", "kernel"), f"{theirs}.attn_qkv.weight", layout)]
        lines += [Entry(("params", ours, "attend", "kernel"), f"{theirs}.attn_proj.weight", WIDTH_ONE)]
    return lines


def _fourier(ours, theirs):
    return [
        Entry(("params", ours, "frequencies"), f"{theirs}.freqs", AS_IS),
        Entry(("params", ours, "phases"), f"{theirs}.phases", AS_IS),
    ]


ARCHITECTURE = Architecture(select, build, table, example, config)
