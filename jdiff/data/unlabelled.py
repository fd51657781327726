"""A labelled data set for a network that knows no classes."""

import dataclasses
from typing import Any

from jdiff.data.dataset import Dataset
from jdiff.data.records import Records


def without_labels(data: Any) -> Any:
    """The same data set without its labels, classes 0."""
    if isinstance(data, Dataset):
        return dataclasses.replace(data, labels=None, held_labels=None, classes=0, class_names=())
    if isinstance(data, Records):
        take, held = data.take, data.held
        return dataclasses.replace(
            data, take=lambda rows: (take(rows)[0], None), held=lambda: (held()[0], None), classes=0, class_names=()
        )
    decode = data.decode or (lambda element: element)
    none = dict(held_labels=None, classes=0, class_names=())
    return dataclasses.replace(data, decode=lambda element: (decode(element)[0], None), **none)
