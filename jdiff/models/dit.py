"""DiT: a transformer over patches whose norms are modulated by noise label and class (adaLN-Zero)."""

from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdiff.models.embed import ClassEmbedding, as_float, check_label, check_unconditional
from jdiff.models.norms import modulate, standardize
from jdiff.models.registry import Tag, Training, register_model, register_tag
from jdiff.models.transformer import (
    Attention,
    FeedForward,
    Patches,
    check_known,
    check_patches,
    dense,
    grid_positions,
    images,
    rotary_turns,
    sincos_positions,
    xavier,
    zeros,
)


def label_features(label: jax.Array, features: int = 256) -> jax.Array:
    """[cos(label w_j), sin(label w_j)] with w_j = 10,000^(-2j/features), in float32 or wider: (B,) -> (B, features)."""
    label = as_float(label)
    half, dtype = features // 2, label.dtype
    # frequencies are rounded as in the published code: at label 999 their last bit moves an angle by 1e-5
    exponents = -np.log(10_000).astype(dtype) * np.arange(half, dtype=dtype) / half
    w = np.exp(exponents.astype(np.float64)).astype(dtype)
    angles = label[:, None] * w[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], -1)


def modulated_norm(x, shift, scale):
    """norm(x) (1 + scale) + shift, for tokens x (B, L, D) with shift and scale (B, D)."""
    return modulate(standardize(x, (-1,), 1e-6), scale, shift)


class DiTBlock(nn.Module):
    """x + gate attention(modulated norm), x + cross-attention, x + gate feed-forward(modulated norm).

    Shifts, scales and gates are linear in silu(c) and start at zero, so the block starts as the identity.

    Args:
        heads: attention heads.
        ratio: the width inside the feed-forward layer over that of the tokens.
        qk_norm: see `transformer.Attention`.
        dtype: of dense layers and attention; None for float32.
        fused: see `transformer.attend`.
        alone: see `transformer.Attention`.
    """

    heads: int
    ratio: float = 4.0
    qk_norm: bool = False
    dtype: Any = None
    fused: bool = True
    alone: bool = False

    @nn.compact
    def __call__(self, x, c, context=None, mask=None, turns=None):
        """x: (B, L, D); c: (B, D); context: (B, S, D) with its mask (B, S), or None; turns: see `rotary_turns`."""
        D = x.shape[-1]
        parts = nn.Dense(6 * D, kernel_init=zeros, dtype=self.dtype, name="modulation")(nn.silu(c))
        shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = jnp.split(parts, 6, -1)
        gate_0, gate_1 = gate_0[:, None], gate_1[:, None]
        attention = Attention(
            self.heads, self.qk_norm, dtype=self.dtype, fused=self.fused, alone=self.alone, name="attention"
        )
        x = x + gate_0 * attention(modulated_norm(x, shift_0, scale_0), turns=turns)
        if context is not None:
            cross = Attention(self.heads, self.qk_norm, out_init=zeros, dtype=self.dtype, name="cross")
            x = x + cross(standardize(x, (-1,), 1e-6), context, mask)
        feed = FeedForward(self.ratio, dtype=self.dtype, name="feed")
        return x + gate_1 * feed(modulated_norm(x, shift_1, scale_1))


