"""Names that stand for things: look one up in a table, and check the arguments that go with it."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import TypeVar

T = TypeVar("T")


def did_you_mean(name: object, names: Iterable[str]) -> str:
    """Suggest the known name that is nearest to a wrong one.

    Args:
        name: the wrong name. Whatever is not a text has no near names.
        names: the names that are known.

    Returns:
        ' (did you mean ...?)' for a near miss, else ''.

    >>> did_you_mean("hune", ["heun", "ddim"])
    " (did you mean 'heun'?)"
    """
    close = difflib.get_close_matches(name, list(names), 1) if isinstance(name, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def choose(kind: str, name: object, table: Mapping[str, T]) -> T:
    """Look a name up in a table.

    Args:
        kind: what the names of this table name, for the message, as "solver" or "UniPC variant".
        name: the name; one that is no text is as unknown as a wrong text.
        table: what each name stands for.

    Returns:
        `table[name]`.

    Raises:
        ValueError: the table has no such name. The message suggests the nearest name and lists all of them.

    >>> choose("solver", "hune", {"heun": 1, "ddim": 2})
    Traceback (most recent call last):
    ValueError: unknown solver 'hune' (did you mean 'heun'?); one of heun, ddim
    """
    if not isinstance(name, str) or name not in table:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, table)}; one of {', '.join(table)}")
    return table[name]


def check_arguments(what: str, make: Callable, args: Iterable[str], given: Iterable[str] = ()) -> None:
    """Check the names of the arguments with which a function is to be called.

    Args:
        what: what the function makes, for the message, as "solver 'ddim'".
        make: the function.
        args: the names of the arguments that a user gives.
        given: the parameters that the caller fills by itself. A user may not name them.

    Raises:
        ValueError: `make` does not take one of `args`, or needs an argument that is neither there nor in `given`.
    """
    given = set(given)
    parameters = [p for p in inspect.signature(make).parameters.values() if p.name not in given]
    valid = [p.name for p in parameters if p.kind is not p.VAR_POSITIONAL]
    if not any(p.kind is p.VAR_KEYWORD for p in parameters):
        for name in args:
            if name not in valid:
                known = ", ".join(valid) or "none"
                raise ValueError(f"{what} has no argument {name!r}{did_you_mean(name, valid)}; valid: {known}")
    for p in parameters:
        named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if named and p.default is p.empty and p.name not in args:
            raise ValueError(f"{what} needs the argument {p.name!r}")
