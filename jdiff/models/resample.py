"""Halving and doubling of images."""

import jax
import jax.numpy as jnp


def downsample(x: jax.Array) -> jax.Array:
    """The mean of each 2x2 block, (B, H, W, C) -> (B, H/2, W/2, C)."""
    B, H, W, C = x.shape
    return x.reshape(B, H // 2, 2, W // 2, 2, C).mean(axis=(2, 4))


def upsample(x: jax.Array) -> jax.Array:
    """Each pixel twice in both directions, (B, H, W, C) -> (B, 2H, 2W, C)."""
    B, H, W, C = x.shape
    return jnp.broadcast_to(x[:, :, None, :, None], (B, H, 2, W, 2, C)).reshape(B, 2 * H, 2 * W, C)
