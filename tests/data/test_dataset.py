"""Data sets in memory: the way to the model and back, their moments, their batches as a pytree."""

import chex
import jax
import numpy as np
from data_sources import OF_PIXELS, PIXELS, N, memory, records

from jdiff import data
from jdiff.data import Batches, Dataset, Stream


def test_to_model_and_back():
    digits = data.load("digits")
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    x = digits.to_model(every)
    assert float(x.min()) == -1 and float(x.max()) == 1
    np.testing.assert_array_equal(digits.to_data(x), every)
    np.testing.assert_array_equal(digits.to_data(np.array([-3.0, 3.0])), [0, 255])
    plane = data.load("scurve", n=100)
    np.testing.assert_array_equal(plane.to_data(plane.to_model(plane.x)), plane.x)
    mean, std = plane.moments()
    np.testing.assert_allclose(mean, plane.x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std, plane.x.std(0), rtol=1e-4)


def test_moments():
    numbers = PIXELS.astype(np.float64) / 127.5 - 1
    for held in (memory(), records(), records(True)):
        mean, std = held.moments()
        np.testing.assert_allclose(mean, numbers.mean(0), atol=1e-6)
        np.testing.assert_allclose(std, numbers.std(0), atol=1e-6)
    many = np.random.default_rng(1).integers(0, 256, (1000, 2, 2, 1), np.uint8)
    mean, std = Dataset("many", many, None, many[:0], None).moments()
    np.testing.assert_allclose(mean, (many / 127.5 - 1).mean(0), atol=1e-6)
    np.testing.assert_allclose(std, (many / 127.5 - 1).std(0), atol=1e-6)


class Endless:
    """A stream of samples in turn, with the interface of Grain's and not its time."""

    def __init__(self):
        self.next = 0

    def __iter__(self):
        return self

    def __next__(self):
        self.next += 1
        return PIXELS[self.next % N], OF_PIXELS[self.next % N]

    def get_state(self):
        return {"next": self.next}

    def close(self):
        pass


def test_moments_of_a_stream():
    """Of 4,096 samples, here of 37 in turn, which is almost evenly."""
    numbers = PIXELS.astype(np.float64) / 127.5 - 1
    mean, std = Stream("endless", lambda seed: Endless(), PIXELS.shape[1:], N, 3).moments()
    np.testing.assert_allclose(mean, numbers.mean(0), atol=0.01)
    np.testing.assert_allclose(std, numbers.std(0), atol=0.01)


def test_batches_are_a_pytree():
    chunk = jax.device_put(Batches(PIXELS[None], None))
    assert isinstance(chunk.x, jax.Array) and chunk.labels is None and chunk.state is None
    chex.assert_trees_all_equal(chunk.x, PIXELS[None], strict=True)
