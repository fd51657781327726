"""Embeddings of the noise label and of class labels."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

from jdiff.models.inits import scaled_init


def as_float(label) -> jax.Array:
    """The label as an array of float32, or of float64 if it is one."""
    label = jnp.asarray(label)
    return label.astype(jnp.promote_types(label.dtype, jnp.float32))


def sinusoidal(label: jax.Array, features: int, max_period: float = 10_000.0, endpoint: bool = False) -> jax.Array:
    """[cos(label w_j), sin(label w_j)], the frequencies w_j falling geometrically from 1 to 1/max_period.

    Args:
        label: noise labels, (B,).
        features: the length of the vectors; an even number.
        max_period: the inverse of the lowest frequency.
        endpoint: whether the last frequency is 1/max_period itself, as in DDPM, or one step short of it, as in ADM.

    Returns:
        (B, features), in float32 or wider.

    Raises:
        ValueError: for an odd number of features, or too few.

    Reference: Vaswani et al. 2017, arXiv:1706.03762, section 3.5.
    """
    half = features // 2
    if features % 2 or half <= endpoint:
        raise ValueError(f"sinusoidal: features must be even{' and at least 4' * endpoint}, got {features}")
    label = as_float(label)
    # in double precision on the host: an error of 1e-7 in w is one of 1e-4 in the angle of label 999
    w = jnp.asarray(np.exp(-np.log(max_period) * np.arange(half) / (half - endpoint)), label.dtype)
    angles = label[:, None] * w[None]
    return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class FourierFeatures(nn.Module):
    """[cos(2 pi label w_j), sin(2 pi label w_j)] with fixed random frequencies w_j ~ N(0, scale²).

    Args:
        features: the length of the vectors.
        scale: the standard deviation of the frequencies.

    Reference: Tancik et al. 2020, arXiv:2006.10739; for noise levels, Song et al. 2021, arXiv:2011.13456, appendix H.
    """

    features: int
    scale: float = 16.0

    @nn.compact
    def __call__(self, label):
        """label: (B,); returns (B, features)."""
        label = as_float(label)
        # a parameter that no gradient reaches: checkpoints, averages and shardings then treat it as any other
        w = self.param("frequencies", nn.initializers.normal(self.scale), (self.features // 2,), jnp.float32)
        angles = 2 * jnp.pi * label[:, None] * jax.lax.stop_gradient(w).astype(label.dtype)[None]
        return jnp.concatenate([jnp.cos(angles), jnp.sin(angles)], axis=-1)


class NoiseEmbedding(nn.Module):
    """The noise label through sinusoids and two dense layers.

    Args:
        features: the length of the embedding.
        label_scale: what the label is multiplied by, to reach the range of the sinusoids, hundreds of radians: 200 for
            log-SNR labels of about -2.5 to 2.5, 1 for table indices 0 to 999.
        waves: the number of sinusoids; None for half as many as features.
        endpoint: see `sinusoidal`.
        fourier: the standard deviation of random frequencies; 0 for those of `sinusoidal`.
        kernel_init: the law of initial kernels, see `inits.scaled_init`.
    """

    features: int
    label_scale: float = 200.0
    waves: int | None = None
    endpoint: bool = False
    fourier: float = 0.0
    kernel_init: str = "xavier"

    @nn.compact
    def __call__(self, label, beside=None):
        """label: (B,); beside: (B, waves), added to the sinusoids, or None; returns (B, features)."""
        waves = self.features // 4 * 2 if self.waves is None else self.waves
        label = label * self.label_scale
        if self.fourier:
            x = FourierFeatures(waves, self.fourier, name="fourier")(label)
        else:
            x = sinusoidal(label, waves, endpoint=self.endpoint)
        init = scaled_init(1.0, self.kernel_init)
        x = x if beside is None else x + beside
        x = nn.silu(nn.Dense(self.features, kernel_init=init, name="hidden")(x))
        return nn.Dense(self.features, kernel_init=init, name="out")(x)


class ClassEmbedding(nn.Module):
    """A learned vector for each class, and one for "no class", which is row `num_classes`.

    Args:
        num_classes: the number of classes.
        features: the length of the vectors.
        std: the standard deviation of their initial values.
        null: whether there is a row for "no class"; if not, labels are 0..num_classes - 1 and must be given.
    """

    num_classes: int
    features: int
    std: float = 1.0
    null: bool = True

    @nn.compact
    def __call__(self, cond, batch: int):
        """cond: labels (B,) in 0..num_classes, or None, which is "no class" for all; returns (B, features)."""
        if cond is None and not self.null:
            raise ValueError(f"this model has {self.num_classes} classes and none for no class; pass labels (B,)")
        rows = self.num_classes + self.null
        cond = check_index("class labels", class_labels(cond, self.num_classes, batch), rows, (batch,))
        table = nn.Embed(rows, self.features, embedding_init=nn.initializers.normal(self.std), name="table")
        return nan_outside(cond, rows, table(cond))


def class_labels(cond, num_classes: int, batch: int):
    """The class labels as they are given; for None, "no class", which is num_classes, for all of (batch,)."""
    return jnp.full((batch,), num_classes, jnp.int32) if cond is None else cond


def check_index(name: str, index, size: int, shape: tuple[int, ...]) -> jax.Array:
    """Check indices of a table, and make them an array of integers of at least 32 bits.

    Args:
        name: what they are, for the message.
        index: the indices.
        size: the rows of the table.
        shape: the shape that the indices must have.

    Returns:
        The indices as an array.

    Raises:
        ValueError: for another shape or dtype, and for values outside 0..size - 1. The values of traced arrays are not
            known: see `nan_outside`.
    """
    index = index if isinstance(index, jax.Array) else np.asarray(index)
    if index.shape != shape or not jnp.issubdtype(index.dtype, jnp.integer):
        raise ValueError(f"{name} are {index.dtype}{index.shape}; expected integers {shape}")
    check_inside(name, index, size)
    index = jnp.asarray(index)
    # Flax looks rows up in the dtype of the index: in 8 bits, class 300 of a table would be class 44
    return index if jnp.iinfo(index.dtype).bits >= 32 else index.astype(jnp.int32)


def check_inside(name: str, index, size: int) -> None:
    """Raise ValueError if numbers that are known, which those of traced arrays are not, lie outside 0..size - 1."""
    if isinstance(index, jax.core.Tracer) or (isinstance(index, jax.Array) and not index.is_fully_addressable):
        return
    known = np.asarray(index)
    outside = known[~((known >= 0) & (known < size))]
    if outside.size:
        raise ValueError(f"{name} must be in 0..{size - 1}, got {outside[0]}")


def nan_outside(index, size: int, rows) -> jax.Array:
    """The rows that were looked up in a table, with nan for those whose index lies outside 0..size - 1.

    JAX itself takes the nearest row, or counts from the end, and gives another class without a word.

    Args:
        index: the indices.
        size: the rows of the table.
        rows: what was looked up, (*index.shape, ...).

    Returns:
        An array like `rows`.
    """
    inside = (index >= 0) & (index < size)
    return jnp.where(inside.reshape(*inside.shape, *(1,) * (rows.ndim - inside.ndim)), rows, jnp.nan)


def check_label(label, batch: int) -> None:
    """Raise ValueError unless there is one noise label for each sample."""
    if label is None or jnp.shape(label) != (batch,):
        found = "None" if label is None else jnp.shape(label)
        raise ValueError(f"a noise label is one number for each sample, ({batch},); got {found}")


def check_unconditional(cond) -> None:
    """Raise ValueError when a model without classes is given labels."""
    if cond is not None:
        raise ValueError("this model has no classes (num_classes=0), but labels were given; pass cond=None")
