"""Parts of transformers: attention, feed-forward layers, blocks, patches, and the positions of tokens.

Tokens are (B, L, D). Dense layers compute in `dtype`; parameters, norms and softmax are float32 or wider.
"""

import functools
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdiff.models import cpu

xavier = nn.initializers.xavier_uniform()
zeros = nn.initializers.zeros_init()


def attend(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None, fused: bool = True) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v over all keys, head by head.

    Args:
        q: queries, (B, T, N, D): T tokens, N heads.
        k: keys, (B, S, N, D).
        v: values, (B, S, N, D).
        mask: (B, S), True where a key may be seen, at least one in each row; None for all.
        fused: whether half precision without a mask may run in cuDNN's fused kernel. It does on NVIDIA GPUs from Ampere
            on, for D up to 128 in multiples of 8. That kernel has first derivatives in reverse mode and no others:
            False for `jax.jvp` and second derivatives.

    Returns:
        (B, T, N, D), in the dtype of v.

    Reference: Vaswani et al. 2017, arXiv:1706.03762, eq. 1.
    """
    if cpu.on_cpu() or q.dtype == jnp.float64:  # the softmax of jax.nn is a float32 one
        return cpu.attention(q, k, v, mask)
    half = q.dtype in (jnp.bfloat16, jnp.float16)
    fused = fused and half and mask is None and q.shape[-1] <= 128 and q.shape[-1] % 8 == 0 and _has_kernel()
    mask = None if mask is None else mask[:, None, None]
    return jax.nn.dot_product_attention(q, k, v, mask=mask, implementation="cudnn" if fused else None)


def _has_kernel() -> bool:
    """Whether cuDNN's fused attention runs here: on NVIDIA GPUs of compute capability 8.0 or above."""
    if cpu.elsewhere():
        return False
    major = str(getattr(jax.local_devices()[0], "compute_capability", "")).partition(".")[0]
    return jax.default_backend() == "gpu" and major.isdigit() and int(major) >= 8  # AMD's are called gfx...


def check_known(owner: str, parts, **chosen) -> None:
    """Raise ValueError for parts of a network, to be perturbed or skipped, that it has not."""
    for name, values in chosen.items():
        unknown = [value for value in values if value not in parts]
        if unknown:
            raise ValueError(f"{owner}: {name} has {unknown[0]!r}; expected some of {', '.join(map(str, parts))}")


def dense(features: int, init: Any, dtype: Any, name: str, bias: bool = True) -> nn.Dense:
    """A dense layer for tokens (B, L, D)."""
    return nn.Dense(features, bias, dtype, kernel_init=init, dot_general=cpu.dot_general, name=name)