class DiT(nn.Module):
    """A diffusion transformer for images (B, H, W, C), H and W being multiples of `patch`; its output starts at 0.

    Args:
        width: of the tokens.
        depth: the number of blocks.
        heads: attention heads.
        patch: the height and width of the patches.
        ratio: the width inside the feed-forward layers over `width`.
        num_classes: 0 for an unconditional network; else `cond` holds labels in 0..num_classes, num_classes (or None)
            being "no class".
        context: the width of embeddings; 0 for none. With it `cond` is a set or a text (B, S, context), or a pair of
            one and its mask (B, S), True for what counts, or None. Blocks attend to it, and to a learned "nothing".
            The order of the embeddings does not matter.
        channels: C, or None for any.
        out_multiplier: output over input channels; 2 gives channels [prediction, variance].
        label_scale: what brings noise labels to the published range, 0 to 999.
        sincos: whether fixed positions are added to the patches.
        rope: whether queries and keys are turned by their positions.
        qk_norm: see `transformer.Attention`.
        remat: whether each block is computed again in the backward pass.
        dtype: of dense layers and attention; None for float32. Parameters, norms and output are float32.
        fused: see `transformer.attend`.
        perturbed: the blocks, 0 being the first, in which each token attends to itself alone.
        skipped: the blocks that are left out. Both make a worse network of the same parameters, for guidance.

    Reference: Peebles & Xie 2023, arXiv:2212.09748.
    """

    width: int = 384
    depth: int = 12
    heads: int = 6
    patch: int = 2
    ratio: float = 4.0
    num_classes: int = 0
    context: int = 0
    channels: int | None = None
    out_multiplier: float = 1
    label_scale: float = 200.0
    sincos: bool = True
    rope: bool = False
    qk_norm: bool = False
    remat: bool = False
    dtype: Any = None
    fused: bool = True
    perturbed: tuple[int, ...] = ()
    skipped: tuple[int, ...] = ()

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False):
        """x: (B, H, W, C); label: (B,); cond: see the class; returns F, (B, H, W, C out_multiplier)."""
        del train  # no dropout
        check_patches(x, self.patch, self.channels, "DiT")
        check_label(label, x.shape[0])
        _, H, W, C = x.shape
        p = self.patch
        grid = H // p, W // p
        h = Patches(self.width, p, self.dtype, name="patches")(x)
        if self.sincos:
            h = h + jnp.asarray(sincos_positions(*grid, self.width), h.dtype)[None]
        turns = rotary_turns(grid_positions(*grid), self.width // self.heads) if self.rope else None
        c, context, mask = self._conditions(label, cond)
        make = nn.remat(DiTBlock) if self.remat else DiTBlock
        check_known("DiT", range(self.depth), perturbed=self.perturbed, skipped=self.skipped)
        for i in range(self.depth):
            if i in self.skipped:
                continue
            alone = i in self.perturbed
            block = make(self.heads, self.ratio, self.qk_norm, self.dtype, self.fused, alone, name=f"block_{i}")
            h = block(h, c, context, mask, turns)
        parts = nn.Dense(2 * self.width, kernel_init=zeros, name="modulation")(nn.silu(c))
        h = modulated_norm(h, *jnp.split(parts, 2, -1))
        h = dense(int(p * p * C * self.out_multiplier), zeros, None, "out")(h)
        return images(h, H, W, p)

    def _conditions(self, label, cond):
        """(c, context, mask): the vector for the modulations; the context, None if there is none."""
        init = nn.initializers.normal(0.02)
        c = nn.Dense(self.width, kernel_init=init, name="label_in")(label_features(label * self.label_scale))
        c = nn.Dense(self.width, kernel_init=init, name="label_out")(nn.silu(c))
        if self.context and self.num_classes:
            raise ValueError("a DiT takes classes or a context, not both; set num_classes or context to 0")
        if self.num_classes:
            c = c + ClassEmbedding(self.num_classes, self.width, std=0.02, name="class")(cond, label.shape[0])
        elif not self.context:
            check_unconditional(cond)
        if not self.context:
            return c, None, None
        B = label.shape[0]
        given, mask = cond if isinstance(cond, tuple | list) else (cond, None)
        given = jnp.zeros((B, 0, self.context), c.dtype) if given is None else given
        if given.ndim != 3 or given.shape[::2] != (B, self.context):
            raise ValueError(f"a context is ({B}, length, {self.context}), got {given.shape}")
        mask = jnp.ones(given.shape[:2], bool) if mask is None else mask
        if mask.shape != given.shape[:2]:
            raise ValueError(f"the context's mask is {mask.shape}; expected {given.shape[:2]}")
        nothing = self.param("nothing", init, (1, 1, self.width), jnp.float32)
        given = nn.Dense(self.width, kernel_init=xavier, dtype=self.dtype, name="context_in")(given)
        context = jnp.concatenate([jnp.broadcast_to(nothing, (B, 1, self.width)).astype(given.dtype), given], 1)
        return c, context, jnp.concatenate([jnp.ones((B, 1), bool), mask.astype(bool)], 1)


SIZES = {"s": (384, 12, 6), "b": (768, 12, 12), "l": (1024, 24, 16), "xl": (1152, 28, 16)}  # width, depth, heads


@register_model
def dit_small(**overrides):
    """A DiT for 32x32 pixels: 6 layers of 256 on 64 patches, 7.4M parameters."""
    return DiT(**dict(width=256, depth=6, heads=8, patch=4) | overrides)


def _register(size: str, patch: int) -> None:
    width, depth, heads = SIZES[size]

    def make(**overrides):
        return DiT(**dict(width=width, depth=depth, heads=heads, patch=patch) | overrides)

    make.__name__ = f"dit_{size}_{patch}"
    make.__doc__ = f"DiT-{size.upper()}/{patch}: {depth} layers of {width}."
    register_model(make)


for _size in SIZES:
    for _patch in (2, 4, 8):
        _register(_size, _patch)

for _pixels in (256, 512):
    register_tag(Tag(
        "dit_xl_2", f"imagenet{_pixels}", dict(num_classes=1000, out_multiplier=2, label_scale=1.0, channels=4),
        url=f"https://dl.fbaipublicfiles.com/DiT/models/DiT-XL-2-{_pixels}x{_pixels}.pt", license="CC BY-NC 4.0",
        parameters=674_834_720, shape=(_pixels // 8, _pixels // 8, 4), architecture="dit",
        training=Training(schedule="linear", target="Eps", conditioning="Index", learned_variance=True),
    ))  # fmt: skip
