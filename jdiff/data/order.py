"""The order of the data, as a function of the step: so a resumed run needs nothing but its step."""

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
    orders = [np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(n) for epoch in epochs]
    stream = np.concatenate(orders) if orders else np.zeros(0)
    offset = first - epochs.start * n
    return stream[offset : offset + count * batch].reshape(count, batch).astype(np.int32)
