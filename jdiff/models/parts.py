"""A batch taken some samples at a time, so that what a layer makes of them stays in the cache of the CPU."""

import math
from collections.abc import Callable

import jax
from jax import lax


def part_size(batch: int, most: int) -> int:
    """How many samples to take at a time.

    Where the number of devices divides the batch, it divides the parts too: every device has as many of its own samples
    in each part.

    Args:
        batch: the number of samples.
        most: the most samples of a part; a part has one for each device even where that is more.

    Returns:
        A divisor of `batch`; `batch` itself where it is not known yet, as in a program that is exported for all.
    """
    if not isinstance(batch, int):
        return batch
    devices = math.gcd(batch, jax.device_count())
    on_each = batch // devices
    return devices * max(n for n in range(1, on_each + 1) if on_each % n == 0 and n <= max(most // devices, 1))


def map_parts(f: Callable, size: int, *arrays: jax.Array | None) -> jax.Array:
    """Apply a function to some samples at a time, one part after the other, and join what it returns.

    The samples of a part lie apart in the batch: where the batch is divided over devices by rows, each device has its
    share of every part already. Samples that lie beside each other would all be sent to all devices.

    Args:
        f: takes arrays (size, ...) and returns one (size, ...).
        size: the samples of a part, a divisor of the batch.
        arrays: (B, ...) each; None is handed to `f` as None.

    Returns:
        (B, ...).
    """
    parts = [None if a is None else a.reshape(size, -1, *a.shape[1:]).swapaxes(0, 1) for a in arrays]
    out = lax.map(lambda part: f(*part), parts).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])
