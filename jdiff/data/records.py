"""Data sets that are decoded as they are read, in the same order as data sets in memory."""

import dataclasses
import functools
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import jax
import numpy as np

from jdiff.core.extras import needs
from jdiff.data import fingerprint
from jdiff.data.dataset import Batches, DataError, Dataset, moments, names_of_classes, to_data, to_model
from jdiff.data.order import batch_indices, own_rows, spread

Take = Callable[[np.ndarray], tuple[np.ndarray, np.ndarray | None]]
CACHE = 2**30  # a training set of at most so many bytes is kept in memory, unless told otherwise
HELD = 10_000  # at most so many held-out samples are kept in memory


@dataclasses.dataclass(frozen=True)
class Records:
    """A set of images that are decoded on demand; reading it needs grain.

    Args:
        name: its name.
        size: the number of training samples.
        shape: the shape of a sample, (H, W, C).
        take: `rows (n,) -> (x (n, H, W, C) uint8, labels (n,) or None)`; several threads call it at once.
        held: makes the held-out (x, labels).
        classes: the number of classes, 0 for none.
        in_memory: decode all samples on first use and keep them.
        threads: how many threads decode.
        class_names: the names of the classes; () for their numbers.
        identify: makes the fingerprint of what is stored; without it, that of some decoded samples is made.
        original: (n, 2), the heights and widths of the images before they were cropped and resized, where it is known.
    """

    name: str
    size: int
    shape: tuple[int, ...]
    take: Take
    held: Callable[[], tuple[np.ndarray, np.ndarray | None]]
    classes: int = 0
    in_memory: bool = False
    threads: int = 4
    class_names: tuple[str, ...] = ()
    identify: Callable[[], str] | None = None
    original: np.ndarray | None = None

    is_image = True

    def __post_init__(self):
        object.__setattr__(self, "class_names", names_of_classes(self.name, self.class_names, self.classes))

    @functools.cached_property
    def stored(self) -> Dataset:
        """The whole training set, decoded.

        Raises:
            DataError: it is too large to be kept in memory.
        """
        if not self.in_memory:
            gib = self.size * np.prod(self.shape) / 2**30
            raise DataError(f"{self.name} takes {gib:.1f} GiB in memory, more than its cache; read it, or raise cache=")
        x, labels = decode(self.take, np.arange(self.size), self.shape, self.threads)
        none = None if labels is None else labels[:0]
        return Dataset(self.name, x, labels, x[:0], none, self.classes, self.class_names)

    @property
    def x(self) -> np.ndarray:
        """All training samples, (N, H, W, C) uint8, where the set is kept in memory."""
        return self.stored.x

    @property
    def labels(self) -> np.ndarray | None:
        """All training labels, (N,) int32 or None, where the set is kept in memory."""
        return self.stored.labels

    @functools.cached_property
    def _held(self) -> tuple[np.ndarray, np.ndarray | None]:
        return self.held()

    @property
    def held_x(self) -> np.ndarray:
        """Held-out samples, decoded on first use: at most 10,000, evenly spaced."""
        return self._held[0]

    @property
    def held_labels(self) -> np.ndarray | None:
        """Their labels."""
        return self._held[1]

    def to_model(self, x) -> jax.Array:
        """Numbers from 0..255 to [-1, 1], float32; it runs on the device and under jit."""
        return to_model(x, True)

    def to_data(self, x) -> np.ndarray:
        """Numbers from [-1, 1] to uint8, clipped and rounded."""
        return to_data(x, True)

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the training set in the model's numbers; of 4,096 samples if it is not in memory."""
        return self.stored.moments() if self.in_memory else moments(self.take(spread(self.size, 4096))[0], True)

    def fingerprint(self) -> str:
        """A word that other data do not have, as far as a look at some of them can tell."""
        if self.identify is not None:
            return self.identify()
        x, labels = self.take(spread(self.size, fingerprint.LOOKED_AT))
        return fingerprint.digest(["records", self.size, self.classes, x, labels])

    def read(
        self, seed: int, batch: int, visits: Iterable[tuple[int, int]], rows: slice = slice(None), state: Any = None
    ) -> Iterator[Batches]:
        """Read the same batches as `Dataset.read`; threads decode them before they are needed."""
        if self.in_memory:
            return self.stored.read(seed, batch, visits, rows)
        return self._stream(seed, batch, visits, rows)

    def _stream(self, seed, batch, visits, rows) -> Iterator[Batches]:
        own_rows(rows, batch)
        position: int | None = None
        batches: Any = None  # Grain's iterator
        try:
            for start, count in visits:
                if start != position:
                    if batches is not None:
                        batches.close()
                    batches = self._batches(seed, batch, rows, start)
                chunk = [next(batches) for _ in range(count)]
                position = start + count
                x, labels = zip(*chunk, strict=True)
                yield Batches(np.stack(x), None if labels[0] is None else np.stack(labels))
        finally:
            if batches is not None:
                batches.close()

    def _batches(self, seed: int, batch: int, rows: slice, start: int):
        """This process's rows of batches start, start + 1, ... without end, read ahead by Grain."""
        with needs("jdiff.data needs"):
            import grain

        def read_batch(k):
            return self.take(batch_indices(self.size, batch, seed, int(k), 1)[0, rows])

        ahead = grain.ReadOptions(num_threads=self.threads, prefetch_buffer_size=2 * self.threads)
        return iter(grain.MapDataset.range(start, 2**48).map(read_batch).to_iter_dataset(ahead))


def decode(take: Take, rows: np.ndarray, shape: tuple[int, ...], threads: int, chunk: int = 256):
    """(x (n, ...) uint8, labels (n,) or None) of many rows, decoded by several threads, `chunk` rows at a time."""
    x, labels = np.empty((len(rows), *shape), np.uint8), [None] * -(-len(rows) // chunk)

    def fill(i):
        part = slice(i * chunk, (i + 1) * chunk)
        x[part], labels[i] = take(rows[part])

    with ThreadPoolExecutor(threads) as pool:
        list(pool.map(fill, range(len(labels))))
    return x, np.concatenate(labels) if labels and labels[0] is not None else None


def fits(size: int, shape: tuple[int, ...], cache: int) -> bool:
    """Whether `size` samples of a shape take at most `cache` bytes."""
    return size * int(np.prod(shape)) <= cache
