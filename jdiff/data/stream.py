"""A source that can only be read forwards: its position is saved, since no step tells it."""

import dataclasses
import json
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import jax
import numpy as np

from jdiff.data import fingerprint
from jdiff.data.dataset import Batches, DataError, moments, names_of_classes, to_data, to_model
from jdiff.data.order import own_rows


@dataclasses.dataclass(frozen=True)
class Stream:
    """A data set that can only be read forwards: an endless stream of single samples.

    Every process reads the whole stream, so the saved position is the same in all of them, whatever their number.

    Args:
        name: its name.
        make: `(seed) -> grain.IterDataset`, the stream.
        shape: the shape of a sample; images (H, W, C) are uint8, all else is float32.
        size: the samples of an epoch, for reports.
        classes: the number of classes, 0 for none.
        decode: `(element) -> (x, label)`, label being None without classes. It is called only for the rows that a
            process keeps, so work belongs there. Without it, elements are such pairs, or x alone.
        held_x, held_labels: the held-out samples and their classes; None for no samples.
        class_names: the names of the classes; () for their numbers.
    """

    name: str
    make: Callable[[int], Any]
    shape: tuple[int, ...]
    size: int
    classes: int = 0
    decode: Callable[[Any], tuple[Any, Any]] | None = None
    held_x: np.ndarray | None = None
    held_labels: np.ndarray | None = None
    class_names: tuple[str, ...] = ()

    in_memory = False

    def __post_init__(self):
        object.__setattr__(self, "class_names", names_of_classes(self.name, self.class_names, self.classes))
        if self.held_x is None:
            object.__setattr__(self, "held_x", np.zeros((0, *self.shape), self._dtype))
            object.__setattr__(self, "held_labels", np.zeros(0, np.int32) if self.classes else None)

    @property
    def is_image(self) -> bool:
        """Whether samples are images (H, W, C)."""
        return len(self.shape) == 3

    @property
    def _dtype(self):
        return np.uint8 if self.is_image else np.float32

    def to_model(self, x) -> jax.Array:
        """Stored numbers as the model sees them, float32; it runs on the device and under jit."""
        return to_model(x, self.is_image)

    def to_data(self, x) -> np.ndarray:
        """The model's numbers as they are stored: images clipped and rounded to uint8, points float32."""
        return to_data(x, self.is_image)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the first 4,096 samples of seed 0, in the model's numbers."""
        chunk = next(self.read(0, 64, [(0, 64)]))
        return moments(chunk.x.reshape(-1, *self.shape), self.is_image)

    def fingerprint(self) -> str:
        """A word for the size, the shape and the classes: no sample is read, which could fill a buffer."""
        return fingerprint.digest(["stream", self.size, *self.shape, *self.class_names])

    def read(
        self, seed: int, batch: int, visits: Iterable[tuple[int, int]], rows: slice = slice(None), state: Any = None
    ) -> Iterator[Batches]:
        """Read batches as `Dataset.read` does; the state of each chunk is the position after its last batch.

        Without `state`, the batches before the first one asked for are read and thrown away.

        Args:
            seed, batch, visits, rows: as in `Dataset.read`.
            state: the state of the chunk after which reading goes on.

        Raises:
            DataError: the stream ends, a sample is not of `shape`, or `state` belongs to another position.
        """
        kept_rows, iterator, position = set(own_rows(rows, batch)), iter(self.make(seed)), 0
        if state is not None:
            position = state["batch"]
            iterator.set_state(state["iterator"])
        try:
            for start, count in visits:
                if start < position or (state is not None and start != position):
                    raise DataError(f"{self.name}: batch {start} was asked for, but its stream is at batch {position}")
                self._next_samples(iterator, (start - position) * batch, ())
                samples = self._next_samples(iterator, count * batch, kept_rows, batch)
                x, labels = zip(*samples, strict=True)
                position = start + count
                yield Batches(
                    np.stack(x).reshape(count, len(kept_rows), *self.shape),
                    np.array(labels, np.int32).reshape(count, len(kept_rows)) if self.classes else None,
                    dict(batch=position, iterator=_plain(iterator.get_state())),
                )
        finally:
            iterator.close()

    def _next_samples(self, iterator, n: int, kept_rows, batch: int = 1) -> list:
        """Of the next n samples, those in the rows `kept_rows` of their batch."""
        kept = []
        for i in range(n):
            try:
                element = next(iterator)
            except StopIteration:
                raise DataError(f"{self.name}: the stream ended; make it endless, as with .repeat()") from None
            if i % batch in kept_rows:
                kept.append(self._sample(element))
        return kept

    def _sample(self, element) -> tuple[np.ndarray, Any]:
        if self.decode is not None:
            element = self.decode(element)
        x, label = element if isinstance(element, tuple) else (element, None)
        x = np.asarray(x)
        if x.shape != tuple(self.shape) or (self.is_image and x.dtype != np.uint8):
            raise DataError(
                f"{self.name}: a sample is {x.dtype} {x.shape}; expected {self._dtype.__name__} {self.shape}"
            )
        if (label is None) == bool(self.classes):
            raise DataError(f"{self.name}: label {label!r} of a set of {self.classes} classes")
        return x.astype(self._dtype, copy=False), label


def _plain(state):
    """The state as it is after a round trip through JSON, sharing nothing with the iterator."""
    try:
        return json.loads(json.dumps(state))
    except TypeError as error:
        raise DataError(f"the state of a stream must be plain JSON to be saved: {error}") from error
