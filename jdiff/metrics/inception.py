"""The features of InceptionV3 in which image models are compared: those of the Frechet inception distance."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.models.inception import InceptionV3


@dataclasses.dataclass(frozen=True)
class Inception:
    """InceptionV3 with its variables, for images of any size.

    `Inception(*jdiff.convert.load(path, "inception"))` reads a local file of weights.

    Args:
        model: the network.
        variables: its variables.
        antialias: whether images are blurred before they are made smaller. pytorch-fid does not; images that are made
            larger, as those of CIFAR-10, are the same either way.
    """

    model: InceptionV3
    variables: Any
    antialias: bool = False

    def look(self, images: np.ndarray, batch: int = 50) -> tuple[np.ndarray, np.ndarray]:
        """Features and class probabilities.

        Args:
            images: uint8 (N, H, W, 3), or (N, H, W, 1), which are grey.
            batch: how many images the network gets at once.

        Returns:
            (features (N, 2048), probabilities (N, classes)); the latter without the bias of the last layer, as the
            Inception score is computed.

        Raises:
            ValueError: for images of another shape or dtype.
        """
        images = np.asarray(images)
        if images.dtype != np.uint8 or images.ndim != 4 or images.shape[-1] not in (1, 3) or not images.size:
            raise ValueError(f"Inception: images are {images.dtype}{images.shape}; expected uint8 (N, H, W, 1 or 3)")
        found = []
        for first in range(0, len(images), batch):
            part = images[first : first + batch]
            whole = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), np.uint8)])
            out = _look(self.model, self.antialias, self.variables, whole)
            found.append([np.asarray(a)[: len(part)] for a in out])
        features, probabilities = zip(*found, strict=True)
        return np.concatenate(features), np.concatenate(probabilities)


def _run(model, antialias, variables, images):
    x = jnp.broadcast_to(images, (*images.shape[:-1], 3)).astype(jnp.float32) / 127.5 - 1
    size = (len(x), 299, 299, 3)
    x = jax.image.resize(x, size, "bilinear", antialias=antialias)
    features = model.apply(variables, x, method="features")
    return features, jax.nn.softmax(features @ variables["params"]["fc"]["kernel"])


_look = jax.jit(_run, static_argnums=(0, 1))
