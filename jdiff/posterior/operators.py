"""Ready operators A of an observation y = A(x_0) + noise, and the adjoint of any linear one.

Each is a pytree that is called with x (B, ...), linear but for `Magnitude`. Images are (B, *sizes, C), in any number of
dimensions. They stand in any place that takes A, and so does any function.
"""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, safe_sqrt
from jdiff.core.checks import check_is
from jdiff.core.keys import as_key
from jdiff.core.pytrees import known, noun, static


@noun
class Identity:
    """A(x) = x: denoising."""

    def __call__(self, x: Array) -> Array:
        return x


@noun
class Mask:
    """A(x) = mask x: inpainting. What is hidden is 0 in y.

    Args:
        mask: 1 where x is observed and 0 elsewhere, of the shape of one sample; its last axis may be 1.

    Raises:
        ValueError: for other numbers than 0 and 1, and, in a call, for a mask of another size.
    """

    mask: Any

    def check(self):
        check_is("mask", self.mask, (jax.Array, np.ndarray), "an array of 0 and 1 of the shape of one sample")
        if known(self.mask) and not np.isin(np.asarray(self.mask), (0, 1)).all():
            raise ValueError("mask has other numbers than 0 and 1; 1 is observed, 0 is hidden")

    def __call__(self, x: Array) -> Array:
        shape = jnp.shape(self.mask)
        if shape not in (x.shape[1:], (*x.shape[1:-1], 1)):
            raise ValueError(f"mask has shape {shape} for samples of {x.shape[1:]}; give a mask of their size")
        return x * jnp.asarray(self.mask, x.dtype)[None]


def random_pixels(key, sizes: Sequence[int], share: float) -> Mask:
    """A mask that observes a share of all pixels, drawn at random, with all their channels.

    Args:
        key: one key.
        sizes: of the image, without channels, as (28, 28).
        share: how much is observed, from 0 to 1; the number of pixels is rounded.

    Returns:
        The mask, (*sizes, 1).

    Raises:
        ValueError: for a share out of range.
    """
    if not 0 <= share <= 1:
        raise ValueError(f"random_pixels: share must be from 0 to 1, got {share}")
    n = int(np.prod(sizes))
    order = jax.random.permutation(as_key(key), n)
    return Mask((order < round(share * n)).astype(jnp.float32).reshape(*sizes, 1))


@noun
class Separable:
    """A(x) = M_1 x ... M_d along the axes of an image: what `box`, `bicubic` and `gaussian_blur` make.

    Args:
        matrices: one for each axis beside the channels, (m_i, n_i).

    Raises:
        ValueError: in a call, for images of other sizes.
    """

    matrices: tuple

    def check(self):
        object.__setattr__(self, "matrices", tuple(self.matrices))
        for matrix in self.matrices:
            if jnp.ndim(matrix) != 2:
                raise ValueError(f"Separable: a matrix has shape {jnp.shape(matrix)}; expected (m, n), one an axis")

    def __call__(self, x: Array) -> Array:
        sizes = tuple(matrix.shape[1] for matrix in self.matrices)
        if x.ndim != len(sizes) + 2 or x.shape[1:-1] != sizes:
            raise ValueError(f"the operator is for images of {sizes} and channels, got x {x.shape}")
        for axis, matrix in enumerate(self.matrices, 1):
            x = jnp.moveaxis(jnp.tensordot(jnp.asarray(matrix, x.dtype), x, (1, axis)), 0, axis)
        return x


