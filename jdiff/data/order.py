"""The order of the data is a function of the step, so a resumed run needs nothing but its step."""

import functools

import numpy as np


def batch_indices(n: int, batch: int, seed: int, start: int, count: int) -> np.ndarray:
    """The rows of batches start, ..., start + count - 1 of the endless reshuffled stream.

    Epoch e visits each of the n rows once, in an order drawn from (seed, e). A batch may begin in one epoch and end in
    the next.

    Args:
        n: the number of rows of the set.
        batch: the rows of a batch.
        seed: the seed of the order.
        start, count: which batches.

    Returns:
        Rows (count, batch), int32.

    Raises:
        ValueError: the set has fewer rows than a batch.
    """
    if not 0 < batch <= n:
        raise ValueError(
            f"a batch of {batch} from {n} rows; the batch must be positive and at most the size of the set"
        )
    first, last = start * batch, (start + count) * batch
    epochs = range(first // n, -(-last // n))
    stream = np.concatenate([_epoch(n, seed, epoch) for epoch in epochs]) if epochs else np.zeros(0)
    offset = first - epochs.start * n
    return stream[offset : offset + count * batch].reshape(count, batch).astype(np.int32)


@functools.lru_cache(maxsize=2)  # batches are asked for one by one, and an epoch of a million rows takes 20 ms to draw
def _epoch(n: int, seed: int, epoch: int) -> np.ndarray:
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n)
    order.flags.writeable = False
    return order


def own_rows(rows: slice, batch: int) -> range:
    """The rows of a global batch that the slice `rows` takes.

    Raises:
        ValueError: it takes none, or is no slice.
    """
    if not isinstance(rows, slice) or not range(batch)[rows]:
        raise ValueError(f"rows is the slice of a batch that this process reads; got {rows!r} of {batch} rows")
    return range(batch)[rows]


def hold_out(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows), each ascending: a share of n rows, drawn from the seed, is held out.

    Raises:
        ValueError: the share is outside [0, 1).
    """
    if not 0 <= share < 1:
        raise ValueError(f"held_out is a share of the data, at least 0 and less than 1; got {share}")
    order = np.random.Generator(np.random.Philox(key=[seed, 2**62])).permutation(n)
    held = round(n * share)
    return np.sort(order[held:]), np.sort(order[:held])


def spread(n: int, most: int) -> np.ndarray:
    """At most `most` of n rows, evenly spaced, ascending.

    >>> spread(7, 3)
    array([0, 3, 6])
    """
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)
