"""What a data set is."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set and a held-out set in memory, as stored: images uint8 (N, H, W, C), planes float32 (N, D).

    Labels are int32 (N,), or None. The model sees images scaled to [-1, 1], and planes as they are.
    """

    name: str
    x: np.ndarray
    labels: np.ndarray | None
    held_x: np.ndarray
    held_labels: np.ndarray | None
    classes: int = 0

    @property
    def is_image(self) -> bool:
        """Whether samples are images."""
        return self.x.dtype == np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.x.shape[1:]

    def to_model(self, x) -> jax.Array:
        """Stored numbers to the model's, float32: images from 0..255 to [-1, 1]; on the device, also under jit."""
        return jnp.asarray(x, jnp.float32) / 127.5 - 1 if self.is_image else jnp.asarray(x, jnp.float32)

    def to_data(self, x) -> np.ndarray:
        """The model's numbers to stored ones: images clipped and rounded to uint8, planes float32."""
        x = np.asarray(x, np.float32)
        return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8) if self.is_image else x

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the training set in the model's numbers, each of the shape of one sample."""
        x = np.asarray(self.to_model(self.x), np.float64)
        return x.mean(0).astype(np.float32), x.std(0).astype(np.float32)
