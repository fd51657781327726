"""What the converters of published UNets share: entries for the blocks of `models.unet`, and checks."""

import math
from collections.abc import Mapping
from typing import Any

import numpy as np

from jdiff.convert.table import AS_IS, Entry, Layout, conv, dense, norm
from jdiff.models.unet import Part, UNet


def block(net: UNet, part: Part, name: str, roles: Mapping[str, str]) -> list[Entry]:
    """The entries of a residual block.

    Args:
        net: the network.
        part: the stage of it.
        name: the published name of the block.
        roles: the published names of its layers, by "norm_0", "conv_0", "embed", "norm_1", "conv_1", and "skip" where
            that is a convolution.
    """
    names = {role: f"{name}.{theirs}" for role, theirs in roles.items()}
    lines = norm((part.name, "norm_0"), names["norm_0"]) + conv((part.name, "conv_0"), names["conv_0"])
    if net.adaptive:
        lines += dense((part.name, "norm_1", "modulation"), names["embed"])
        lines += norm((part.name, "norm_1", "norm"), names["norm_1"])
    else:
        lines += dense((part.name, "shift"), names["embed"]) + norm((part.name, "norm_1"), names["norm_1"])
    lines += conv((part.name, "conv_1"), names["conv_1"])
    if "skip" in roles and has_skip(net, part):
        lines += conv((part.name, "skip"), names["skip"])
    return lines


def attention(part: Part, qkv, qkv_names, out: Layout, bias: Layout, out_name: str, norm_name: str) -> list[Entry]:
    """The entries of self-attention.

    Args:
        part: the stage that it belongs to.
        qkv: the layouts of the kernel and of the bias of queries, keys and values.
        qkv_names: the published names of that kernel and bias.
        out: the layout of the last layer's kernel.
        bias: that of its bias.
        out_name: the published name of the last layer.
        norm_name: that of the norm.
    """
    path = ("params", f"{part.name}_attention")
    return [
        *norm(path[1:] + ("norm",), norm_name),
        Entry((*path, "qkv", "kernel"), qkv_names[0], qkv[0]),
        Entry((*path, "qkv", "bias"), qkv_names[1], qkv[1]),
        Entry((*path, "out", "kernel"), f"{out_name}.weight", out),
        Entry((*path, "out", "bias"), f"{out_name}.bias", bias),
    ]


def heads(net: UNet, part: Part) -> int:
    """The attention heads of a stage."""
    return part.features // net.head_channels if net.head_channels else net.heads


def has_skip(net: UNet, part: Part) -> bool:
    """Whether a block has a convolution on its straight branch."""
    return bool(part.resample and net.project) or part.features != inputs(net)[part.name]


def inputs(net: UNet) -> dict[str, int]:
    """The channels that go into each stage, by its name."""
    found, h = {}, net.first_channels or net.channels
    kept = [h]
    for part in net.encoder():
        found[part.name], h = h, part.features
        kept.append(h)
    for part in net.middle():
        found[part.name], h = h, part.features
    for part in net.decoder():
        found[part.name] = h if part.resample else h + kept.pop()
        h = part.features
    return found


def index(part: Part) -> int:
    """The number of a stage within its level."""
    return int(part.name.rsplit("_", 1)[1])


def ratio(width: int, channels: int) -> float:
    """The multiplier of a width, such that int(channels * multiplier) is the width; whole where it can be.

    >>> ratio(96, 32), ratio(48, 32)
    (3, 1.5)
    """
    if width % channels == 0:
        return width // channels
    times = width / channels
    return times if int(channels * times) == width else math.nextafter(times, math.inf)


def check_fields(net: UNet, whose: str, valid: Mapping[str, tuple]) -> None:
    """Raise ValueError where fields are not among the values that an architecture has, `valid` by field."""
    other = [f"{field}={getattr(net, field)!r}" for field, values in valid.items() if getattr(net, field) not in values]
    if other:
        raise ValueError(f"{whose} has no such network: {', '.join(other)}")


def check_groups(net: UNet, whose: str) -> None:
    """Raise ValueError where a norm has other than `net.groups` groups: published networks have them everywhere."""
    widths = {*inputs(net).values(), *(part.features for part in net.encoder()), net.first_channels or net.channels}
    odd = sorted(w for w in widths if w % net.groups or w // net.groups < net.min_group_width)
    if odd:
        raise ValueError(f"{whose} has {net.groups} groups everywhere; channels of {odd} do not divide so")


def image_channels(variables: Mapping[str, Any], whose: str) -> int:
    """The channels that go into a network.

    Raises:
        ValueError: where its signals are not images.
    """
    kernel = variables["params"]["in"]["kernel"]
    if kernel.ndim != 4:
        raise ValueError(f"{whose} takes images, and this network signals of {kernel.ndim - 2} dimensions")
    return kernel.shape[-2]


def swap(array: np.ndarray, axis: int) -> np.ndarray:
    """Exchange the halves of an axis: cosines first for sines first, and back."""
    return np.roll(array, array.shape[axis] // 2, axis)


def hidden(name: str, swapped: bool) -> list[Entry]:
    """The entries of the layer that reads the sinusoids; `swapped` where their sines come before their cosines."""
    kernel = Layout(lambda w: swap(w.T, 0), lambda k: swap(k, 0).T) if swapped else Layout(np.transpose, np.transpose)
    path = ("params", "noise", "hidden")
    return [Entry((*path, "kernel"), f"{name}.weight", kernel), Entry((*path, "bias"), f"{name}.bias", AS_IS)]


def example(net: UNet, tensors: Mapping[str, np.ndarray], first: str):
    """The smallest (x, label, cond) that the network takes, with the channels of the layer called `first`."""
    cond = np.zeros((1,), np.int32) if net.num_classes else None
    size = 2 ** (net.depth - 1)
    channels = tensors[first].shape[1] if first in tensors else 3
    return np.zeros((1, size, size, channels), np.float32), np.zeros((1,), np.float32), cond
