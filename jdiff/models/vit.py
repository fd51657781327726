"""Vision transformers whose noise label and class are tokens beside the patches; a U-ViT joins its blocks by skips."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.models.conv import Conv
from jdiff.models.dit import label_features
from jdiff.models.embed import ClassEmbedding, check_label, check_unconditional
from jdiff.models.registry import register_model
from jdiff.models.transformer import Block, Patches, check_patches, dense, images, zeros


class ViT(nn.Module):
    """A pre-norm transformer on [class, label, patches] for images (B, H, W, C) of one size; its output starts at 0.

    Args:
        width: of the tokens.
        depth: the number of blocks; odd where there are skips.
        heads: attention heads.
        patch: the height and width of the patches, which divide those of the images.
        ratio: the width inside the feed-forward layers over `width`.
        skips: whether it is a U-ViT: block depth - 1 - i gets [its input, the output of block i] through one dense
            layer, queries, keys and values have no bias, and a 3x3 convolution ends the network.
        num_classes: 0 for an unconditional network; else `cond` holds labels in 0..num_classes, num_classes (or None)
            being "no class".
        channels: C, or None for any.
        out_multiplier: output over input channels; 2 with learned variance.
        label_scale: what brings noise labels to the published range, 0 to 999.
        qk_norm: see `transformer.Attention`.
        remat: whether each block is computed again in the backward pass.
        dtype: of dense layers and attention; None for float32. Parameters, norms and output are float32.
        fused: see `transformer.attend`.

    Reference: Dosovitskiy et al. 2021, arXiv:2010.11929; Bao et al. 2022, arXiv:2209.12152.
    """

    width: int = 256
    depth: int = 6
    heads: int = 8
    patch: int = 4
    ratio: float = 4.0
    skips: bool = False
    num_classes: int = 0
    channels: int | None = None
    out_multiplier: float = 1
    label_scale: float = 200.0
    qk_norm: bool = False
    remat: bool = False
    dtype: Any = None
    fused: bool = True

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False):
        """x: (B, H, W, C); label: (B,); cond: (B,) or None; returns F, (B, H, W, C out_multiplier)."""
        del train  # no dropout
        check_patches(x, self.patch, self.channels, "ViT")
        check_label(label, x.shape[0])
        if self.skips and self.depth % 2 == 0:
            raise ValueError(f"a U-ViT has an odd depth, its middle block having no skip; got {self.depth}")
        init = nn.initializers.truncated_normal(0.02)
        extra = [label_features(label * self.label_scale, self.width)]
        if not self.skips:
            extra = [nn.Dense(self.width, kernel_init=init, name="label")(extra[0])]
        if self.num_classes:
            extra = [ClassEmbedding(self.num_classes, self.width, std=0.02, name="class")(cond, x.shape[0]), *extra]
        else:
            check_unconditional(cond)
        patches = Patches(self.width, self.patch, self.dtype, name="patches")(x)
        h = jnp.concatenate([jnp.stack(extra, 1).astype(patches.dtype), patches], 1)
        h = h + self._positions(h.shape[1], init).astype(h.dtype)
        make = nn.remat(Block) if self.remat else Block
        kept: list[jax.Array] = []
        for i in range(self.depth):
            if self.skips and i > self.depth // 2:
                h = jnp.concatenate([h, kept.pop()], -1)
                h = dense(self.width, init, self.dtype, f"skip_{i}")(h)
            block = make(
                self.heads, self.ratio, qk_norm=self.qk_norm, bias=not self.skips, kernel_init=init, dtype=self.dtype,
                fused=self.fused, name=f"block_{i}",
            )  # fmt: skip
            h = block(h)
            if self.skips and i < self.depth // 2:
                kept.append(h)
        h = nn.LayerNorm(1e-5, use_fast_variance=False, name="norm")(h)[:, len(extra) :]
        C = int(x.shape[-1] * self.out_multiplier)
        out = dense(self.patch**2 * C, init if self.skips else zeros, None, "out")
        h = images(out(h), x.shape[1], x.shape[2], self.patch)
        return Conv(C, scale=0.0, name="smooth")(h) if self.skips else h

    def _positions(self, length: int, init):
        """The learned positions (1, L, width), which fix the size of the images."""
        have: Any = self.get_variable("params", "positions")
        if have is not None and have.shape[1] != length:
            raise ValueError(f"this ViT has learned the positions of {have.shape[1]} tokens, got images of {length}")
        return self.param("positions", init, (1, length, self.width), jnp.float32)


@register_model
def vit_small(**overrides):
    """A plain ViT for 32x32 pixels: 6 layers of 256 on 64 patches and the label, 4.8M parameters."""
    return ViT(**overrides)


@register_model
def uvit_s_2(**overrides):
    """U-ViT-S/2: 13 layers of 512, 44M parameters; for 32x32 pixels."""
    return ViT(**dict(width=512, depth=13, heads=8, patch=2, skips=True) | overrides)


@register_model
def uvit_m_4(**overrides):
    """U-ViT-M/4: 17 layers of 768, 131M parameters; for 64x64 pixels."""
    return ViT(**dict(width=768, depth=17, heads=12, patch=4, skips=True) | overrides)


@register_model
def uvit_l_2(**overrides):
    """U-ViT-L/2: 21 layers of 1024, 287M parameters; for latents of 32x32."""
    return ViT(**dict(width=1024, depth=21, heads=16, patch=2, skips=True) | overrides)


@register_model
def uvit_h_2(**overrides):
    """U-ViT-H/2: 29 layers of 1152, 501M parameters; for latents of 32x32."""
    return ViT(**dict(width=1152, depth=29, heads=16, patch=2, skips=True) | overrides)
