"""Random changes of images that do not leak into samples, on the device, by the row of the global batch."""

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array
from jdiff.core.keys import each

LABELS = 9

# Daubechies' least asymmetric wavelet of six vanishing moments ("sym6"), its low-pass filter: sum sqrt(2), orthonormal
# to its shifts by 2, so that doubling and halving an image that did not move gives it back
SYM6 = np.array([
    0.015404109327027373, 0.0034907120842174702, -0.11799011114819057, -0.048311742585633, 0.4910559419267466,
    0.787641141030194, 0.3379294217276218, -0.07263752278646252, -0.021060292512300564, 0.04472490177066578,
    0.0017677118642428036, -0.007800708325034148,
])  # fmt: skip
PEAK = 5  # the tap that belongs to the pixel itself


def flip(key, x: Array, rate=0.5) -> Array:
    """Images (B, H, W, C) of any dtype, each mirrored left to right with probability `rate`."""
    _check_images(x)
    mirrored = jax.vmap(lambda k: jax.random.uniform(k))(each(key, len(x))) < rate
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)


def augment(key, x: Array, p=0.12, *, scale=0.2, stretch=0.2, shift=0.125) -> tuple[Array, Array]:
    """(images, what was done to each (B, 9)): EDM's non-leaking augmentation, Karras et al. 2022 (2206.00364), F.2.

    Half of all images are mirrored left to right; then each with probability p: mirrored top to bottom (half of them),
    scaled by 2^(`scale` n), turned by any angle, stretched by 2^(`stretch` n) along an axis (half of them along a
    turned one) and across it squeezed by as much, moved by `shift` n of the width and height, n standard normal. The
    nine numbers are the network's condition: 0 where nothing was done, and then the image is untouched; sample with
    zeros. x is (B, H, W, C), floating, H and W at least 2. Raises ValueError for anything else.
    """
    _check_images(x)
    if not jnp.issubdtype(x.dtype, jnp.floating) or min(x.shape[1:3]) < 2:
        raise ValueError(f"augment takes floating images of at least 2x2 (use to_model first); got {x.dtype}{x.shape}")
    labels, mirror, inverse = draw(key, x.shape, p, scale, stretch, shift)
    mirrored = jnp.where(mirror[:, 0, None, None, None], x[:, :, ::-1], x)
    mirrored = jnp.where(mirror[:, 1, None, None, None], mirrored[:, ::-1], mirrored)
    moved = jnp.any(labels[:, 2:] != 0, axis=1)[:, None, None, None]
    return jnp.where(moved, transform(mirrored, inverse), mirrored), labels


def draw(key, shape, p, scale=0.2, stretch=0.2, shift=0.125) -> tuple[Array, Array, Array]:
    """(labels (B, 9), mirrored left-right and top-bottom (B, 2), matrices (B, 2, 3) from new pixels to old ones)."""
    size = jnp.array([shape[2], shape[1]], jnp.float32)  # x first

    def one(key):
        keys = iter(jax.random.split(key, 13))

        def chance(rate):
            return jax.random.uniform(next(keys)) < rate

        def angle():
            return jax.random.uniform(next(keys), minval=-jnp.pi, maxval=jnp.pi)

        mirror = jnp.stack([chance(0.5), chance(0.5) & chance(p)])
        zoom = jnp.where(chance(p), jax.random.normal(next(keys)), 0.0)
        turn = jnp.where(chance(p), angle(), 0.0)
        pull = jnp.where(chance(p), jax.random.normal(next(keys)), 0.0)
        axis = jnp.where(chance(0.5), angle(), 0.0)
        move = jnp.where(chance(p), jax.random.normal(next(keys), (2,)), 0.0)
        done = [zoom, jnp.cos(turn) - 1, jnp.sin(turn), pull * jnp.cos(axis), pull * jnp.sin(axis)]
        labels = jnp.concatenate([mirror.astype(jnp.float32), jnp.stack(done), move])
        return labels, mirror, matrix(scale * zoom, turn, stretch * pull, axis, shift * size * move)

    return jax.vmap(one)(each(key, shape[0]))


