"""The order of the data, as a function of the step: so a resumed run needs nothing but its step."""

import functools

import numpy as np


def batch_indices(n: int, batch: int, seed: int, start: int, count: int) -> np.ndarray:
    """Rows of batches start, ..., start + count - 1 of the endless reshuffled stream; int32 (count, batch).

    Epoch e visits every one of the n rows once, in an order drawn from (seed, e); batches run over the seams.
    Raises ValueError if the set has fewer rows than a batch.
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
    """The rows of a global batch that `rows` takes. Raises ValueError if it takes none, or is no slice."""
    if not isinstance(rows, slice) or not range(batch)[rows]:
        raise ValueError(f"rows is the slice of a batch that this process reads; got {rows!r} of {batch} rows")
    return range(batch)[rows]


def hold_out(n: int, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training rows, held-out rows) of n, each ascending, a share held out by a draw from the seed.

    Raises ValueError unless 0 <= share < 1.
    """
    if not 0 <= share < 1:
        raise ValueError(f"held_out is a share of the data, at least 0 and less than 1; got {share}")
    order = np.random.Generator(np.random.Philox(key=[seed, 2**62])).permutation(n)
    held = round(n * share)
    return np.sort(order[held:]), np.sort(order[:held])


def spread(n: int, most: int) -> np.ndarray:
    """At most so many of n rows, evenly spaced, ascending."""
    return np.arange(n) if n <= most else np.linspace(0, n - 1, most).astype(np.int64)
