"""Programs for any batch: traced once for the CPU and once for accelerators, called under jit, vmap and grad.

A program is a function of three dicts of arrays: `numbers` (parameters and other leaves), `rows` (what a call gives),
and `settings` (what a call may change). The networks have other forms on the CPU (see `models.cpu`), so one program is
traced for it and one for all other platforms. Both take the same arguments.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jax import export, lax
from jax.custom_batching import custom_vmap

from jdiff.core.foreign import one_line
from jdiff.models.cpu import traced_for

PLATFORMS = ("cpu", "cuda", "rocm", "tpu")
BATCH = "b"  # the name of the size of the batch in symbolic shapes

Specs = dict[str, jax.ShapeDtypeStruct]


def spec_of(leaf: Any, batch: Any = None) -> jax.ShapeDtypeStruct:
    """The shape and dtype of a leaf; with `batch`, that many rows in place of its own. A float stays weakly typed."""
    shape, dtype = jnp.shape(leaf), jax.dtypes.canonicalize_dtype(jnp.result_type(leaf), allow_extended_dtype=True)
    shape = shape if batch is None or not shape else (batch, *shape[1:])
    return jax.ShapeDtypeStruct(shape, dtype, weak_type=isinstance(leaf, int | float))


def any_batch() -> Any:
    """The size of a batch that is not known yet."""
    return export.symbolic_shape(BATCH)[0]


def make(
    f: Callable, numbers: Specs, rows: Specs, settings: Specs, *, platforms: Sequence[str], vjp_order: int
) -> list[tuple[tuple[str, ...], bytes]]:
    """Export `f(numbers, rows, settings)`.

    Args:
        f: the function.
        numbers: the arguments, by name.
        rows: further ones, in whose shapes `any_batch()` may stand.
        settings: further ones.
        platforms: what it is to run on, of `PLATFORMS`.
        vjp_order: 1 for a program with its gradient, else 0.

    Returns:
        [(platforms, the serialised program)], for the CPU and for the others.

    Raises:
        ValueError: for other platforms and orders, and where `f` cannot be exported.
    """
    if isinstance(platforms, str) or not platforms or not set(platforms) <= set(PLATFORMS):
        raise ValueError(f"platforms must be a list of some of {', '.join(PLATFORMS)}; got {platforms!r}")
    if vjp_order not in (0, 1):
        raise ValueError(f"vjp_order must be 0 (no gradient) or 1; got {vjp_order!r}")
    made = []
    for group in (tuple(p for p in PLATFORMS if p in platforms and (p == "cpu") == cpu) for cpu in (True, False)):
        if not group:
            continue
        try:
            with traced_for(group[0]):
                exported = export.export(jax.jit(functools.partial(f)), platforms=group)(numbers, rows, settings)
                made.append((group, bytes(exported.serialize(vjp_order=vjp_order))))
        except Exception as error:  # of tracing the user's function, or of lowering it
            raise ValueError(f"cannot be exported for {', '.join(group)}: {_reason(error)}") from error
    return made


def _reason(error: Exception) -> str:
    text = one_line(str(error).partition("\n\n")[0], 300) or type(error).__name__
    unknown = jax.errors.InconclusiveDimensionOperation, jax.errors.ConcretizationTypeError
    if "_DimExpr" in text or isinstance(error, unknown):
        return f"it needs the size of the batch, which is any: write x.shape[0] for len(x), and do not ask it ({text})"
    return text


class Program:
    """Exported programs as one function.

    Args:
        parts: the programs, that of the CPU first if there is one.
        batched: the names of the rows whose first axis is the batch.
        differentiable: whether the programs come with their gradients.
    """

    def __init__(self, parts: Sequence[export.Exported], batched: frozenset[str], differentiable: bool):
        self.parts, self.batched, self.differentiable = tuple(parts), batched, differentiable
        self._joins = all(_first_is_batch(aval) for aval in parts[0].out_avals)
        self._run = custom_vmap(self._call)
        self._run.def_vmap(self._over_axis)
        self._pull = custom_vmap(self._pull_back)
        self._pull.def_vmap(functools.partial(_one_by_one, self._pull_back))
        self._checked = jax.custom_vjp(lambda *arguments: self._run(*arguments))
        self._checked.defvjp(self._forward, self._backward)

    def __call__(self, numbers: dict, rows: dict, settings: dict) -> Any:
        """What the exported function returns, under any of jit, vmap and, where it was exported so, grad."""
        return self._checked(numbers, rows, settings)

    def _call(self, numbers, rows, settings):
        if len(self.parts) == 1:
            return self.parts[0].call(numbers, rows, settings)
        cpu, others = (part.call for part in self.parts)
        return lax.platform_dependent(numbers, rows, settings, cpu=cpu, default=others)

    def _over_axis(self, size, mapped, numbers, rows, settings):
        """The rule of vmap: samples of all batches side by side where only rows differ, else one batch at a time."""
        of_rows = {name for name, is_mapped in mapped[1].items() if is_mapped}
        if any(jax.tree.leaves((mapped[0], mapped[2]))) or not of_rows <= self.batched or not self._joins:
            return _one_by_one(self._run, size, mapped, numbers, rows, settings)

        def join(name, a):
            if name not in self.batched:
                return a
            a = a if mapped[1][name] else jnp.broadcast_to(a, (size, *a.shape))
            return a.reshape(-1, *a.shape[2:])

        out = self._run(numbers, {name: join(name, a) for name, a in rows.items()}, settings)
        return jax.tree.map(lambda a: a.reshape(size, -1, *a.shape[1:]), out), jax.tree.map(lambda a: True, out)

    def _forward(self, *arguments):
        if not self.differentiable:
            raise ValueError("this program was exported without its gradient; export it again with vjp_order=1")
        return self._run(*arguments), arguments

    def _backward(self, arguments, cotangent):
        leaves, tree = jax.tree.flatten(arguments)
        gradients = iter(self._pull(arguments, cotangent))
        return jax.tree.unflatten(tree, [next(gradients) if _is_real(leaf) else None for leaf in leaves])

    def _pull_back(self, arguments, cotangent):
        """The gradients with respect to the real numbers among the arguments."""
        leaves, tree = jax.tree.flatten(arguments)

        def call(*real):
            left = iter(real)
            return self._call(*jax.tree.unflatten(tree, [next(left) if _is_real(leaf) else leaf for leaf in leaves]))

        return jax.vjp(call, *(leaf for leaf in leaves if _is_real(leaf)))[1](cotangent)


def _one_by_one(f, size, mapped, *arguments):
    """A rule of vmap: one after the other."""
    leaves, tree = jax.tree.flatten(arguments)
    flags = jax.tree.leaves(mapped)

    def one(moving):
        left = iter(moving)
        return f(*jax.tree.unflatten(tree, [next(left) if flag else a for a, flag in zip(leaves, flags, strict=True)]))

    out = lax.map(one, [a for a, flag in zip(leaves, flags, strict=True) if flag])
    return out, jax.tree.map(lambda a: True, out)


def _first_is_batch(aval) -> bool:
    return bool(aval.shape) and str(aval.shape[0]) == BATCH


def _is_real(leaf) -> bool:
    return jnp.issubdtype(leaf.dtype, jnp.inexact)
