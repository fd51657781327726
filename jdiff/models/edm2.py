"""The magnitude-preserving UNet of EDM2: every layer keeps the expected size of its activations and of its weights.

Layers have no biases and no norms with statistics. Weights are normalised where they are used (eq. 47), sums and
concatenations are rescaled, and gains that start at zero are the only free sizes. Training also normalises the stored
weights after each update, by `make_train_step(..., project=normalize_weights)`: the learning rate is then the relative
change of the weights (section 2.3).

Karras et al. 2024, "Analyzing and improving the training dynamics of diffusion models", arXiv:2312.02696, config G.
"""

import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jdiff.models.attention import check_levels
from jdiff.models.conv import conv
from jdiff.models.embed import as_float, check_index, check_label, check_unconditional, class_labels, nan_outside
from jdiff.models.registry import Tag, Training, register_model, register_tag
from jdiff.models.resample import downsample, upsample
from jdiff.models.transformer import attend

CLIP = 256.0  # larger activations are cut, for half precision


class EDM2UNet(nn.Module):
    """A UNet for signals (B, *sizes, C) whose sizes are multiples of 2^(levels - 1); its output starts at 0.

    Args:
        channels: the width that `multipliers` multiply.
        multipliers: the channels of each level over `channels`; the resolution halves from one level to the next.
        blocks: of each level on the way down; there is one more on the way up.
        attention: the levels with self-attention, 0 being full resolution.
        head_channels: the channels of each attention head.
        num_classes: 0 for an unconditional network; else `cond` holds labels in 0..num_classes, num_classes (or None)
            being "no class".
        dropout: the rate of dropout inside blocks, in training.
        noise_channels: the random waves of the noise label; None for the channels of the first level.
        embed_channels: the length of the embedding; None for the channels of the widest level.
        label_balance: the weight t of the class in its sum with the noise level.
        concat_balance: the weight of the skip in a concatenation.
        residual_balance: the weight of a block's branch in the sum with its input.
        attention_balance: the weight of attention in the sum with its input.
        logvar_channels: the random waves of the uncertainty head; 0 for no head.
        in_channels: C, or None for any.
        resolution: the size in the names of published tensors; images may have others.
        remat: whether each block is computed again in the backward pass.
        dtype: of convolutions and attention; None for that of x. Parameters and output are float32.
        fused: see `transformer.attend`.
    """

    channels: int = 192
    multipliers: tuple[int, ...] = (1, 2, 3, 4)
    blocks: int = 3
    attention: tuple[int, ...] = (2, 3)
    head_channels: int = 64
    num_classes: int = 0
    dropout: float = 0.0
    noise_channels: int | None = None
    embed_channels: int | None = None
    label_balance: float = 0.5
    concat_balance: float = 0.5
    residual_balance: float = 0.3
    attention_balance: float = 0.3
    logvar_channels: int = 128
    in_channels: int | None = None
    resolution: int = 64
    remat: bool = False
    dtype: Any = None
    fused: bool = True

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False, return_logvar: bool = False):
        """Run the network.

        Args:
            x: (B, *sizes, C).
            label: noise labels (B,), log(sigma) / 4 in EDM2.
            cond: class labels (B,), or None.
            train: whether dropout is active, which needs a key named "dropout".
            return_logvar: whether to return also u (B,), the log-variance of the error at this noise level (eq. 21).

        Returns:
            F, an array like x, or (F, u).

        Raises:
            ValueError: for sizes that do not divide, and for labels that do not fit the classes.
        """
        self._check(x, label, cond)
        widths = [self.channels * m for m in self.multipliers]
        embedding = self._embed(label, cond, widths)
        make = nn.remat(EDM2Block, static_argnums=(3,)) if self.remat else EDM2Block
        balances = (self.residual_balance, self.attention_balance)

        def block(h, width, name, encodes, attends=False, resample=None):
            heads = width // self.head_channels if attends else 0
            layer = make(width, encodes, heads, resample, self.dropout, balances, self.dtype, self.fused, name=name)
            return layer(h, embedding, train)

        dtype, last = jnp.promote_types(x.dtype, jnp.float32), len(widths) - 1
        x = jnp.concatenate([x, jnp.ones_like(x[..., :1])], axis=-1)  # instead of biases
        h = MPConv(widths[0], 3, self.dtype, name="in")(x)
        skips = [h]
        for level, width in enumerate(widths):
            if level:
                h = block(h, h.shape[-1], f"down_{level}", True, resample="down")
                skips.append(h)
            for i in range(self.blocks):
                h = block(h, width, f"encoder_{level}_{i}", True, level in self.attention)
                skips.append(h)
        h = block(h, widths[last], "middle_0", False, True)
        h = block(h, widths[last], "middle_1", False)
        for level, width in reversed(list(enumerate(widths))):
            if level < last:
                h = block(h, h.shape[-1], f"up_{level}", False, resample="up")
            for i in range(self.blocks + 1):
                h = mp_cat(h, skips.pop(), self.concat_balance)
                h = block(h, width, f"decoder_{level}_{i}", False, level in self.attention)
        gain = self.param("gain", nn.initializers.zeros_init(), (), jnp.float32)
        out = MPConv(x.shape[-1] - 1, 3, self.dtype, name="out")(h, gain).astype(dtype)
        if not self.logvar_channels:
            if return_logvar:
                raise ValueError("this network has no uncertainty head (logvar_channels=0)")
            return out
        logvar = MPConv(1, name="logvar")(MPFourier(self.logvar_channels, name="logvar_fourier")(label))[:, 0]
        return (out, logvar) if return_logvar else out

    @staticmethod
    def project_weights(params):
        """`normalize_weights`, for `make_train_step`."""
        return normalize_weights(params)

    def _embed(self, label, cond, widths):
        """What each block is told: silu of the sum of noise level and class."""
        features = self.embed_channels or max(widths)
        noise = MPFourier(self.noise_channels or widths[0], name="fourier")(label)
        embedding = MPConv(features, name="noise")(noise)
        if self.num_classes:
            given = class_labels(cond, self.num_classes, label.shape[0])
            given = check_index("class labels", given, self.num_classes + 1, label.shape)
            classes = jax.nn.one_hot(given, self.num_classes, dtype=embedding.dtype)  # no class is zeros
            classes = nan_outside(given, self.num_classes + 1, classes)
            classes = MPConv(features, name="class")(classes * math.sqrt(self.num_classes))
            embedding = mp_sum(embedding, classes, self.label_balance)
        return mp_silu(embedding)

    def _check(self, x, label, cond) -> None:
        unit = 2 ** (len(self.multipliers) - 1)
        if x.ndim not in (3, 4, 5) or any(size % unit for size in x.shape[1:-1]):
            raise ValueError(
                f"a UNet of {len(self.multipliers)} levels takes (B, *sizes, C), sizes multiples of {unit}, "
                f"got {x.shape}: pad it or use fewer multipliers"
            )
        if self.in_channels not in (None, x.shape[-1]):
            raise ValueError(f"this network takes {self.in_channels} channels, got {x.shape}")
        check_label(label, x.shape[0])
        if not self.num_classes:
            check_unconditional(cond)
        check_levels(self.attention, len(self.multipliers))
        for level in {*self.attention, len(self.multipliers) - 1}:
            width = self.channels * self.multipliers[level]
            if width % self.head_channels:
                raise ValueError(f"{width} channels do not divide into heads of {self.head_channels}")


