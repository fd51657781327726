"""Convolutions whose gradients stay fast inside loops on the CPU.

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

LAYOUT = ("NHWC", "HWIO", "NHWC")


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> jax.Array:
    """The convolution of x (B, H, W, C) with kernel (h, w, C, D), (B, H', W', D)."""
    strides, padding = tuple(strides), tuple(tuple(p) for p in padding)
    if jax.default_backend() == "cpu":
        return _conv_cpu(x, kernel, strides, padding)
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv_cpu(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=LAYOUT)


def _conv_cpu_jvp(strides, padding, primals, tangents):
    (x, kernel), (dx, dk) = primals, tangents
    run = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding)
    terms = []
    if not isinstance(dx, SymbolicZero):
        terms.append(run(dx, kernel.transpose(0, 1, 3, 2), dimension_numbers=("NHWC", "HWOI", "NHWC")))
    if not isinstance(dk, SymbolicZero):
        out = run(x.transpose(3, 1, 2, 0), dk.transpose(2, 0, 1, 3), dimension_numbers=("CHWN", "IHWO", "HWNC"))
        terms.append(out.transpose(2, 0, 1, 3))
    y = _conv_cpu(x, kernel, strides, padding)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


_conv_cpu.defjvp(_conv_cpu_jvp, symbolic_zeros=True)


class Conv(nn.Module):
    """A 2-D convolution with bias; SAME-sized output at stride 1, half-sized at stride 2 (padding (k - 1) // 2)."""

    features: int
    kernel: int = 3
    stride: int = 1
    scale: float = 1.0
    dtype: Any = None

    @nn.compact
    def __call__(self, x):
        """(B, H, W, C) -> (B, H / stride, W / stride, features); `scale` 0 starts the layer at zero."""
        shape = (self.kernel, self.kernel, x.shape[-1], self.features)
        kernel = self.param("kernel", scaled_init(self.scale), shape, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (self.features,), jnp.float32)
        x, kernel, bias = nn.dtypes.promote_dtype(x, kernel, bias, dtype=self.dtype)
        if self.kernel == 1 and self.stride == 1:
            out = lax.dot_general(x, kernel[0, 0], (((3,), (0,)), ((), ())))  # a matrix product is XLA:CPU's fastest
        else:
            pad = (self.kernel - 1) // 2
            ends = (pad, self.kernel - 1 - pad)
            out = conv(x, kernel, (self.stride, self.stride), (ends, ends))
        return out + bias[None, None, None]


def scaled_init(scale: float):
    """Variance scaling, fan-average and uniform, times `scale`; zeros for 0.  Ho et al. 2020, arXiv:2006.11239."""
    if scale == 0:
        return nn.initializers.zeros_init()
    return nn.initializers.variance_scaling(scale, "fan_avg", "uniform")