def matrix(zoom, turn, pull, axis, move) -> Array:
    """(2, 3), from new pixels to old ones, of an image scaled by 2^zoom, turned by `turn`, stretched by 2^pull along
    `axis` and squeezed by as much across it, then moved by `move` (2,) pixels; angles in radians.
    """
    with jax.default_matmul_precision("highest"):
        linear = _rotation(turn) @ _rotation(-axis) @ jnp.diag(jnp.exp2(jnp.stack([-pull, pull]))) @ _rotation(axis)
        linear = linear * jnp.exp2(-zoom)
        return jnp.concatenate([linear, -(linear @ move)[:, None]], axis=1)


def _rotation(angle) -> Array:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def transform(x: Array, inverse: Array) -> Array:
    """Images (B, H, W, C) under affine maps: pixel q of the new one shows point `inverse` (q, 1) of the old, (B, 2, 3).

    Coordinates are (x, y) in pixels from the centre. The image, mirrored at its borders without end, is doubled by the
    wavelet's filter, read off there linearly at twice the density, and halved by the filter again: antialiased,
    sharp, and a no-op for the identity, as in Karras et al. 2020 (2006.06676), appendix B.2.
    """
    _, height, width, channels = x.shape
    # doubled, one period of the mirrored image is 4 (size - 1) long
    up = [jnp.asarray(_doubling(n), jnp.float32) for n in (height, width)]
    down = [jnp.asarray(_halving(n), jnp.float32) for n in (height, width)]
    old = [(n - 1) / 2 for n in (width, height)]
    fine = [jnp.arange(2 * n + len(SYM6) - 2) / 2 - PEAK / 2 for n in (width, height)]  # where halving looks
    highest = jax.lax.Precision.HIGHEST  # not TF32 or bfloat16: pixels are data

    def one(image, inverse):
        period = jnp.einsum("ih,hwc,jw->ijc", up[0], image.astype(jnp.float32), up[1], precision=highest)
        a, b = fine[0][None, :] - old[0], fine[1][:, None] - old[1]
        (m, n, o), (q, r, s) = inverse.astype(jnp.float32)
        u, v = m * a + n * b + o + old[0], q * a + r * b + s + old[1]
        read = _bilinear(period, 2 * v, 2 * u)
        return jnp.einsum("hi,ijc,wj->hwc", down[0], read, down[1], precision=highest)

    return jax.vmap(one)(x, inverse).astype(x.dtype)


def _bilinear(image: Array, row: Array, column: Array) -> Array:
    """A periodic image (H, W, C) at fractional rows and columns, each (...): (..., C)."""
    height, width, channels = image.shape
    flat = image.reshape(height * width, channels)
    top, left = jnp.floor(row), jnp.floor(column)
    below, right = (row - top)[..., None], (column - left)[..., None]
    top, left = top.astype(jnp.int32), left.astype(jnp.int32)

    def at(i, j):
        return flat[(top + i) % height * width + (left + j) % width]

    upper = at(0, 0) * (1 - right) + at(0, 1) * right
    lower = at(1, 0) * (1 - right) + at(1, 1) * right
    return upper * (1 - below) + lower * below


def _doubling(n: int) -> np.ndarray:
    """(4 (n - 1), n): row j is sample j of y_j = sum_i h[j + 5 - 2 i] x_i, x mirrored without end; y_2i is at x_i."""
    length = 4 * (n - 1)
    out = np.zeros((length, n))
    for j in range(length):
        for tap, h in enumerate(SYM6):
            if (j + PEAK - tap) % 2 == 0:
                i = (j + PEAK - tap) // 2 % (2 * n - 2)
                out[j, min(i, 2 * n - 2 - i)] += h
    return out


def _halving(n: int) -> np.ndarray:
    """(n, 2 n + 10): x_i = sum_k h[k] z_(2 i + k), where z_k lies at pixel (k - 5) / 2."""
    out = np.zeros((n, 2 * n + len(SYM6) - 2))
    for i in range(n):
        out[i, 2 * i : 2 * i + len(SYM6)] = SYM6
    return out


def _check_images(x) -> None:
    if jnp.ndim(x) != 4:
        raise ValueError(f"images have shape (B, H, W, C); got {jnp.shape(x)}")
