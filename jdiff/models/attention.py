"""Self-attention over the positions of a signal."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn

from jdiff.models.inits import scaled_init
from jdiff.models.norms import GroupNorm
from jdiff.models.transformer import attend, dense


def check_levels(attention: Sequence[int], depth: int) -> None:
    """Raise ValueError unless a UNet of `depth` levels has all the levels that `attention` lists."""
    if any(not 0 <= level < depth for level in attention):
        raise ValueError(
            f"attention lists levels, 0 (full resolution) to {depth - 1} for {depth} multipliers, not resolutions; "
            f"got {tuple(attention)}"
        )


class SelfAttention(nn.Module):
    """skip_scale (x + W_out attention(norm(x))), multi-head, over all positions; it starts as the identity.

    Args:
        heads: the number of attention heads, which must divide the channels.
        dtype: of dense layers and attention; None for that of x.
        skip_scale: what the sum is multiplied by.
        norm: `groups`, `min_width` and `epsilon` of the group norm.
        kernel_init: the law of initial kernels, see `inits.scaled_init`.
        qkv_scale: times the initial variance of queries, keys and values.
        out_scale: times the initial variance of the last layer; 0 starts the module as the identity.
        fused: whether half precision may run in cuDNN's attention, see `transformer.attend`.
        alone: whether each position attends to itself alone: attention perturbed on purpose, for guidance.

    Reference: Vaswani et al. 2017, arXiv:1706.03762; in UNets, Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    heads: int = 1
    dtype: Any = None
    skip_scale: float = 1.0
    norm: tuple[int, int, float] = (32, 4, 1e-5)
    kernel_init: str = "xavier"
    qkv_scale: float = 1.0
    out_scale: float = 0.0
    fused: bool = True
    alone: bool = False

    @nn.compact
    def __call__(self, x):
        """x: (B, *sizes, C), C a multiple of `heads`; returns an array like x."""
        B, C = x.shape[0], x.shape[-1]
        if C % self.heads:
            raise ValueError(f"SelfAttention: {C} channels do not divide into {self.heads} heads")
        y = GroupNorm(*self.norm, name="norm")(x)
        inner, outer = (scaled_init(scale, self.kernel_init) for scale in (self.qkv_scale, self.out_scale))
        qkv = dense(3 * C, inner, self.dtype, "qkv")(y)
        qkv = qkv.reshape(B, -1, 3, self.heads, C // self.heads)
        v = qkv[:, :, 2]
        y = v if self.alone else attend(qkv[:, :, 0], qkv[:, :, 1], v, fused=self.fused)
        y = dense(C, outer, self.dtype, "out")(y.reshape(x.shape))
        return self.skip_scale * (x + y) if self.skip_scale != 1 else x + y