class EDM2Block(nn.Module):
    """Two modulated convolutions joined to their input by `mp_sum`, then perhaps self-attention.  Figure 21.

    Args:
        features: the output channels.
        encodes: whether the input's channels are changed, and its pixels normalised, before the convolutions; if not,
            its channels are changed after them.
        heads: attention heads; 0 for no attention.
        resample: "down", "up" or None.
        dropout: the rate of dropout, in training.
        balances: the weights of the branch and of attention in their sums.
        dtype: of convolutions and attention; None for that of x.
        fused: see `transformer.attend`.
    """

    features: int
    encodes: bool
    heads: int = 0
    resample: str | None = None
    dropout: float = 0.0
    balances: tuple[float, float] = (0.3, 0.3)
    dtype: Any = None
    fused: bool = True

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        """x: (B, *sizes, C), embedding: (B, E) -> (B, *sizes, features)."""
        layer = lambda kernel, name, features=self.features: MPConv(features, kernel, self.dtype, name=name)  # noqa: E731
        if self.resample:
            x = downsample(x) if self.resample == "down" else upsample(x)
        skip = layer(1, "skip") if x.shape[-1] != self.features else lambda x: x
        if self.encodes:
            x = normalize(skip(x), (-1,))
        gain = self.param("gain", nn.initializers.zeros_init(), (), jnp.float32)
        y = layer(3, "conv_0")(mp_silu(x))
        scale = layer(1, "embed")(embedding, gain) + 1
        y = mp_silu(y * scale.reshape(x.shape[0], *(1,) * (x.ndim - 2), -1).astype(y.dtype))
        y = layer(3, "conv_1")(nn.Dropout(self.dropout, deterministic=not train)(y))
        x = mp_sum(x if self.encodes else skip(x), y, self.balances[0])
        if self.heads:
            shape = (x.shape[0], -1, 3, self.heads, self.features // self.heads)
            qkv = normalize(layer(1, "qkv", 3 * self.features)(x).reshape(shape), (-1,))
            y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], fused=self.fused)
            x = mp_sum(x, layer(1, "attend")(y.reshape(x.shape)), self.balances[1])
        return jnp.clip(x, -CLIP, CLIP)


