"""How fast data come: `python benchmarks/input.py [--data-dir DIR] [--seconds 10]`.

Images a second that one process reads, shuffled and in batches as training does, from the in-memory cache and from
array_record, decoded by threads on the way; then the share of time that a training loop of `--step-ms` per batch waits
for each. The set is TFDS's CIFAR-10 in `--data-dir`, where it has been prepared, or else a synthetic one of the same
shape: smooth colour images, written as PNG to a temporary directory.
"""

import dataclasses
import tempfile
import time

import numpy as np

from jdiff import config as configs
from jdiff import data


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure the speed of the input."""

    data_dir: str | None = None
    """Where TFDS's cifar10 is prepared; None for a synthetic set."""
    batch: int = 128
    """Images in a batch."""
    visit: int = 20
    """Batches read at a time."""
    threads: int = 4
    """Threads that decode."""
    seconds: float = 10.0
    """Length of each measurement."""
    step_ms: float = 50.0
    """Length of a pretended training step."""
    size: int = 10_000
    """Images of the synthetic set."""


def synthetic(size: int, shape=(32, 32, 3)):
    """(image, label) pairs: noise of 4x4 pixels, enlarged smoothly, about as large as photographs once compressed."""
    from PIL import Image

    generator = np.random.default_rng(0)
    for i in range(size):
        small = Image.fromarray(generator.integers(0, 256, (12, 12, 3), np.uint8))
        image = np.asarray(small.resize(shape[:2], Image.Resampling.BICUBIC), np.int16)
        image = image + generator.integers(-4, 5, shape)
        yield image.clip(0, 255).astype(np.uint8), i % 10


def measure(dataset, a: Arguments) -> tuple[float, float]:
    """(images a second read as fast as they come, share of time waited for them by a loop of steps of `step_ms`)."""

    def visits():
        start = 0
        while True:
            yield start, a.visit
            start += a.visit

    with data.prefetch(dataset.read(0, a.batch, visits())) as chunks:
        next(chunks)  # opens files and starts threads
        count, start = 0, time.perf_counter()
        while time.perf_counter() - start < a.seconds:
            next(chunks)
            count += a.visit * a.batch
        rate = count / (time.perf_counter() - start)
    with data.prefetch(dataset.read(0, a.batch, visits())) as chunks:
        next(chunks)
        chunks.waited, start = 0.0, time.perf_counter()
        while time.perf_counter() - start < a.seconds:
            time.sleep(a.step_ms * a.visit / 1000)
            next(chunks)
        return rate, chunks.waited / (time.perf_counter() - start)


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="benchmarks/input.py")
    if min(a.batch, a.visit, a.threads) < 1 or a.seconds <= 0 or a.step_ms < 0 or a.size < a.batch:
        raise configs.ConfigError("--batch, --visit, --threads and --seconds must be positive, --size at least --batch")
    with tempfile.TemporaryDirectory() as temporary:
        name, directory = "cifar10", a.data_dir
        if directory is None:
            import tensorflow_datasets

            tensorflow_datasets.disable_progress_bar()
            name, directory = "synthetic", temporary
            data.write_tfds(name, directory, (32, 32, 3), 10, train=synthetic(a.size))
        for label, cache in (("in-memory cache", 2**62), ("array_record", 0)):
            dataset = data.tfds(name, held_split=None, data_dir=directory, cache=cache, threads=a.threads)
            rate, waited = measure(dataset, a)
            print(
                f"{label}: {rate:,.0f} images/s of {name} {dataset.shape}; "
                f"steps of {a.step_ms:g} ms with {a.batch} images wait {waited:.1%} of the time"
            )
    return 0


if __name__ == "__main__":
    configs.run_script(main, ValueError)
