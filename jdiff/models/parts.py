"""A batch some samples at a time, so that what a layer makes of them stays in the cache."""

import math
from collections.abc import Callable

import jax
from jax import lax


def part_size(batch: int, most: int) -> int:
    """How many of `batch` samples to take at a time: a divisor of it, at most `most` if there are no more devices.

    A multiple of the number of devices, where the batch is one: each has as many of its own samples in every part.
    """
    devices = math.gcd(batch, jax.device_count())
    own = batch // devices
    return devices * max(n for n in range(1, own + 1) if own % n == 0 and n <= max(most // devices, 1))


def map_parts(f: Callable, size: int, *arrays: jax.Array | None) -> jax.Array:
    """f of `size` samples at a time, joined again: f maps arrays (size, ...) to one (size, ...); None stays None.

    The samples of a part lie apart in the batch, not beside each other: with the batch divided over devices in rows,
    each device finds its share of every part at home. Beside each other they would all be sent to all devices.
    """
    parts = [None if a is None else a.reshape(size, -1, *a.shape[1:]).swapaxes(0, 1) for a in arrays]
    out = lax.map(lambda part: f(*part), parts).swapaxes(0, 1)
    return out.reshape(-1, *out.shape[2:])
