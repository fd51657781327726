"""Self-attention over the positions of a signal."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from jdiff.models.inits import scaled_init
from jdiff.models.norms import GroupNorm
from jdiff.models.transformer import attend, dense


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
        y = GroupNorm(*self.norm, name="norm")(x)
        inner, outer = (scaled_init(scale, self.kernel_init) for scale in (self.qkv_scale, self.out_scale))
        qkv = dense(3 * C, inner, self.dtype, "qkv")(y)
        qkv = qkv.reshape(B, -1, 3, self.heads, C // self.heads)
        y = attend(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2], fused=self.fused)
        y = dense(C, outer, self.dtype, "out")(y.reshape(x.shape))
        return self.skip_scale * (x + y) if self.skip_scale != 1 else x + y
