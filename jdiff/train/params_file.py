"""Files of parameters: a tree of arrays as one .npz, with a record of what they are.

A file holds arrays `ema/NAME`, without pickles, and a record `jdiff/record` of JSON: a CRC-32 of each array, one of
their names, shapes and dtypes (the model), and whatever the writer notes. A file whose name is that of a snapshot,
STEP-SIGMA_REL.npz (see `train.posthoc`), notes both numbers, so that a renamed one is not taken for another.
"""

import json
import re
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdiff.core import files, foreign
from jdiff.core.trees import named_leaves, named_shapes, shape_difference
from jdiff.train.checkpoint import CheckpointError, CheckpointWarning
from jdiff.train.parallel import host

RECORD = "jdiff/record"
PREFIX = "ema/"
SNAPSHOT = re.compile(r"([0-9]+)-([0-9.]+(?:e-[0-9]+)?)\.npz")  # the name of a snapshot's file


def write_params(path, params: Any, notes: dict | None = None) -> None:
    """Write a tree of arrays, whole or not at all; under several processes all of them call this, and the first writes.

    Args:
        path: the file, named .npz.
        params: the tree; bfloat16 is written as float32, because NumPy has none.
        notes: what else the record says, as JSON can hold it.

    Raises:
        OSError: the file could not be written; the message names `path`.
    """
    arrays: dict[str, np.ndarray] = {}
    for name, leaf in named_leaves(params).items():
        whole = host(leaf)
        if jax.process_index() == 0:
            arrays[name] = whole.astype(np.float32) if whole.dtype.kind == "V" else whole
    if jax.process_index():
        return
    record = np.frombuffer(json.dumps((notes or {}) | _contents(arrays)).encode(), np.uint8)
    # the record first: a bit flipped in the archive's list of members can hide those after it
    arrays = {RECORD: record} | {PREFIX + name: array for name, array in arrays.items()}
    files.write(path, lambda file: np.savez(file, allow_pickle=False, **arrays))


def read(path) -> dict[str, np.ndarray]:
    """{name: array} of a file of `write_params`, compared with its record.

    A snapshot of an earlier version holds no record: a `CheckpointWarning` says so.

    Raises:
        CheckpointError: the file is missing, damaged or renamed.
    """
    path = Path(path)
    arrays, record = read_recorded(path)
    if record is None and SNAPSHOT.fullmatch(path.name):
        warn_unverified(f"{path} is")
    return arrays


def load_params(path, like: Any) -> Any:
    """The tree in a file of `write_params`, as NumPy arrays in the structure, shapes and dtypes of `like`.

    Raises:
        CheckpointError: the file is missing, damaged, renamed or of another model.
    """
    arrays, expected = read(path), named_leaves(like)
    if difference := shape_difference({name: array.shape for name, array in arrays.items()}, named_shapes(like)):
        raise CheckpointError(f"{path} is of another model: {difference}")
    leaves = [arrays[name].astype(leaf.dtype, copy=False) for name, leaf in expected.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def read_recorded(path: Path) -> tuple[dict[str, np.ndarray], dict | None]:
    """(arrays, record) of a file, compared with each other; the record is None in files of earlier versions.

    Raises:
        CheckpointError: the file is missing, damaged or renamed.
    """
    if not path.is_file():
        raise CheckpointError(f"there is no {path}")
    try:
        arrays = foreign.read_npz(path)
        record = arrays.pop(RECORD, None)
        foreign_names = [name for name in arrays if not name.startswith(PREFIX)]
        if foreign_names:
            raise ValueError(f"{foreign_names[0]} is not of the model")
        arrays = {name.removeprefix(PREFIX): array for name, array in arrays.items()}
        if record is None:
            return arrays, None
        record = foreign.parse_json(record.tobytes())
        if not isinstance(record, dict):
            raise ValueError("its record is none")
        for what, found in _contents(arrays).items():
            if record.get(what) != found:
                raise ValueError("its arrays do not match their checksums")
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path} is damaged ({foreign.one_line(error)})") from error
    named = SNAPSHOT.fullmatch(path.name)
    step, sigma_rel = record.get("step"), record.get("sigma_rel")
    if named and step is not None and (step, sigma_rel) != (int(named[1]), float(named[2])):
        raise CheckpointError(f"{path} holds the average of step {step} and sigma_rel {sigma_rel}: it was renamed")
    return arrays, record


def warn_unverified(which: str) -> None:
    """Give a `CheckpointWarning` about files without a record; `which` names them, with the verb."""
    text = f"{which} unverified: written by an earlier version, without a record of checksums, step and sigma_rel"
    warnings.warn(text, CheckpointWarning, stacklevel=3)


def _contents(arrays: dict[str, np.ndarray]) -> dict:
    """What a record says of arrays: a CRC-32 of each, and one of their names, shapes and dtypes, the model's."""
    shapes = sorted((name, array.shape, array.dtype.name) for name, array in arrays.items())
    sums = {name: zlib.crc32(array.tobytes()) for name, array in arrays.items()}
    return dict(crc32=sums, model=zlib.crc32(json.dumps(shapes).encode()))
