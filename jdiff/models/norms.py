"""Normalisation, in float32 or wider whatever the dtype of the network."""

import functools
from collections.abc import Callable
from typing import Any

import flax.linen as nn
import jax.numpy as jnp
from jax import lax

from jdiff.models.cpu import recomputed
from jdiff.models.inits import scaled_init


class GroupNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) over the positions and channels of each group, then scale and bias.

    Args:
        groups: the largest number of groups.
        min_width: the smallest number of channels of a group.
        epsilon: what is added to the variance.
        dtype: of the output; None for that of the statistics, float32 or wider.
        activation: a function that is applied to the output, or None.

    Reference: Wu & He 2018, arXiv:1803.08494.
    """

    groups: int = 32
    min_width: int = 4
    epsilon: float = 1e-5
    dtype: Any = None
    activation: Callable | None = None

    @nn.compact
    def __call__(self, x, modulation=None):
        """Normalise x (B, ..., C); a `modulation` (scale, shift), both (B, C), makes y (1 + scale) + shift of it."""
        C = x.shape[-1]
        most = min(self.groups, max(C // self.min_width, 1))
        groups = max(g for g in range(1, most + 1) if C % g == 0)
        scale = self.param("scale", nn.initializers.ones_init(), (C,), jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), (C,), jnp.float32)

        @recomputed
        def norm(x, scale, bias, modulation):
            y = _wide(x)
            # sums over positions are fast while the channels stay apart: the groups are joined afterwards
            space = tuple(range(1, x.ndim - 1))

            def join(v):  # (B, C) -> the mean of each group at each of its channels
                v = v.reshape(x.shape[0], groups, C // groups)
                return jnp.broadcast_to(v.mean(-1, keepdims=True), v.shape).reshape(x.shape[0], C)

            mean = join(y.mean(space))
            y = y - _spread(mean, y)
            gain = lax.rsqrt(join(jnp.square(y).mean(space)) + self.epsilon) * scale.astype(y.dtype)[None]
            shift = jnp.broadcast_to(bias.astype(y.dtype)[None], gain.shape)
            if modulation is not None:  # one product and one sum over the whole signal, where `modulate` adds another
                scale_by, shift_by = (m.astype(y.dtype) for m in modulation)
                gain, shift = gain * (1 + scale_by), shift * (1 + scale_by) + shift_by
            y = y * _spread(gain, y) + _spread(shift, y)
            y = y if self.dtype is None else y.astype(self.dtype)
            return y if self.activation is None else self.activation(y)

        return norm(x, scale, bias, modulation)


class AdaptiveGroupNorm(nn.Module):
    """norm(x) (1 + scale) + shift, scale and shift being linear in silu(embedding).

    Args:
        groups: the largest number of groups.
        min_width: the smallest number of channels of a group.
        epsilon: what is added to the variance.
        kernel_init: the law of initial values of the dense layer, see `inits.scaled_init`.
        activation: a function that is applied to the output, or None.

    Reference: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
    """

    groups: int = 32
    min_width: int = 4
    epsilon: float = 1e-5
    kernel_init: str = "xavier"
    activation: Callable | None = None

    @nn.compact
    def __call__(self, x, embedding):
        """x: (B, ..., C), embedding: (B, E); returns an array like x."""
        dense = nn.Dense(2 * x.shape[-1], kernel_init=scaled_init(1.0, self.kernel_init), name="modulation")
        modulation = jnp.split(dense(nn.silu(embedding)), 2, axis=-1)
        norm = GroupNorm(self.groups, self.min_width, self.epsilon, activation=self.activation, name="norm")
        return norm(x, modulation)


class BatchNorm(nn.Module):
    """(x - mean) / sqrt(var + epsilon) scale + bias, with the mean and variance of each channel over the whole batch.

    In training the statistics are those of the batch, and the running averages r in the collection "batch_stats" become
    momentum r + (1 - momentum) batch, with the unbiased variance, as in PyTorch. Otherwise the statistics are the
    running averages. Statistics are float32 or wider.

    Args:
        momentum: the weight of the old running average.
        epsilon: what is added to the variance.
        axis_name: of the devices whose batches count as one, under pmap and shard_map: the norm is then synchronised.
            Under jit with shardings the batch is one array, and no name is needed.
        scale_init: initial values of the scale.
        dtype: of the output; None for that of the statistics.

    Reference: Ioffe & Szegedy 2015, arXiv:1502.03167.
    """

    momentum: float = 0.9
    epsilon: float = 1e-5
    axis_name: str | None = None
    scale_init: Callable = nn.initializers.ones_init()
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """Normalise x (B, ..., C). Raises ValueError in training on a single value per channel."""
        C = x.shape[-1:]
        scale = self.param("scale", self.scale_init, C, jnp.float32)
        bias = self.param("bias", nn.initializers.zeros_init(), C, jnp.float32)
        running_mean = self.variable("batch_stats", "mean", jnp.zeros, C, jnp.float32)
        running_var = self.variable("batch_stats", "var", jnp.ones, C, jnp.float32)
        y = _wide(x)
        if train and not self.is_initializing():
            count = x.size // x.shape[-1] * (1 if self.axis_name is None else lax.axis_size(self.axis_name))
            if count < 2:
                raise ValueError(f"BatchNorm: the variance of one value per channel is not defined, got {x.shape}")
            mean, var = self._statistics(y)
            averages = ((running_mean, mean), (running_var, var * (count / (count - 1))))
            for running, batch in averages:
                old = running.value
                running.value = (self.momentum * old + (1 - self.momentum) * batch).astype(old.dtype)
        else:
            mean, var = running_mean.value.astype(y.dtype), running_var.value.astype(y.dtype)
        gain = lax.rsqrt(var + self.epsilon) * scale.astype(y.dtype)
        y = (y - _lead(mean, y)) * _lead(gain, y) + _lead(bias.astype(y.dtype), y)
        return y if self.dtype is None else y.astype(self.dtype)

    def _statistics(self, y):
        """Mean and variance over the batch and the devices.

        The variance is the mean of squared deviations: a difference of mean squares would lose digits.
        """
        axes = tuple(range(y.ndim - 1))
        mean = y.mean(axes)
        if self.axis_name is None:
            return mean, jnp.square(y - _lead(mean, y)).mean(axes)
        mean = lax.pmean(mean, self.axis_name)
        return mean, lax.pmean(jnp.square(y - _lead(mean, y)).mean(axes), self.axis_name)


@functools.partial(recomputed, static_argnums=(1, 2))
def standardize(x, axes, epsilon: float):
    """(x - mean) / sqrt(var + epsilon) over `axes`, in float32 or wider, for x of any shape."""
    y = _wide(x)
    y = y - y.mean(axes, keepdims=True)
    return y * lax.rsqrt(jnp.square(y).mean(axes, keepdims=True) + epsilon)


def modulate(y, scale, shift):
    """y (1 + scale) + shift for y (B, ..., C) with scale and shift (B, C)."""
    return y * (1 + _spread(scale, y)) + _spread(shift, y)


def _wide(x):
    return x.astype(jnp.promote_types(x.dtype, jnp.float32))


def _spread(v, like):
    """(B, C) -> (B, 1, ..., 1, C), of the rank of `like`."""
    return v.reshape(v.shape[0], *(1,) * (like.ndim - 2), v.shape[1])


def _lead(vector, like):
    """(C,) -> (1, ..., 1, C), of the rank of `like`."""
    return vector.reshape(*(1,) * (like.ndim - 1), -1)
