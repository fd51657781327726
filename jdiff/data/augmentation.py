"""Random changes of images that do not leak into samples, made on the device, by the row of the global batch."""

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
    """Images, each mirrored left to right with probability `rate`.

    Args:
        key: one key, (B,) keys or a `BatchKey`.
        x: images (B, H, W, C) of any dtype.
        rate: the probability.

    Raises:
        ValueError: x has another number of axes.
    """
    _check_images(x)
    mirrored = jax.vmap(lambda k: jax.random.uniform(k))(each(key, len(x))) < rate
    return jnp.where(mirrored[:, None, None, None], x[:, :, ::-1], x)


def augment(key, x: Array, p=0.12, *, scale=0.2, stretch=0.2, shift=0.125) -> tuple[Array, Array]:
    """EDM's non-leaking augmentation: changed images, and numbers that tell the network what was changed.

    Half of all images are mirrored left to right. Then each of these is done with probability p, where n is standard
    normal: the image is mirrored top to bottom (half of those drawn); scaled by 2^(`scale` n); turned by any angle;
    stretched by 2^(`stretch` n) along an axis and squeezed by as much across it (for half of those drawn, the axis is
    turned); moved by `shift` n of its width and of its height.

    Args:
        key: one key, (B,) keys or a `BatchKey`.
        x: floating images (B, H, W, C), H and W at least 2.
        p: the probability.
        scale, stretch, shift: the sizes of the changes, as above.

    Returns:
        (images (B, H, W, C), labels (B, 9)). The labels are the network's condition. They are 0 where nothing was done,
        and such an image is unchanged. Sample with zeros.

    Raises:
        ValueError: x is anything else.

    Reference:
        Karras et al. 2022, arXiv:2206.00364, appendix F.2.
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
    """(labels (B, 9), whether mirrored left-right and top-bottom (B, 2), matrices (B, 2, 3) as of `matrix`).

    The arguments are those of `augment`, with the shape of the images (B, H, W, C).
    """
    size = jnp.array([shape[2], shape[1]], jnp.float32)  # x first

    def one(key):
        keys = iter(jax.random.split(key, 13))

        def chance(rate):
            return jax.random.uniform(next(keys)) < rate

        def angle():
            return jax.random.uniform(next(keys), minval=-jnp.pi, maxval=jnp.pi)

        mirror = jnp.stack([chance(0.5), chance(0.5) & chance(p)])
        log_scale = jnp.where(chance(p), jax.random.normal(next(keys)), 0.0)
        rotation = jnp.where(chance(p), angle(), 0.0)
        log_stretch = jnp.where(chance(p), jax.random.normal(next(keys)), 0.0)
        axis = jnp.where(chance(0.5), angle(), 0.0)
        offset = jnp.where(chance(p), jax.random.normal(next(keys), (2,)), 0.0)
        turned = [jnp.cos(rotation) - 1, jnp.sin(rotation)]
        stretched = [log_stretch * jnp.cos(axis), log_stretch * jnp.sin(axis)]
        labels = [mirror.astype(jnp.float32), jnp.stack([log_scale, *turned, *stretched]), offset]
        inverse = matrix(scale * log_scale, rotation, stretch * log_stretch, axis, shift * size * offset)
        return jnp.concatenate(labels), mirror, inverse

    return jax.vmap(one)(each(key, shape[0]))


def matrix(log_scale, rotation, log_stretch, axis, offset) -> Array:
    """The affine map (2, 3) from pixels of a changed image to pixels of the old one.

    Args:
        log_scale: the image is scaled by 2^log_scale;
        rotation: then it is turned by this angle, in radians;
        log_stretch: then stretched by 2^log_stretch along the axis, and squeezed by as much across it;
        axis: the angle of that axis, in radians;
        offset: then it is moved by these pixels (2,), x first.
    """
    with jax.default_matmul_precision("highest"):
        stretch = jnp.diag(jnp.exp2(jnp.stack([-log_stretch, log_stretch])))
        linear = _rotation(rotation) @ _rotation(-axis) @ stretch @ _rotation(axis) * jnp.exp2(-log_scale)
        return jnp.concatenate([linear, -(linear @ offset)[:, None]], axis=1)


def _rotation(angle) -> Array:
    c, s = jnp.cos(angle), jnp.sin(angle)
    return jnp.stack([jnp.stack([c, -s]), jnp.stack([s, c])])


def transform(x: Array, inverse: Array) -> Array:
    """Images under affine maps: pixel q of a new image shows the point `inverse @ (q, 1)` of the old one.

    The image is mirrored at its borders without end, doubled by the wavelet's filter, read linearly at twice the
    density, and halved by the filter again. So it is antialiased and sharp, and the identity changes nothing.

    Args:
        x: images (B, H, W, C).
        inverse: one map (2, 3) for each image, (B, 2, 3); coordinates are (x, y) in pixels from the centre.

    Reference:
        Karras et al. 2020, arXiv:2006.06676, appendix B.2.
    """
    _, height, width, channels = x.shape
    # doubled, one period of the mirrored image is 4 (size - 1) long
    up = [jnp.asarray(_doubling(n), jnp.float32) for n in (height, width)]
    down = [jnp.asarray(_halving(n), jnp.float32) for n in (height, width)]
    old = [(n - 1) / 2 for n in (width, height)]
    fine = [jnp.arange(2 * n + len(SYM6) - 2) / 2 - PEAK / 2 for n in (width, height)]  # pixels that halving reads
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
