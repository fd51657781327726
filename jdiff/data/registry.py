"""Data sets by name: `@register_dataset` adds a function that makes one, in any file that is imported."""

from collections.abc import Callable
from typing import Any

from jdiff.core.names import choose

DATASETS: dict[str, Callable[..., Any]] = {}


def register_dataset(make: Callable[..., Any]) -> Callable[..., Any]:
    """Register `make(**args) -> data set` under the name of the function, for configs.

    Raises:
        ValueError: the name is taken.
    """
    name = make.__name__
    if name in DATASETS and DATASETS[name].__module__ != make.__module__:
        raise ValueError(f"a data set named {name!r} is registered already, by {DATASETS[name].__module__}")
    DATASETS[name] = make
    return make


def load(name: str, /, **args):
    """The named data set.

    Raises:
        ValueError: the name is unknown; the message lists all names.
    """
    return choose("data set", name, DATASETS)(**args)
