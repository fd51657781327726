"""Halving, doubling and resizing of signals (B, *sizes, C) in any number of dimensions."""

from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax

from jdiff.models.inits import scaled_init

Filter = Sequence[float]


def downsample(x: jax.Array, filter: Filter = (1, 1), pad: int | None = None) -> jax.Array:
    """Every second value of a signal that is filtered along each dimension.

    y_n = sum_k f_k x_(2n + k - pad), with f scaled to sum 1 and zeros beyond the edges. For (1, 1) it is the mean of
    each pair.

    Args:
        x: (B, *sizes, C).
        filter: f, an even number of taps; NCSN++ has (1, 3, 3, 1).
        pad: the zeros before and after; (len(f) - 1) // 2 by default.

    Returns:
        (B, *sizes / 2, C).

    Raises:
        ValueError: for odd sizes, and for an odd number of taps.

    Reference: Zhang 2019, arXiv:1904.11486; Song et al. 2021, arXiv:2011.13456, appendix H.
    """
    f, pad = _filter(filter, pad)
    if any(size % 2 for size in x.shape[1:-1]) and pad == (len(f) - 1) // 2:
        raise ValueError(f"downsample: halves even sizes, got {'x'.join(map(str, x.shape[1:-1]))}; pad the signal")
    if f == [0.5, 0.5] and pad == 0:
        split = [x.shape[0]] + [n for size in x.shape[1:-1] for n in (size // 2, 2)] + [x.shape[-1]]
        return x.reshape(split).mean(axis=tuple(range(2, 2 * (x.ndim - 2) + 1, 2)))
    for axis in range(1, x.ndim - 1):
        x = jnp.pad(x, [(pad, pad) if i == axis else (0, 0) for i in range(x.ndim)])
        end = x.shape[axis] - len(f) + 1
        x = jnp.asarray(sum(f_k * lax.slice_in_dim(x, k, k + end, 2, axis) for k, f_k in enumerate(f)))
    return x


def upsample(x: jax.Array, filter: Filter = (1, 1)) -> jax.Array:
    """Zeros between the values of a signal, then the filter along each dimension.

    It is the transpose of `downsample`, times 2 for each dimension, so that constants stay. For (1, 1) each value comes
    twice, which is the nearest neighbour.

    Args:
        x: (B, *sizes, C).
        filter: an even number of taps.

    Returns:
        (B, 2 *sizes, C).

    Raises:
        ValueError: for an odd number of taps.
    """
    f, pad = _filter(filter, None)
    for axis in range(1, x.ndim - 1):
        size = x.shape[axis]
        phases = []
        for phase in (0, 1):  # y_(2n + phase) = 2 sum_k f_k x_(n + (phase + pad - k) / 2), k of the right parity
            terms = [(f_k, (phase + pad - k) // 2) for k, f_k in enumerate(f) if (phase + pad - k) % 2 == 0]
            phases.append(sum(2 * f_k * _shift(x, by, axis, size) for f_k, by in terms))
        shape = [*x.shape[:axis], 2 * size, *x.shape[axis + 1 :]]
        x = jnp.stack(phases, axis + 1).reshape(shape)
    return x


def resize(x: jax.Array, sizes: Sequence[int], method: str = "bilinear") -> jax.Array:
    """A signal at other sizes.

    Args:
        x: (B, *sizes, C).
        sizes: the new ones.
        method: "nearest", "bilinear" or "bicubic", as in `jax.image.resize`.

    Returns:
        (B, *sizes, C) in the dtype of x, computed in float32 or wider.

    Raises:
        ValueError: for another number of sizes than x has dimensions.
    """
    if len(sizes) != x.ndim - 2:
        raise ValueError(f"resize: {len(sizes)} sizes for x {x.shape}, which has {x.ndim - 2} dimensions")
    wide = x.astype(jnp.promote_types(x.dtype, jnp.float32))
    return jax.image.resize(wide, (x.shape[0], *sizes, x.shape[-1]), method).astype(x.dtype)


def pixel_shuffle(x: jax.Array, factor: int = 2) -> jax.Array:
    """Move channels into space.

    Args:
        x: images (B, H, W, C r²).
        factor: r.

    Returns:
        (B, r H, r W, C).

    Raises:
        ValueError: for what is no image, and for channels that r² does not divide.

    Reference: Shi et al. 2016, arXiv:1609.05158, eq. 4.
    """
    B, H, W, C = _image(x, "pixel_shuffle")
    if C % factor**2:
        raise ValueError(f"pixel_shuffle: {C} channels are not a multiple of {factor}^2")
    x = x.reshape(B, H, W, C // factor**2, factor, factor)
    return x.transpose(0, 1, 4, 2, 5, 3).reshape(B, H * factor, W * factor, C // factor**2)


def pixel_unshuffle(x: jax.Array, factor: int = 2) -> jax.Array:
    """Move space into channels, the inverse of `pixel_shuffle`.

    Args:
        x: images (B, r H, r W, C).
        factor: r.

    Returns:
        (B, H, W, C r²).

    Raises:
        ValueError: for what is no image, and for sizes that r does not divide.
    """
    B, H, W, C = _image(x, "pixel_unshuffle")
    if H % factor or W % factor:
        raise ValueError(f"pixel_unshuffle: {H}x{W} are not multiples of {factor}")
    x = x.reshape(B, H // factor, factor, W // factor, factor, C)
    return x.transpose(0, 1, 3, 5, 2, 4).reshape(B, H // factor, W // factor, C * factor**2)


def _image(x, name: str) -> tuple[int, ...]:
    if x.ndim != 4:
        raise ValueError(f"{name}: x is an image (B, H, W, C), got {x.shape}")
    return x.shape


class ConvTranspose(nn.Module):
    """A learned doubling of the sizes: the transpose of a convolution of stride 2 and width 4.

    Args:
        features: the channels of the output.
        dtype: of the computation; None for that of x and the parameters.
    """

    features: int
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """x: (B, *sizes, C); returns (B, 2 *sizes, features)."""
        dims = x.ndim - 2
        shape = (4,) * dims + (x.shape[-1], self.features)
        kernel = self.param("kernel", scaled_init(), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        space = "DHW"[3 - dims :]
        numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
        out = lax.conv_transpose(x, kernel, (2,) * dims, "SAME", dimension_numbers=numbers)
        return out + bias.reshape((1,) * (x.ndim - 1) + (-1,))


def _filter(filter: Filter, pad: int | None) -> tuple[list[float], int]:
    if len(filter) % 2 or not filter:
        raise ValueError(f"a resampling filter has an even number of taps, got {tuple(filter)}")
    total = sum(filter)
    return [f / total for f in filter], (len(filter) - 1) // 2 if pad is None else pad


def _shift(x, by: int, axis: int, size: int):
    """x_(n + by), zeros beyond the edges."""
    if by == 0:
        return x
    widths = [(max(-by, 0), max(by, 0)) if i == axis else (0, 0) for i in range(x.ndim)]
    return lax.slice_in_dim(jnp.pad(x, widths), max(by, 0), max(by, 0) + size, axis=axis)
