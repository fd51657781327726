"""Networks for points of the plane and rows of a table, (B, D)."""

import flax.linen as nn
import jax.numpy as jnp

from jdiff.models.embed import (
    ClassEmbedding,
    NoiseEmbedding,
    as_float,
    check_inside,
    check_label,
    check_unconditional,
    nan_outside,
)
from jdiff.models.registry import register_model


class StepMLP(nn.Module):
    """Dense layers with a learned embedding of the step added at each: the tutorials' network for points of a plane.

    h_{l+1} = relu(W_l h_l + e_l[k]), where k = 0..steps - 1 is the noise label (see `jdiff.conditioning.Index`).

    Args:
        steps: the number of noise labels.
        features: the width of the layers.
        layers: their number.
        num_classes: 0 for an unconditional network; else `cond` holds labels in 0..num_classes, num_classes (or None)
            being "no class".
    """

    steps: int = 100
    features: int = 128
    layers: int = 3
    num_classes: int = 0

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False):
        """x: (B, D); label: (B,), whole numbers in 0..steps - 1; cond: (B,) or None; returns (B, D)."""
        del train  # no dropout
        _check_points(x, label)
        k = jnp.round(as_float(label))
        check_inside("noise labels", k, self.steps)
        h = x
        for i in range(self.layers):
            h = nn.Dense(self.features, name=f"dense_{i}")(h)
            step = nn.Embed(self.steps, self.features, name=f"step_{i}")(k.astype(jnp.int32))
            h = h + nan_outside(k, self.steps, step)
            if self.num_classes:
                h = h + ClassEmbedding(self.num_classes, self.features, name=f"class_{i}")(cond, x.shape[0])
            else:
                check_unconditional(cond)
            h = nn.relu(h)
        return nn.Dense(x.shape[-1], name="out")(h)


class MLP(nn.Module):
    """A residual MLP, h <- h + W_2 silu(W_1 norm(h) + embedding), for any noise label; its output starts at 0.

    Args:
        features: the width of the layers.
        layers: the number of residual layers.
        num_classes: 0 for an unconditional network; else `cond` holds labels in 0..num_classes, num_classes (or None)
            being "no class".
        dropout: the rate of dropout, in training.
        label_scale: see `embed.NoiseEmbedding`.
    """

    features: int = 128
    layers: int = 3
    num_classes: int = 0
    dropout: float = 0.0
    label_scale: float = 200.0

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False):
        """x: (B, D); label: (B,); cond: class labels (B,) or None; returns (B, D)."""
        _check_points(x, label)
        embedding = NoiseEmbedding(self.features, self.label_scale, name="noise")(label)
        if self.num_classes:
            embedding = embedding + ClassEmbedding(self.num_classes, self.features, name="class")(cond, x.shape[0])
        else:
            check_unconditional(cond)
        embedding = nn.silu(embedding)
        h = nn.Dense(self.features, name="in")(x)
        for i in range(self.layers):
            y = nn.Dense(self.features, name=f"up_{i}")(nn.LayerNorm(name=f"norm_{i}")(h))
            y = nn.silu(y + nn.Dense(self.features, name=f"embed_{i}")(embedding))
            y = nn.Dropout(self.dropout, deterministic=not train)(y)
            h = h + nn.Dense(self.features, name=f"down_{i}")(y)
        return nn.Dense(x.shape[-1], kernel_init=nn.initializers.zeros_init(), name="out")(nn.silu(h))


def _check_points(x, label) -> None:
    if x.ndim != 2:
        raise ValueError(f"an MLP takes points (B, D), got {x.shape}; for images use a unet")
    check_label(label, x.shape[0])


@register_model
def mlp(**overrides):
    """A residual MLP of 3 layers of 128 with log-SNR features."""
    return MLP(**overrides)


@register_model
def mlp_step(**overrides):
    """The tutorials' MLP: 3 ReLU layers of 128, each with a learned embedding of the step (100 steps)."""
    return StepMLP(**overrides)
