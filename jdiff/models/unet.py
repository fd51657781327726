"""The UNet of DDPM: residual blocks at falling and rising resolution, joined by skips, with self-attention.

Ho et al. 2020, arXiv:2006.11239, appendix B; scale-shift conditioning from Dhariwal & Nichol 2021, arXiv:2105.05233.
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jdiff.models.attention import SelfAttention
from jdiff.models.conv import Conv
from jdiff.models.embed import ClassEmbedding, NoiseEmbedding, check_unconditional
from jdiff.models.norms import AdaptiveGroupNorm, group_norm
from jdiff.models.registry import register_model
from jdiff.models.resample import downsample, upsample


class ResBlock(nn.Module):
    """x + conv(silu(adaptive norm(conv(silu(norm(x)))))); the last convolution starts at zero."""

    features: int
    dropout: float = 0.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        """x: (B, H, W, C), embedding: (B, E) -> (B, H, W, features)."""
        y = Conv(self.features, dtype=self.dtype, name="conv_0")(nn.silu(group_norm(x.shape[-1], "norm_0")(x)))
        y = nn.silu(AdaptiveGroupNorm(name="norm_1")(y, embedding))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = Conv(self.features, scale=0.0, dtype=self.dtype, name="conv_1")(y)
        if x.shape[-1] != self.features:
            x = Conv(self.features, kernel=1, dtype=self.dtype, name="skip")(x)
        return x + y


class UNet(nn.Module):
    """A UNet for images (B, H, W, C) of any channel count; H and W must be multiples of 2^(levels - 1).

    `multipliers`: channels of each level over `channels`, the resolution halving from one to the next; `attention`:
    the levels (0 is the full resolution) with self-attention after every block. `num_classes` of 0 is unconditional;
    else `cond` holds labels in 0..num_classes, num_classes (or None) being "no class". `out_multiplier` 2 gives a
    network with learned variance. Parameters, norms and output are float32, convolutions in `dtype`.
    """

    channels: int = 64
    multipliers: tuple[int, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    heads: int = 4
    num_classes: int = 0
    dropout: float = 0.0
    label_scale: float = 200.0
    out_multiplier: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False):
        """x: (B, H, W, C); label: (B,); cond: (B,) or None; returns F, (B, H, W, C out_multiplier)."""
        self._check(x)
        width = 4 * self.channels
        embedding = NoiseEmbedding(width, self.label_scale, name="noise")(label)
        if self.num_classes:
            embedding = embedding + ClassEmbedding(self.num_classes, width, name="class")(cond, len(x))
        else:
            check_unconditional(cond)

        def block(h, level, name):
            h = ResBlock(self.channels * self.multipliers[level], self.dropout, self.dtype, name=name)(
                h, embedding, train
            )
            return SelfAttention(self.heads, self.dtype, name=f"{name}_attention")(h) if level in self.attention else h

        depth = len(self.multipliers)
        h = Conv(self.channels, dtype=self.dtype, name="in")(x)
        skips = [h]
        for level in range(depth):
            for i in range(self.blocks):
                h = block(h, level, f"down_{level}_{i}")
                skips.append(h)
            if level < depth - 1:
                h = downsample(h)
                skips.append(h)
        h = block(h, depth - 1, "middle_0")
        h = ResBlock(h.shape[-1], self.dropout, self.dtype, name="middle_1")(h, embedding, train)
        for level in reversed(range(depth)):
            for i in range(self.blocks + 1):
                h = block(jnp.concatenate([h, skips.pop()], axis=-1), level, f"up_{level}_{i}")
            if level:
                h = Conv(h.shape[-1], dtype=self.dtype, name=f"upsample_{level}")(upsample(h))
        h = nn.silu(group_norm(h.shape[-1], "norm_out")(h))
        return Conv(x.shape[-1] * self.out_multiplier, scale=0.0, name="out")(h)

    def _check(self, x) -> None:
        if x.ndim != 4:
            raise ValueError(f"a UNet takes images (B, H, W, C), got {x.shape}")
        unit = 2 ** (len(self.multipliers) - 1)
        if x.shape[1] % unit or x.shape[2] % unit:
            raise ValueError(
                f"a UNet of {len(self.multipliers)} levels needs sizes that are multiples of {unit}, got "
                f"{x.shape[1]}x{x.shape[2]}; pad the images or use fewer multipliers"
            )


@register_model
def unet(**overrides):
    """The UNet with its defaults: 64 channels, three levels, attention at the second."""
    return UNet(**overrides)


@register_model
def unet_digits(**overrides):
    """A UNet for 8x8 images of ten classes: 0.75M parameters, attention at 4x4."""
    defaults = dict(channels=32, multipliers=(1, 2), blocks=1, attention=(1,), heads=4, num_classes=10)
    return UNet(**defaults | overrides)
