"""Convolutions in one, two or three dimensions whose gradients stay fast inside loops on the CPU.

XLA:CPU brings convolutions into its fast form only in the entry computation of a program. Inside `lax.scan` or
`fori_loop` the gradients that JAX derives fall to a naive loop, 13 times slower for a small UNet. Here the derivative
is stated in layouts whose transposes are again plain convolutions of the fast form. The values are the same; on
GPU and TPU, where there is no such trap, JAX's own rule is used.
"""

import functools
from collections.abc import Sequence
from typing import Any

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jdiff.models.inits import scaled_init

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
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_layout("N_C", "_IO", "N_C", x))


def _conv_cpu_jvp(strides, padding, primals, tangents):
    (x, kernel), (dx, dk) = primals, tangents
    run = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding)
    space = tuple(range(1, x.ndim - 1))
    last = x.ndim - 1
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(run(dx, jnp.swapaxes(kernel, -1, -2), dimension_numbers=_layout("N_C", "_OI", "N_C", x)))
    if not isinstance(dk, SymbolicZero):
        dk = jnp.moveaxis(dk, -2, 0)  # (I, *widths, O)
        out = run(x.transpose(last, *space, 0), dk, dimension_numbers=_layout("C_N", "I_O", "_NC", x))
        terms.append(jnp.moveaxis(out, -2, 0))
    y = _conv_cpu(x, kernel, strides, padding)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


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
            flat = kernel.reshape(kernel.shape[-2:])  # a matrix product is XLA:CPU's fastest
            out = lax.dot_general(x, flat, (((x.ndim - 1,), (0,)), ((), ())))
        else:
            pad = (self.kernel - 1) // 2
            ends = (pad, self.kernel - 1 - pad) if self.padding is None else self.padding
            out = conv(x, kernel, (self.stride,) * dims, (ends,) * dims)
        return out if bias is None else out + bias.reshape((1,) * (x.ndim - 1) + (-1,))
