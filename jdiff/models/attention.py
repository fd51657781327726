"""Self-attention over the positions of a signal."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from jdiff.models.inits import scaled_init
from jdiff.models.norms import GroupNorm
from jdiff.models.transformer import attend


def check_levels(attention: Sequence[int], depth: int) -> None:
    """Raise ValueError unless a UNet of `depth` levels has all those that attention is asked for at."""
    if any(not 0 <= level < depth for level in attention):
        raise ValueError(
            f"attention lists levels, 0 (full resolution) to {depth - 1} for {depth} multipliers, not resolutions; "
            f"got {tuple(attention)}"
        )


class SelfAttention(nn.Module):
    """skip_scale (x + W_out attention(norm(x))), multi-head, over all positions; starts as the identity.

    Vaswani et al. 2017, arXiv:1706.03762; in UNets: Ho et al. 2020, arXiv:2006.11239, appendix B. `qkv_scale` and
    `out_scale` multiply the initial variance of the kernels; `norm` gives groups, min_width and epsilon of the norm;
    `fused`: see `attend`.
    """

    heads: int = 1
    dtype: Any = None
    skip_scale: float = 1.0
    norm: tuple[int, int, float] = (32, 4, 1e-5)
    kernel_init: str = "xavier"
    qkv_scale: float = 1.0
    out_scale: float = 0.0
    fused: bool = True

    @nn.compact
    def __call__(self, x):
        """(B, *sizes, C) -> the same; C must be a multiple of `heads`."""
        B, C = x.shape[0], x.shape[-1]
        if C % self.heads:
            raise ValueError(f"SelfAttention: {C} channels do not divide into {self.heads} heads")
        y = GroupNorm(*self.norm, name="norm")(x).reshape(-1, C)  # products of two matrices are the fastest on CPUs
        inner, outer = (scaled_init(scale, self.kernel_init) for scale in (self.qkv_scale, self.out_scale))
        qkv = nn.Dense(3 * C, dtype=self.dtype, kernel_init=inner, name="qkv")(y)
        qkv = qkv.reshape(B, -1, 3, self.heads, C // self.heads)
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], fused=self.fused)
        y = nn.Dense(C, dtype=self.dtype, kernel_init=outer, name="out")(y.reshape(-1, C))
        return self.skip_scale * (x + y.reshape(x.shape)) if self.skip_scale != 1 else x + y.reshape(x.shape)
