"""Embeddings of the noise label and of class labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp


def sinusoidal(label: jax.Array, features: int, max_period: float = 10_000.0) -> jax.Array:
    """[cos(label w_j), sin(label w_j)], w_j from 1 down to 1/max_period geometrically; (B,) -> (B, features).

    Vaswani et al. 2017, arXiv:1706.03762, section 3.5. `features` must be even.
    """
    if features % 2:
        raise ValueError(f"sinusoidal: features must be even, got {features}")
    half = features // 2
    w = jnp.exp(-jnp.log(max_period) * jnp.arange(half, dtype=jnp.float32) / half)
    angles = label.astype(jnp.float32)[:, None] * w[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class NoiseEmbedding(nn.Module):
    """The noise label through sinusoids and two dense layers, (B,) -> (B, features).

    `label_scale` brings the label to the range of the sinusoids, hundreds of radians: 200 for the log-SNR labels of
    about -2.5 to 2.5, 1 for table indices 0 to 999.
    """

    features: int
    label_scale: float = 200.0

    @nn.compact
    def __call__(self, label):
        x = sinusoidal(label * self.label_scale, self.features // 4 * 2)
        x = nn.silu(nn.Dense(self.features, name="hidden")(x))
        return nn.Dense(self.features, name="out")(x)


class ClassEmbedding(nn.Module):
    """A learned vector per class and one for "no class", which is row `num_classes`; (B,) -> (B, features)."""

    num_classes: int
    features: int

    @nn.compact
    def __call__(self, cond, batch: int):
        """`cond`: labels (B,) in 0..num_classes, or None, which is the null class for all."""
        if cond is None:
            cond = jnp.full((batch,), self.num_classes)
        if cond.shape != (batch,) or not jnp.issubdtype(cond.dtype, jnp.integer):
            raise ValueError(f"class labels are {cond.dtype}{cond.shape}; expected integers ({batch},)")
        init = nn.initializers.normal(1.0)
        return nn.Embed(self.num_classes + 1, self.features, embedding_init=init, name="table")(cond)


def check_unconditional(cond) -> None:
    """Raise ValueError when a model without classes is given labels."""
    if cond is not None:
        raise ValueError("this model has no classes (num_classes=0), but labels were given; pass cond=None")
