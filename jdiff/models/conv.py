"""Convolutions in one, two or three dimensions whose gradients stay fast inside loops on the CPU.

XLA:CPU brings convolutions into its fast form only in the entry computation of a program. Inside `lax.scan` or
`fori_loop` the gradients that JAX derives fall to a naive loop, many times slower. Here the derivative
is stated in layouts whose transposes are again plain convolutions of the fast form, and that of the kernel, where it
can, in matrix products. The values are the same; on GPU and TPU, where there is no such trap, JAX's own rule is used.
"""

import functools
import math
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jdiff.models.inits import scaled_init
from jdiff.models.norms import recomputed
from jdiff.models.parts import map_parts, part_size

SPACE = "DHW"


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> jax.Array:
    """The convolution of x (B, *sizes, C) with kernel (*widths, C, D): (B, *sizes', D), in 1, 2 or 3 dimensions."""
    strides, padding = tuple(strides), tuple(tuple(p) for p in padding)
    if jax.default_backend() == "cpu":
        return _conv_cpu(x, kernel, strides, padding)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_layout("N_C", "_IO", "N_C", x))


def _layout(lhs: str, rhs: str, out: str, x) -> tuple[str, str, str]:
    space = SPACE[5 - x.ndim :]
    return lhs.replace("_", space), rhs.replace("_", space), out.replace("_", space)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv_cpu(x, kernel, strides, padding):
    layout = _layout("N_C", "_IO", "N_C", x)
    if not _widen(x, kernel, strides, padding):
        return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=layout)
    rows, (left, right) = padding
    out = lax.conv_general_dilated(x, kernel, strides, (rows, (left, right + 1)), dimension_numbers=layout)
    return lax.slice_in_dim(out, 0, x.shape[2], axis=2)


def _same(x, kernel, strides, padding) -> bool:
    """Whether this is a convolution of images with odd widths that keeps their size."""
    odd = all(w % 2 and p == (w // 2, w // 2) for p, w in zip(padding, kernel.shape[:-2], strict=True))
    return x.ndim == 4 and odd and set(strides) == {1}


def _widen(x, kernel, strides, padding) -> bool:
    """Whether to ask for one column more than needed.

    XLA:CPU (jaxlib 0.10) has two libraries for convolutions. The one it prefers leaves one of two cores idle below 128
    channels out, and is slow from 3 channels; it is not asked for images larger than those that came in.
    """
    return _same(x, kernel, strides, padding) and x.shape[2] >= 16 and max(kernel.shape[2:]) > 16


def _conv_cpu_jvp(strides, padding, primals, tangents):
    (x, kernel), (dx, dk) = primals, tangents
    run = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding)
    terms = []
    if not isinstance(dx, SymbolicZero):
        wide, turned = run, jnp.swapaxes(kernel, -1, -2)
        if _widen(x, kernel, strides, padding):  # the transpose, which is what runs, makes the column
            rows, (left, right) = padding
            wide = functools.partial(run, padding=(rows, (left, right - 1)))
            dx = jnp.pad(dx, ((0, 0), (0, 0), (0, 1), (0, 0)))
        terms.append(wide(dx, turned, dimension_numbers=_layout("N_C", "_OI", "N_C", x)))
    if not isinstance(dk, SymbolicZero):
        terms.append(_products(x, dk) if _same(x, kernel, strides, padding) else _by_conv(run, x, dk))
    y = _conv_cpu(x, kernel, strides, padding)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


def _by_conv(run, x, dk):
    """The convolution of x with dk in layouts whose transpose with respect to dk is one of the fast form."""
    space, last = tuple(range(1, x.ndim - 1)), x.ndim - 1
    dk = jnp.moveaxis(dk, -2, 0)  # (I, *widths, O)
    out = run(x.transpose(last, *space, 0), dk, dimension_numbers=_layout("C_N", "I_O", "_NC", x))
    return jnp.moveaxis(out, -2, 0)


def _products(x, dk):
    """The convolution of x (B, H, W, C) with dk (h, w, C, D), both odd widths, some images at a time.

    The rows that a pixel sees lie side by side on the left (h C), the columns on the right (w D): one matrix product,
    whose columns are then shifted and added. The transpose with respect to dk is one product of the same size, with
    everything in the cache: faster than XLA:CPU's convolution.
    """
    (B, H, W, C), (h, w, _, D) = x.shape, dk.shape
    size = part_size(B, 2**18 // (H * W * max(C, D)))
    # a copy for each device: their gradients are then added once, after the loop, not in each turn of it
    groups = math.gcd(size, jax.device_count())
    matrix = jnp.broadcast_to(dk.transpose(0, 2, 1, 3).reshape(h * C, w * D), (groups, h * C, w * D))

    @recomputed  # rows are h times x: made again, not kept
    def some(x, matrix):
        x = jnp.pad(x, ((0, 0), (h // 2, h // 2), (0, 0), (0, 0)))
        rows = jnp.concatenate([x[:, j : j + H] for j in range(h)], -1).reshape(groups, -1, h * C)
        columns = (rows @ matrix).reshape(size, H, W, w, D)
        columns = jnp.pad(columns, ((0, 0), (0, 0), (w // 2, w // 2), (0, 0), (0, 0)))
        return sum(columns[:, :, i : i + W, i] for i in range(w))

    return map_parts(lambda x: some(x, matrix), size, x)


_conv_cpu.defjvp(_conv_cpu_jvp, symbolic_zeros=True)


class Conv(nn.Module):
    """A convolution in as many dimensions as x has; SAME-sized at stride 1, half-sized at stride 2.

    `padding` is that of both ends of each dimension, (k - 1) // 2 where not given; `scale` 0 starts the layer at zero.
    """

    features: int
    kernel: int = 3
    stride: int = 1
    scale: float = 1.0
    dtype: Any = None
    padding: tuple[int, int] | None = None
    use_bias: bool = True
    kernel_init: str = "xavier"

    @nn.compact
    def __call__(self, x):
        """(B, *sizes, C) -> (B, *sizes / stride, features)."""
        dims = x.ndim - 2
        shape = (self.kernel,) * dims + (x.shape[-1], self.features)
        kernel = self.param("kernel", scaled_init(self.scale, self.kernel_init), shape, jnp.float32)
        bias = None
        if self.use_bias:
            bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.kernel == 1 and self.stride == 1:
            # a product of two matrices is XLA:CPU's fastest form, and its gradient's
            out = (x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])).reshape(*x.shape[:-1], -1)
        else:
            pad = (self.kernel - 1) // 2
            ends = (pad, self.kernel - 1 - pad) if self.padding is None else self.padding
            out = conv(x, kernel, (self.stride,) * dims, (ends,) * dims)
        return out if bias is None else out + bias.reshape((1,) * (x.ndim - 1) + (-1,))
