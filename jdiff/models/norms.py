"""Normalisation, in float32 whatever the dtype of the network."""

import flax.linen as nn
import jax.numpy as jnp


def group_norm(channels: int, name: str | None = None, max_groups: int = 32, min_width: int = 4) -> nn.GroupNorm:
    """Group norm with at most `max_groups` groups of at least `min_width` channels.  Wu & He 2018, arXiv:1803.08494."""
    groups = max(g for g in range(1, max_groups + 1) if channels % g == 0 and (g == 1 or channels // g >= min_width))
    return nn.GroupNorm(num_groups=groups, epsilon=1e-5, dtype=jnp.float32, name=name)


class AdaptiveGroupNorm(nn.Module):
    """norm(x) (1 + scale) + shift, scale and shift linear in an embedding.  arXiv:2105.05233, section 3."""

    @nn.compact
    def __call__(self, x, embedding):
        """x: (B, H, W, C), embedding: (B, E)."""
        C = x.shape[-1]
        y = group_norm(C, "norm")(x)
        scale, shift = jnp.split(nn.Dense(2 * C, name="modulation")(nn.silu(embedding)), 2, axis=-1)
        return y * (1 + scale[:, None, None]) + shift[:, None, None]
