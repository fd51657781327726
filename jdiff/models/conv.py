"""The layer of convolutions, in one, two or three dimensions."""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from jdiff.models.cpu import conv, pointwise
from jdiff.models.inits import scaled_init

__all__ = ["Conv", "conv"]


class Conv(nn.Module):
    """A convolution in as many dimensions as x has; it keeps the size at stride 1 and halves it at stride 2.

    Args:
        features: the channels of the output.
        kernel: the width of the kernel in each dimension.
        stride: the stride in each dimension.
        scale: times the variance of the kernel's initial values; 0 starts the layer at zero.
        dtype: of the computation, that of x and the parameters by default. Parameters are float32.
        padding: the zeros before and after each dimension; by default (kernel - 1) // 2 before, the rest after.
        use_bias: whether a bias is added.
        kernel_init: the law of initial values, see `inits.scaled_init`.
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
        before = (self.kernel - 1) // 2
        ends = (before, self.kernel - 1 - before) if self.padding is None else self.padding
        if self.kernel == 1 and ends == (0, 0):
            strides = (1, *(self.stride,) * dims, 1)
            out = pointwise(lax.slice(x, (0,) * x.ndim, x.shape, strides) if self.stride > 1 else x, kernel)
        else:
            out = conv(x, kernel, (self.stride,) * dims, (ends,) * dims)
        return out if bias is None else out + bias.reshape((1,) * (x.ndim - 1) + (-1,))
