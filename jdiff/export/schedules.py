"""Schedules in JSON: the name of a noun of this library and its numbers."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from jdiff.core.names import choose
from jdiff.core.pytrees import known
from jdiff.process.clock import Schedule
from jdiff.process.schedules import EDM, VE, VP, Cosine, Flow, SubVP
from jdiff.process.shifted import Shifted
from jdiff.process.table import Discrete

NOUNS: dict[str, Any] = {noun.__name__: noun for noun in (VP, SubVP, VE, EDM, Cosine, Flow, Discrete, Shifted)}


def written(schedule: Schedule) -> dict[str, Any]:
    """A schedule as JSON can hold it.

    Raises:
        ValueError: it is not one of this library, or its numbers are not known now.
    """
    name = type(schedule).__name__
    if NOUNS.get(name) is not type(schedule):
        raise ValueError(
            f"{name} is a schedule of your own, which a folder cannot name; it names {', '.join(NOUNS)} alone: "
            "export a sampler instead, jdiff.export.save_sampler, whose program holds the schedule"
        )
    if not known(schedule):
        raise ValueError(f"the numbers of {name} are traced; export outside of jit, grad and vmap")
    fields = {field.name: getattr(schedule, field.name) for field in dataclasses.fields(schedule)}  # type: ignore[arg-type]
    return {"noun": name} | {field: _written(value) for field, value in fields.items()}


def read(record: Any) -> Schedule:
    """The schedule of `written`.

    Raises:
        ValueError: the record is not one, or its numbers are out of range.
    """
    if not isinstance(record, dict):
        raise ValueError("its schedule is no record of a noun")
    noun = choose("schedule", record.get("noun"), NOUNS)
    fields = {name: value for name, value in record.items() if name != "noun"}
    if fields.keys() != {field.name for field in dataclasses.fields(noun)}:
        raise ValueError(f"its schedule {record['noun']} has fields {', '.join(fields) or 'none'}, which are others")
    return noun(**{name: _read(value) for name, value in fields.items()})


def _written(value):
    if isinstance(value, Schedule):
        return written(value)
    array = np.asarray(value)
    return array.item() if array.ndim == 0 else {"dtype": array.dtype.name, "values": array.tolist()}


def _read(value):
    if isinstance(value, dict) and "noun" in value:
        return read(value)
    if isinstance(value, dict):
        if value.get("dtype") not in ("float32", "float64") or not isinstance(value.get("values"), list):
            raise ValueError("an array of its schedule is no list of numbers")
        return jnp.asarray(np.asarray(value["values"], value["dtype"]))
    if isinstance(value, bool) or not isinstance(value, int | float):
        raise ValueError(f"a number of its schedule is {value!r}")
    return value
