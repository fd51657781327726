"""What tests of data share: a small set in memory, decoded on demand and as a stream; pictures on disk."""

import numpy as np
from PIL import Image

from jdiff.data import Dataset, Records, Stream

N, BATCH = 37, 8
PIXELS = np.random.default_rng(0).integers(0, 256, (N, 4, 5, 3), np.uint8)
OF_PIXELS = np.arange(N, dtype=np.int32) % 3


def memory():
    return Dataset("memory", PIXELS, OF_PIXELS, PIXELS[:0], OF_PIXELS[:0], 3)


def records(in_memory=False, threads=2):
    def take(rows):
        return PIXELS[rows], OF_PIXELS[rows]

    return Records("records", N, (4, 5, 3), take, lambda: take(np.arange(3)), 3, in_memory, threads)


def stream(decode=None, repeat=True):
    import grain

    def make(seed):
        data = grain.MapDataset.source(range(N)).shuffle(seed=seed)
        data = (data.repeat() if repeat else data).to_iter_dataset()
        return data.map(lambda i: int(i)) if decode else data.map(lambda i: (PIXELS[i], OF_PIXELS[i]))

    return Stream("stream", make, (4, 5, 3), N, 3, decode)


def read(data, visits, rows=slice(None), state=None, seed=0):
    chunks = list(data.read(seed, BATCH, visits, rows, state))
    return np.concatenate([c.x for c in chunks]), np.concatenate([c.labels for c in chunks]), chunks[-1].state


SOURCES = {"memory": memory, "records": records, "cached records": lambda: records(True), "stream": stream}


def smooth(n, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8)


def save(path, image, **options):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
    image.save(path, **options)
    return path


def first(dataset, batch=8, count=3):
    return next(dataset.read(0, batch, [(0, count)]))
