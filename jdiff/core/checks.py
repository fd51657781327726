"""Errors of shape, dtype and range, caught where users make them."""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.pytrees import concrete, is_leaf, known

TIMES = "times are floating, from 0 to 1, and index k of a table of T has t = (k + 1) / T"
SMALLEST, LARGEST = 1e-9, 1e9  # of a setting: float32 holds the fourth power of both


def check_range(owner, low, high=LARGEST, /, **numbers) -> None:
    """Raise ValueError unless each number, where it is known now, is from `low` to `high`; None is left alone."""
    for name, value in numbers.items():
        if value is None or not concrete(value, low):
            continue
        a = np.asarray(value)
        is_number = jnp.issubdtype(a.dtype, np.number) and not isinstance(value, (tuple, list))
        if not is_number or not ((a >= low) & (a <= high)).all():
            raise ValueError(f"{type(owner).__name__}: {name} must be {low:g} or more, at most {high:g}, got {value}")


def check_positive(owner, /, **numbers) -> None:
    """Raise ValueError unless each number, where it is known now, is positive and at most `LARGEST`."""
    for name, value in numbers.items():
        if not concrete(value):
            continue
        a = np.asarray(value)
        if not jnp.issubdtype(a.dtype, np.number) or not ((a > 0) & (a <= LARGEST)).all():
            raise ValueError(f"{type(owner).__name__}: {name} must be positive, at most {LARGEST:g}, got {value}")


def check_ends(owner, /, *, may_be_equal: bool = False, **ends) -> None:
    """Raise ValueError unless two numbers, where they are known now, are positive and the first is below the second.

    Args:
        owner: whose numbers they are; its type is named in the message.
        may_be_equal: whether the two may be the same number.
        ends: the two numbers by name, the lower one first; arrays of settings are compared elementwise.
    """
    check_positive(owner, **ends)
    (low, a), (high, b) = ends.items()
    if concrete(a, b) and not (np.asarray(a) <= np.asarray(b) if may_be_equal else np.asarray(a) < np.asarray(b)).all():
        equal = " or equal to it" if may_be_equal else ""
        raise ValueError(f"{type(owner).__name__}: {low} must be below {high}{equal}, got {a} and {b}")


def check_count(owner, most: int = 1_000_000, /, **numbers) -> None:
    """Raise ValueError unless each number, where it is known now, is whole, from 1 to `most`."""
    check_range(owner, 1, most, **numbers)
    for name, value in numbers.items():
        if value is None or (concrete(value) and (np.asarray(value) % 1 != 0).any()):
            raise ValueError(f"{type(owner).__name__}: {name} must be a whole number, got {value}")


def check_is(name: str, value, protocol: Any, expected: str) -> None:
    """Raise TypeError for a class where one of its objects is expected, and for an object of another kind.

    Args:
        name: what the value is called where it was given.
        value: the value.
        protocol: a runtime-checkable protocol, a class, or several.
        expected: what should have been given, as "a solver, as solvers.DDIM()".
    """
    if isinstance(value, type) or not isinstance(value, protocol):
        raise TypeError(f"{name} is {_shortly(value)}; expected {expected}")


def check_noun(name: str, value, protocol: Any, expected: str) -> None:
    """`check_is`, and TypeError for an object that is no pytree, which `jax.jit` would refuse in its own words.

    Args:
        name: as for `check_is`.
        value: the value.
        protocol: as for `check_is`.
        expected: as for `check_is`.
    """
    check_is(name, value, protocol, expected)
    if is_leaf(value):
        raise TypeError(f"{name} is a {type(value).__name__}, which is no pytree; decorate its class with @jdiff.noun")


def _shortly(value) -> str:
    if isinstance(value, type):
        return f"the class {value.__name__}"
    text = repr(value) if isinstance(value, (str, int, float, type(None))) else f"a {type(value).__name__}"
    return text if len(text) <= 40 else text[:37] + "..."


def check_per_sample(name: str, a, x) -> None:
    """Raise ValueError unless `a` has shape () or (B,), B being the leading axis of `x`."""
    shape = jnp.shape(a)
    if shape != () and shape != jnp.shape(x)[:1]:
        raise ValueError(f"{name} has shape {shape}; expected () or {jnp.shape(x)[:1]}, x being {jnp.shape(x)}")


def check_time(t, x) -> None:
    """Raise ValueError unless `t` has shape () or (B,), and is no index of a table.

    What is negative, 2 or more, or an integer other than 0 and 1 is no time. The values of traced arrays are not
    known: those of an integer dtype are refused. A traced Python integer may be 0 or 1, and is let through.
    """
    if t is None or isinstance(t, str):
        raise TypeError(f"t is {t!r}; {TIMES}")
    check_per_sample("t", t, x)
    integer = not jnp.issubdtype(jnp.result_type(t), jnp.floating)
    if not known(t):
        if integer and not (isinstance(t, jax.Array) and t.weak_type):
            raise ValueError(f"t is {jnp.result_type(t)}; {TIMES}")
        return
    values = np.asarray(t)
    wrong = (values != 0) & (values != 1) if integer else ~((values >= 0) & (values < 2))
    if wrong.any():
        raise ValueError(f"t = {values[wrong].flat[0]} is no time; {TIMES}")


def check_same_shape(name: str, a, other: str, b) -> None:
    """Raise ValueError unless two arrays agree in shape: nothing here broadcasts silently."""
    for what, value in ((name, a), (other, b)):
        check_is(what, value, (jax.Array, np.ndarray, np.generic, float, int), "an array")
    if jnp.shape(a) != jnp.shape(b):
        raise ValueError(f"{name} has shape {jnp.shape(a)} but {other} has {jnp.shape(b)}; they must be the same")


def check_floating(name: str, x) -> None:
    """Raise ValueError unless `x` is a floating array: coefficients cast to integers would be 0."""
    dtype = jnp.result_type(x)
    if not jnp.issubdtype(dtype, jnp.floating):
        raise ValueError(f"{name} is {dtype}; expected a floating array: scale images by x / 127.5 - 1")
