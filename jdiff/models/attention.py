"""Self-attention over the pixels of an image."""

from typing import Any

import flax.linen as nn
import jax

from jdiff.models.conv import scaled_init
from jdiff.models.norms import group_norm


class SelfAttention(nn.Module):
    """x + W_out attention(norm(x)), multi-head, over all H x W positions; starts as the identity.

    Vaswani et al. 2017, arXiv:1706.03762; in UNets: Ho et al. 2020, arXiv:2006.11239, appendix B.
    """

    heads: int = 1
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """(B, H, W, C) -> the same; C must be a multiple of `heads`."""
        B, H, W, C = x.shape
        if C % self.heads:
            raise ValueError(f"SelfAttention: {C} channels do not divide into {self.heads} heads")
        y = group_norm(C, "norm")(x).reshape(B, H * W, C)
        qkv = nn.Dense(3 * C, dtype=self.dtype, name="qkv")(y).reshape(B, H * W, 3, self.heads, C // self.heads)
        y = jax.nn.dot_product_attention(qkv[:, :, 0], qkv[:, :, 1], qkv[:, :, 2])
        y = nn.Dense(C, dtype=self.dtype, kernel_init=scaled_init(0.0), name="out")(y.reshape(B, H * W, C))
        return x + y.reshape(B, H, W, C)
