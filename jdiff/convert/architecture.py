"""What a converter of one architecture must provide."""

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any


def _unchanged(value: Any) -> Any:
    return value


@dataclasses.dataclass(frozen=True)
class Architecture:
    """The converter of one family of published networks; each file of this folder that is one ends with its own.

    Args:
        select: (content, settings) -> tensors: where in a file the tensors are, in one form for all its spellings;
            settings are the config beside the file and the overrides.
        build: (tensors, config, **overrides) -> module: the Linen module, from the config or from names and shapes.
        table: module -> [Entry, ...]: the pairs of names.
        example: (module, tensors) -> (x, label, cond): the smallest arguments that the module takes.
        config: (module, variables) -> dict: what is written beside exported weights.
        ignored: patterns of the names of tensors that have no place among our variables.
        settings: what `load` takes beside the fields of the module.
        one_spelling: settings -> settings: what can be said in several words, said in one.
        folder: path -> path: where the files lie within the path that was given.
        source: where the one published file is to be had, for whoever has not got it.
    """

    select: Callable[[dict, dict], dict]
    build: Callable[..., Any]
    table: Callable[[Any], list]
    example: Callable[[Any, dict], tuple]
    config: Callable[[Any, dict], dict]
    ignored: tuple[str, ...] = ()
    settings: tuple[str, ...] = ()
    one_spelling: Callable[[dict], dict] = _unchanged
    folder: Callable[[Path], Path] = _unchanged
    source: str = ""
