"""Data sets: what they are, where they come from, the order in which they are read, and augmentation on the device.

There are three kinds: a `Dataset` lies in memory, `Records` are decoded as they are read, and a `Stream` can only be
read forwards. All have `name`, `size`, `shape`, `classes`, `is_image`, `in_memory`, `held_x`, `held_labels`,
`class_names`, `to_model`, `to_data`, `moments()`, `fingerprint()` and `read(seed, batch, visits, rows, state)`.
"""

from jdiff.data.augmentation import augment, flip
from jdiff.data.background import Prefetch, prefetch
from jdiff.data.dataset import Batches, DataError, Dataset, DataWarning
from jdiff.data.embedded import circles, digits, moons, scurve, scurve_points, swiss_roll
from jdiff.data.facts import DataFacts, facts_of, read_facts, write_facts
from jdiff.data.from_arrays import arrays
from jdiff.data.from_folder import folder
from jdiff.data.from_tfds import tfds
from jdiff.data.named import celeba, cifar10, fashion_mnist, imagenet64, mnist
from jdiff.data.order import batch_indices, hold_out
from jdiff.data.records import Records
from jdiff.data.registry import DATASETS, load, register_dataset
from jdiff.data.stream import Stream
from jdiff.data.unlabelled import without_labels
from jdiff.data.write import write_tfds

__all__ = [
    "DATASETS", "Batches", "DataError", "DataFacts", "DataWarning", "Dataset", "Prefetch", "Records", "Stream",
    "arrays", "augment", "batch_indices", "celeba", "cifar10", "circles", "digits", "facts_of", "fashion_mnist", "flip",
    "folder", "hold_out", "imagenet64", "load", "mnist", "moons", "prefetch", "read_facts", "register_dataset",
    "scurve", "scurve_points", "swiss_roll", "tfds", "without_labels", "write_facts", "write_tfds",
]  # fmt: skip