class Attention(nn.Module):
    """W_out attend(W_q x, W_k context, W_v context), multi-head; without a context it is self-attention.

    Args:
        heads: their number, which must divide the width of the tokens.
        qk_norm: whether the queries and keys of each head are divided by their root mean square, and multiplied by a
            learned scale: logits then cannot grow with the weights (Dehghani et al. 2023, arXiv:2302.05442).
        bias: whether queries, keys and values have a bias.
        kernel_init: the initial law of kernels.
        out_init: that of the last layer; `kernel_init` by default.
        dtype: of dense layers and attention; None for float32.
        fused: see `attend`.
        alone: whether each token attends to itself alone: attention perturbed on purpose, for guidance.
    """

    heads: int = 8
    qk_norm: bool = False
    bias: bool = True
    kernel_init: Any = xavier
    out_init: Any = None
    dtype: Any = None
    fused: bool = True
    alone: bool = False

    @nn.compact
    def __call__(self, x, context=None, mask=None, turns=None):
        """Attend to x itself or to a context.

        Args:
            x: (B, T, D).
            context: (B, S, E), or None.
            mask: (B, S), True where a key may be seen, or None.
            turns: of the positions, see `rotary_turns`, or None.

        Returns:
            (B, T, D).
        """
        B, T, D = x.shape
        if D % self.heads:
            raise ValueError(f"Attention: a width of {D} does not divide into {self.heads} heads")

        def project(x, parts, name):
            y = dense(parts * D, self.kernel_init, self.dtype, name, self.bias)(x)
            return [part.reshape(B, -1, self.heads, D // self.heads) for part in jnp.split(y, parts, -1)]

        if context is None:
            q, k, v = project(x, 3, "qkv")
        else:
            (q,), (k, v) = project(x, 1, "q"), project(context, 2, "kv")
        if self.qk_norm:
            q, k = nn.RMSNorm(name="q_norm")(q), nn.RMSNorm(name="k_norm")(k)
        if turns is not None:
            q, k = rotate(q, turns), rotate(k, turns)
        y = v if self.alone else attend(q.astype(v.dtype), k.astype(v.dtype), v, mask, self.fused)
        init = self.out_init or self.kernel_init
        return dense(D, init, self.dtype, "out")(y.reshape(B, T, D))


class FeedForward(nn.Module):
    """W_out gelu(W_in x).

    Args:
        ratio: the width between the layers over that of the tokens.
        exact: whether gelu is exact, by the error function, or its approximation by tanh.
        kernel_init: the initial law of kernels.
        dtype: of dense layers; None for float32.
    """

    ratio: float = 4.0
    exact: bool = False
    kernel_init: Any = xavier
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """(B, L, D) -> (B, L, D)."""
        D = x.shape[-1]
        y = dense(int(D * self.ratio), self.kernel_init, self.dtype, "in")(x)
        y = cpu.recomputed(functools.partial(nn.gelu, approximate=not self.exact))(y)
        return dense(D, self.kernel_init, self.dtype, "out")(y)


class Block(nn.Module):
    """Attention, then a feed-forward layer, each added to its input.

    Args:
        heads: attention heads.
        ratio: the width inside the feed-forward layer over that of the tokens.
        post: whether it is norm(x + f(x)), post-norm, or x + f(norm(x)), pre-norm.
        qk_norm: see `Attention`.
        bias: see `Attention`.
        epsilon: what norms add to the variance.
        kernel_init: the initial law of kernels.
        dtype: of dense layers and attention; None for float32.
        fused: see `attend`.

    Reference: pre-norm, Dosovitskiy et al. 2021, arXiv:2010.11929; post-norm, Vaswani et al. 2017, arXiv:1706.03762.
    """

    heads: int = 8
    ratio: float = 4.0
    post: bool = False
    qk_norm: bool = False
    bias: bool = True
    epsilon: float = 1e-5
    kernel_init: Any = xavier
    dtype: Any = None
    fused: bool = True

    @nn.compact
    def __call__(self, x, mask=None):
        """x: (B, L, D); mask: (B, L), True where a token may be seen, or None; returns (B, L, D)."""
        shared = dict(kernel_init=self.kernel_init, dtype=self.dtype)
        attention = Attention(self.heads, self.qk_norm, self.bias, **shared, fused=self.fused, name="attention")
        feed = FeedForward(self.ratio, exact=True, **shared, name="feed")
        for f, name in ((lambda y: attention(y, mask=mask), "norm_0"), (feed, "norm_1")):
            norm = nn.LayerNorm(self.epsilon, use_fast_variance=False, name=name)
            x = (norm(x + f(x)) if self.post else x + f(norm(x))).astype(x.dtype)
        return x


class Patches(nn.Module):
    """Patches of `patch` x `patch` pixels through one dense layer."""

    features: int
    patch: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """(B, H, W, C) -> (B, HW/patch², features)."""
        p, C = self.patch, x.shape[-1]

        def init(key, shape, dtype):
            return xavier(key, (p * p * C, self.features), dtype).reshape(shape)

        kernel = self.param("kernel", init, (p, p, C, self.features), jnp.float32)
        bias = self.param("bias", zeros, (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        x = tokens(x, p)
        return cpu.dot_general(x, kernel.reshape(p * p * C, -1), (((x.ndim - 1,), (0,)), ((), ()))) + bias[None, None]


def tokens(x: jax.Array, patch: int) -> jax.Array:
    """The patches of images, row by row: (B, H, W, C) -> (B, HW/patch², patch² C)."""
    (B, H, W, C), p = x.shape, patch
    return x.reshape(B, H // p, p, W // p, p, C).transpose(0, 1, 3, 2, 4, 5).reshape(B, -1, p * p * C)


def images(x: jax.Array, height: int, width: int, patch: int) -> jax.Array:
    """The images of patches, the inverse of `tokens`: (B, L, patch² C) -> (B, height, width, C)."""
    B, p = x.shape[0], patch
    x = x.reshape(B, height // p, width // p, p, p, -1)
    return x.transpose(0, 1, 3, 2, 4, 5).reshape(B, height, width, -1)


def check_patches(x: jax.Array, patch: int, channels: int | None, name: str) -> None:
    """Raise ValueError unless x is (B, H, W, C), H and W are multiples of `patch`, and C is `channels` if given."""
    if x.ndim != 4:
        raise ValueError(f"a {name} takes images (B, H, W, C), got {x.shape}")
    if x.shape[1] % patch or x.shape[2] % patch:
        raise ValueError(
            f"a {name} with patches of {patch} needs sizes that are multiples of {patch}, got "
            f"{x.shape[1]}x{x.shape[2]}; pad the images or use another patch"
        )
    if channels is not None and x.shape[3] != channels:
        raise ValueError(f"this {name} takes {channels} channels, got {x.shape[3]}")


def grid_positions(height: int, width: int) -> np.ndarray:
    """(row, column) of each token of a grid, row by row: (height width, 2)."""
    return np.stack(np.meshgrid(np.arange(height), np.arange(width), indexing="ij"), -1).reshape(-1, 2)


def sincos_positions(height: int, width: int, features: int) -> np.ndarray:
    """Fixed positions of the tokens of a grid: sin and cos of the column, then of the row.

    Args:
        height: the rows of the grid.
        width: its columns.
        features: the length of the vectors, a multiple of 4.

    Returns:
        (height width, features), in float64.

    Raises:
        ValueError: for other numbers of features.

    Reference: Peebles & Xie 2023, arXiv:2212.09748, section 3.2.
    """
    if features % 4:
        raise ValueError(f"sincos_positions: features must be a multiple of 4, got {features}")
    w = 10_000.0 ** (-np.arange(features // 4) / (features // 4))
    angles = grid_positions(height, width)[:, ::-1, None] * w  # (L, 2, features / 4)
    return np.stack([np.sin(angles), np.cos(angles)], 2).reshape(height * width, features)


def rotary_turns(positions: np.ndarray, features: int, base: float = 10_000.0) -> np.ndarray:
    """Cosines and sines of the angles by which rotary position embedding turns pairs of features.

    Each of the A axes turns its share of the pairs, at rates that fall geometrically from 1 to 1/base.

    Args:
        positions: (L,), or (L, A) on several axes.
        features: of one head, a multiple of 2 A.
        base: the inverse of the lowest rate.

    Returns:
        (2, L, features / 2), the cosines and the sines.

    Raises:
        ValueError: for other numbers of features.

    Reference: Su et al. 2021, arXiv:2104.09864, eq. 15.
    """
    positions = np.asarray(positions, np.float64).reshape(len(positions), -1)
    axes = positions.shape[1]
    if features % (2 * axes):
        raise ValueError(f"rotary_turns: {axes} axes need a head width that {2 * axes} divides, got {features}")
    pairs = features // 2 // axes
    w = base ** (-np.arange(pairs) / pairs)
    angles = (positions[:, :, None] * w).reshape(len(positions), -1)
    return np.stack([np.cos(angles), np.sin(angles)])


def rotate(x: jax.Array, turns: np.ndarray) -> jax.Array:
    """Turn the pairs (x_i, x_{i + D/2}) of token l by the angle of turns[:, l, i].

    Args:
        x: queries or keys, (B, L, N, D).
        turns: (2, L, D/2), from `rotary_turns`.

    Returns:
        An array like x, computed in float32 or wider.
    """
    dtype = jnp.promote_types(x.dtype, jnp.float32)
    cos, sin = jnp.asarray(turns, dtype)[:, None, :, None]
    a, b = jnp.split(x.astype(dtype), 2, -1)
    return jnp.concatenate([a * cos - b * sin, a * sin + b * cos], -1).astype(x.dtype)