def box(sizes: Sequence[int], factor: int) -> Separable:
    """Downsampling by the mean of each block of factor^d pixels.

    Args:
        sizes: of the image, without channels, as (28, 28); `factor` divides each.
        factor: how much smaller the result is along each axis.

    Returns:
        The operator, (B, *sizes, C) -> (B, *sizes / factor, C).

    Raises:
        ValueError: for a factor that is no whole number, or divides a size not.
    """
    _check_factor("box", sizes, factor)
    return Separable(tuple(np.kron(np.eye(n // factor), np.full((1, factor), 1 / factor)) for n in sizes))


def bicubic(sizes: Sequence[int], factor: int) -> Separable:
    """Bicubic downsampling with antialiasing, as Pillow's: Keys' kernel with a = -1/2, widened by the factor.

    Args:
        sizes: of the image, without channels, as (28, 28); `factor` divides each.
        factor: how much smaller the result is along each axis.

    Returns:
        The operator, (B, *sizes, C) -> (B, *sizes / factor, C).

    Raises:
        ValueError: for a factor that is no whole number, or divides a size not.

    Reference:
        Keys 1981, "Cubic convolution interpolation for digital image processing".
    """
    _check_factor("bicubic", sizes, factor)

    def matrix(n):
        centres = (np.arange(n // factor)[:, None] + 0.5) * factor - 0.5
        weights = _keys((np.arange(n)[None] - centres) / factor)
        return weights / weights.sum(1, keepdims=True)

    return Separable(tuple(matrix(n) for n in sizes))


def gaussian_blur(sizes: Sequence[int], std: float) -> Separable:
    """Blur by a Gaussian. At the edges its weights are rescaled, so that constants stay.

    Args:
        sizes: of the image, without channels, as (28, 28).
        std: the standard deviation of the Gaussian in pixels, positive.

    Returns:
        The operator, which keeps the shape of x.

    Raises:
        ValueError: for a std that is not positive.
    """
    if not std > 0:
        raise ValueError(f"gaussian_blur: std must be positive, in pixels; got {std}")

    def matrix(n):
        weights = np.exp(-0.5 * ((np.arange(n)[:, None] - np.arange(n)[None]) / std) ** 2)
        return weights / weights.sum(1, keepdims=True)

    return Separable(tuple(matrix(n) for n in sizes))


@noun
class Blur:
    """A(x) = the kernel convolved with each channel, on an image that goes on at the opposite edge.

    Args:
        kernel: of as many axes as the image has beside its channels, its middle being its centre.

    Raises:
        ValueError: in a call, for a kernel of other axes, or longer than the image.
    """

    kernel: Any

    def check(self):
        check_is("kernel", self.kernel, (jax.Array, np.ndarray), "an array, as motion_kernel makes one")

    def __call__(self, x: Array) -> Array:
        shape, sizes = jnp.shape(self.kernel), x.shape[1:-1]
        if len(shape) != len(sizes) or any(k > n for k, n in zip(shape, sizes, strict=True)):
            raise ValueError(f"kernel has shape {shape} for images of {sizes}; expected as many axes, none longer")
        axes = tuple(range(1, x.ndim - 1))
        padded = jnp.pad(jnp.asarray(self.kernel, x.dtype), [(0, n - k) for k, n in zip(shape, sizes, strict=True)])
        centred = jnp.roll(padded, tuple(-(k // 2) for k in shape), tuple(range(len(shape))))[None, ..., None]
        return jnp.fft.irfftn(jnp.fft.rfftn(centred, axes=axes) * jnp.fft.rfftn(x, axes=axes), sizes, axes)


def motion_kernel(length: int, angle: float) -> np.ndarray:
    """The kernel of an even motion along a straight line, for `Blur`.

    Args:
        length: of the line in pixels, 1 or more.
        angle: its direction in degrees, 0 along the second axis and 90 along the first.

    Returns:
        (length, length), of sum 1.

    Raises:
        ValueError: for a length below 1.
    """
    if not (isinstance(length, (int, np.integer)) and length >= 1):
        raise ValueError(f"motion_kernel: length is a whole number of pixels, 1 or more; got {length}")
    kernel, n = np.zeros((length, length)), 16 * length
    points = length * ((np.arange(n) + 0.5) / n - 0.5)
    places = [np.floor(length / 2 + points * along(np.deg2rad(angle))) for along in (np.sin, np.cos)]
    rows, columns = (np.clip(place.astype(int), 0, length - 1) for place in places)
    np.add.at(kernel, (rows, columns), 1 / n)
    return kernel


@noun
class Grey:
    """A(x) = the weighted sum of the channels: colours to grey.

    Args:
        weights: one for each channel; those of ITU-R BT.601 by default.

    Raises:
        ValueError: in a call, for another number of channels.
    """

    weights: Any = (0.299, 0.587, 0.114)

    def __call__(self, x: Array) -> Array:
        weights = jnp.asarray(self.weights, x.dtype)
        if weights.shape != x.shape[-1:]:
            raise ValueError(f"Grey has weights {weights.shape} for x {x.shape}; expected one for each channel")
        return jnp.tensordot(x, weights, 1)[..., None]


@noun
class Magnitude:
    """A(x) = |the Fourier transform of each channel|: phase retrieval, not linear. Its derivative is 0 at 0.

    Args:
        oversampling: how much longer than the image the transform is along each axis, 1 or more.
    """

    oversampling: int = static(default=1)

    def check(self):
        if not (isinstance(self.oversampling, int) and self.oversampling >= 1):
            raise ValueError(f"Magnitude: oversampling is a whole number, 1 or more; got {self.oversampling}")

    def __call__(self, x: Array) -> Array:
        sizes = tuple(n * self.oversampling for n in x.shape[1:-1])
        z = jnp.fft.fftn(x, sizes, tuple(range(1, x.ndim - 1)), norm="ortho")
        return safe_sqrt(z.real**2 + z.imag**2)


def adjoint(A: Callable[[Array], Array], y: Array, shape: Sequence[int]) -> Array:
    """A^T y of a linear A, by transposing its program.

    >>> import jax.numpy as jnp
    >>> adjoint(box((4,), 2), jnp.ones((1, 2, 1)), (1, 4, 1)).ravel().tolist()
    [0.5, 0.5, 0.5, 0.5]

    Args:
        A: a linear function from x (B, ...) to (B, ...).
        y: an array of the shape of A(x).
        shape: the shape of x.

    Returns:
        A^T y, of that shape and the dtype of y.

    Raises:
        ValueError: for a y of another shape than A(x).
    """
    like = jax.ShapeDtypeStruct(tuple(shape), y.dtype)
    made = jax.eval_shape(A, like)
    if made.shape != y.shape:
        raise ValueError(f"A makes {made.shape} of x {tuple(shape)}, and y has shape {y.shape}; they must be the same")
    return jax.linear_transpose(A, like)(y.astype(made.dtype))[0]


def _keys(u):
    """Keys' cubic kernel with a = -1/2."""
    u = np.abs(u)
    near, far = (1.5 * u - 2.5) * u**2 + 1, ((-0.5 * u + 2.5) * u - 4) * u + 2
    return np.where(u < 1, near, np.where(u < 2, far, 0.0))


def _check_factor(name, sizes, factor):
    whole = isinstance(factor, (int, np.integer)) and factor >= 1
    if not whole or any(n % factor for n in sizes):
        raise ValueError(f"{name}: factor is a whole number that divides the sizes {tuple(sizes)}, got {factor}")