class MPConv(nn.Module):
    """A convolution by W / (rms(W) sqrt(fan in)), which keeps the variance; a matrix product for width 1.  Eq. 47.

    Args:
        features: the output channels.
        kernel: the width in each dimension.
        dtype: of the computation; None for that of x and the parameters.
    """

    features: int
    kernel: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x, gain=1.0):
        """(B, *sizes, C) -> (B, *sizes, features) of the same sizes, times `gain`."""
        widths = (self.kernel,) * (x.ndim - 2) if self.kernel > 1 else ()
        shape = (*widths, x.shape[-1], self.features)
        kernel = self.param("kernel", nn.initializers.normal(1.0), shape, jnp.float32)
        kernel = normalize(kernel, tuple(range(kernel.ndim - 1))) * (gain / math.sqrt(math.prod(shape[:-1])))
        x, kernel = nn.dtypes.promote_dtype(x, kernel, dtype=self.dtype)
        if self.kernel == 1:
            return lax.dot_general(x, kernel, (((x.ndim - 1,), (0,)), ((), ())))
        ends = (self.kernel // 2, self.kernel // 2)
        return conv(x, kernel, (1,) * (x.ndim - 2), (ends,) * (x.ndim - 2))


class MPFourier(nn.Module):
    """sqrt(2) cos(w_j label + phase_j) with fixed random w_j ~ N(0, (2 pi)²) and uniform phase_j.  Eq. 75."""

    features: int

    @nn.compact
    def __call__(self, label):
        """(B,) -> (B, features)."""
        label = as_float(label)
        # parameters that no gradient reaches: checkpoints, averages and shardings then treat them as any other
        w = self.param("frequencies", nn.initializers.normal(2 * math.pi), (self.features,), jnp.float32)
        phase = self.param("phases", nn.initializers.uniform(2 * math.pi), (self.features,), jnp.float32)
        w, phase = (lax.stop_gradient(a).astype(label.dtype)[None] for a in (w, phase))
        return math.sqrt(2) * jnp.cos(label[:, None] * w + phase)


def normalize(x, axes: Sequence[int], epsilon: float = 1e-4):
    """x / (epsilon + root mean square over `axes`), for weights, pixels, queries and keys."""
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    square = jnp.square(wide).mean(axes, keepdims=True)
    rms = jnp.where(square > 0, jnp.sqrt(jnp.where(square > 0, square, 1)), 0)  # with a finite derivative at 0
    return (wide / (epsilon + rms)).astype(x.dtype)


def mp_silu(x):
    """silu(x) / 0.596, which keeps the second moment of N(0, 1).  Eq. 81."""
    return nn.silu(x) / 0.596


def mp_sum(a, b, t: float):
    """((1 - t) a + t b) / sqrt((1 - t)² + t²).  Eq. 88."""
    return (a + t * (b - a)) / math.sqrt((1 - t) ** 2 + t**2)


def mp_cat(a, b, t: float):
    """a and b side by side on the channels, scaled so that they contribute as 1 - t to t for any widths.  Eq. 103."""
    A, B = a.shape[-1], b.shape[-1]
    scale = math.sqrt((A + B) / ((1 - t) ** 2 + t**2))
    return jnp.concatenate([a * (scale * (1 - t) / math.sqrt(A)), b * (scale * t / math.sqrt(B))], axis=-1)


def normalize_weights(params):
    """The parameters, with weights whose root mean square is 1 for each output: `project` of `make_train_step`.

    The network computes the same to 1e-4, because weights are normalised also where they are used.

    Args:
        params: parameters or variables of an `EDM2UNet`.

    Returns:
        The same tree; only leaves named "kernel" change.

    Reference: section 2.3, eq. 66.
    """

    def one(path, leaf):
        if getattr(path[-1], "key", None) != "kernel":
            return leaf
        wide = leaf.astype(jnp.promote_types(leaf.dtype, jnp.float32))
        rms = jnp.sqrt(jnp.square(wide).mean(tuple(range(leaf.ndim - 1)), keepdims=True))
        return (wide / jnp.where(rms > 0, rms, 1)).astype(leaf.dtype)

    return jax.tree_util.tree_map_with_path(one, params)


# size: channels, dropout; tables 6 and 7
SIZES = {
    "xs": (128, 0.0), "s": (192, 0.0), "m": (256, 0.1), "l": (320, 0.1), "xl": (384, 0.1), "xxl": (448, 0.1),
}  # fmt: skip
# parameters, and the published file with the average that has the lowest FID
PUBLISHED = {
    "edm2_img512_xs": (124_713_253, "edm2-img512-xs-2147483-0.135"),
    "edm2_img512_s": (280_212_837, "edm2-img512-s-2147483-0.130"),
    "edm2_img512_m": (497_807_781, "edm2-img512-m-2147483-0.100"),
    "edm2_img512_l": (777_498_085, "edm2-img512-l-1879048-0.085"),
    "edm2_img512_xl": (1_119_283_749, "edm2-img512-xl-1342177-0.085"),
    "edm2_img512_xxl": (1_523_164_773, "edm2-img512-xxl-0939524-0.070"),
    "edm2_img64_s": (280_209_381, "edm2-img64-s-1073741-0.075"),
    "edm2_img64_m": (497_803_173, "edm2-img64-m-2147483-0.060"),
    "edm2_img64_l": (777_492_325, "edm2-img64-l-1073741-0.040"),
    "edm2_img64_xl": (1_119_276_837, "edm2-img64-xl-0671088-0.040"),
}


def _register(name: str, count: int, file: str) -> None:
    images, size = name.split("_")[1:]
    (channels, dropout), C = SIZES[size], 3 if images == "img64" else 4

    def make(**overrides):
        return EDM2UNet(**dict(channels=channels, dropout=dropout, num_classes=1000) | overrides)

    what = "64x64 images" if images == "img64" else "64x64 latents of four channels, of 512x512 images"
    make.__name__, make.__doc__ = name, f"EDM2-{size.upper()} for ImageNet, {what}: {count / 1e6:.0f}M parameters."
    register_model(make)
    register_tag(Tag(
        name, "fid", dict(in_channels=C), parameters=count, shape=(64, 64, C), license="CC-BY-NC-SA-4.0",
        url=f"https://nvlabs-fi-cdn.nvidia.com/edm2/posthoc-reconstructions/{file}.pkl", architecture="edm2",
        training=Training(schedule="EDM", target="EDM", conditioning="EDM", sigma_data=0.5),
    ))  # fmt: skip


for _name, (_count, _file) in PUBLISHED.items():
    _register(_name, _count, _file)
