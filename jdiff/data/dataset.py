"""Data sets in memory, and what all kinds of data sets share: batches, errors, the numbers of the model."""

import dataclasses
from collections.abc import Iterable, Iterator
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.foreign import one_line
from jdiff.data import fingerprint
from jdiff.data.order import batch_indices, own_rows, spread


class DataError(ValueError):
    """Data cannot be read as asked; the message is one line that says what is wrong, and what to do."""

    def __init__(self, message: str):
        super().__init__(one_line(message))


class DataWarning(UserWarning):
    """Something about data that their user should know; the message is one line."""


class Batches(NamedTuple):
    """Consecutive batches, as they are stored.

    Args:
        x: samples (count, rows, ...).
        labels: classes (count, rows) int32, or None.
        state: the position after the last batch, as JSON can hold it, if the source needs one to go on; else None.
    """

    x: np.ndarray
    labels: np.ndarray | None
    state: Any = None


@dataclasses.dataclass(frozen=True)
class Dataset:
    """A training set and a held-out set in memory.

    The model sees images scaled to [-1, 1], and points as they are.

    Args:
        name: its name.
        x: the training samples: images uint8 (N, H, W, C), or points float32 (N, D).
        labels: their classes int32 (N,), or None.
        held_x: the held-out samples, of the same kind.
        held_labels: their classes, or None.
        classes: the number of classes, 0 for none.
        class_names: their names; () for their numbers.
    """

    name: str
    x: np.ndarray
    labels: np.ndarray | None
    held_x: np.ndarray
    held_labels: np.ndarray | None
    classes: int = 0
    class_names: tuple[str, ...] = ()

    in_memory = True

    def __post_init__(self):
        object.__setattr__(self, "class_names", names_of_classes(self.name, self.class_names, self.classes))

    @property
    def is_image(self) -> bool:
        """Whether samples are images."""
        return self.x.dtype == np.uint8

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape of one sample."""
        return self.x.shape[1:]

    @property
    def size(self) -> int:
        """The number of training samples."""
        return len(self.x)

    def to_model(self, x) -> jax.Array:
        """Stored numbers as the model sees them, float32; it runs on the device and under jit."""
        return to_model(x, self.is_image)

    def to_data(self, x) -> np.ndarray:
        """The model's numbers as they are stored: images clipped and rounded to uint8, points float32."""
        return to_data(x, self.is_image)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the training set in the model's numbers, each of the shape of one sample."""
        return moments(self.x, self.is_image)

    def fingerprint(self) -> str:
        """A word that other data do not have: of the size, all labels, and 64 samples."""
        looked_at = np.asarray(self.x[spread(self.size, fingerprint.LOOKED_AT)])
        return fingerprint.digest(["arrays", self.size, self.classes, looked_at, self.labels])

    def read(
        self, seed: int, batch: int, visits: Iterable[tuple[int, int]], rows: slice = slice(None), state: Any = None
    ) -> Iterator[Batches]:
        """Read batches of the endless shuffled stream; batch k is a function of (seed, batch, k) alone.

        Args:
            seed: the seed of the order.
            batch: the samples of a global batch.
            visits: pairs (start, count); each yields batches start, ..., start + count - 1.
            rows: the slice of each batch that this process reads.
            state: the position that a stream was saved at; not used here.

        Raises:
            ValueError: there are fewer samples than a batch, or `rows` takes none.
        """
        del state  # the order is a function of the step
        own_rows(rows, batch)
        for start, count in visits:
            index = batch_indices(self.size, batch, seed, start, count)[:, rows]
            labels = None if self.labels is None else np.take(self.labels, index)
            yield Batches(np.take(self.x, index, axis=0), labels)


def names_of_classes(data: str, names: Iterable[str], classes: int) -> tuple[str, ...]:
    """The names of all classes: those given, or the numbers from 0 where none are.

    Args:
        data: the name of the data, for the message.
        names: the names, or none.
        classes: how many classes there are.

    Raises:
        ValueError: there are more or fewer names than classes, or two are the same.
    """
    names = tuple(map(str, names)) or tuple(map(str, range(classes)))
    if len(set(names)) != classes:
        raise ValueError(f"{data} has {classes} classes, and {len(set(names))} different names for them")
    return names


def to_model(x, is_image: bool) -> jax.Array:
    """Stored numbers as the model sees them, float32: images go from 0..255 to [-1, 1]."""
    return jnp.asarray(x, jnp.float32) / 127.5 - 1 if is_image else jnp.asarray(x, jnp.float32)


def to_data(x, is_image: bool) -> np.ndarray:
    """The model's numbers as they are stored: images clipped and rounded to uint8, points float32."""
    x = np.asarray(x, np.float32)
    return np.clip(np.rint((x + 1) * 127.5), 0, 255).astype(np.uint8) if is_image else x


def moments(x: np.ndarray, is_image: bool, chunk: int = 256) -> tuple[np.ndarray, np.ndarray]:
    """(mean, std) over the rows of stored samples, in the model's numbers; `chunk` rows are added at once."""
    # sums of 256 squared pixels stay below 2^24: exact in float32
    kind: np.dtype = np.dtype(np.float32 if is_image else np.float64)
    total, square = np.zeros(x.shape[1:]), np.zeros(x.shape[1:])
    middle = np.zeros((), kind) if is_image else np.mean(x, 0, dtype=kind)
    for first in range(0, len(x), chunk):
        part = x[first : first + chunk].astype(kind) - middle
        total += part.sum(0)
        square += (part * part).sum(0)
    mean = total / len(x)
    std = np.sqrt(np.maximum(square / len(x) - mean**2, 0))
    scale, shift = (127.5, -1.0) if is_image else (1.0, 0.0)
    return ((middle + mean) / scale + shift).astype(np.float32), (std / scale).astype(np.float32)
