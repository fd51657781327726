"""A denoiser as a folder, and the denoiser that such a folder is."""

import dataclasses
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array, as_time
from jdiff.core.checks import check_is, check_time
from jdiff.core.pytrees import noun, per_sample, row_field, static
from jdiff.core.trees import named_leaves
from jdiff.export import folder, programs, schedules
from jdiff.export.arguments import check_rows, concrete_numbers
from jdiff.export.programs import PLATFORMS, Program, any_batch, spec_of
from jdiff.process.clock import Schedule
from jdiff.process.prediction import Denoise, Prediction

X, T = "x", "t"  # the names of the two arguments of every denoiser
DEFAULT_PLATFORMS = tuple(platform for platform in PLATFORMS if platform != "rocm")


@noun
class ExportedDenoise(Denoise):
    """A denoiser whose network is a program read from a folder. Its numbers are leaves, as everywhere.

    Attributes:
        numbers: parameters, and other numbers as the weight of guidance, by name.
        schedule: the schedule of the process.
        rows: what it is given beside x_t, by name: see `given`.
        program: what runs.
        inputs: {name: shape and dtype} of the arguments.
    """

    numbers: dict[str, Array]
    schedule: Schedule
    rows: Any = per_sample()
    program: Program = static()
    inputs: Any = static()

    def given(self, rows: Mapping[str, Any] | None = None, **named: Any) -> "ExportedDenoise":
        """The same denoiser with what it is given beside x_t, as classes.

        Args:
            rows: {name: array (B, ...)}, for names that are no words, as "branches/conditional/cond".
            named: the same by keyword, as cond=labels.

        Returns:
            The denoiser for such a batch.

        Raises:
            ValueError: for other names, shapes or dtypes than it was exported with.
        """
        expected = {name: spec for name, spec in self.inputs.items() if name not in (X, T)}
        return dataclasses.replace(self, rows=check_rows({**(rows or {}), **named}, expected))

    def predict(self, x: Array, t) -> Prediction:
        """(E[x_0 | x_t], E[eps | x_t], extra) for x (B, ...) at t, () or (B,)."""
        missing = self.inputs.keys() - {X, T} - (self.rows or {}).keys()
        if missing:
            names = ", ".join(sorted(missing))
            raise ValueError(f"this denoiser was exported with {names}, which it needs: denoise.given(...)")
        check_time(t, x)
        t = jnp.broadcast_to(as_time(t), jnp.shape(x)[:1]).astype(self.inputs[T]["dtype"])
        rows = check_rows({X: x, T: t, **(self.rows or {})}, self.inputs)
        return Prediction(*self.program(self.numbers, rows, {}))


def save(
    path: str | Path,
    denoise: Denoise,
    shape: Sequence[int],
    *,
    dtype: Any = jnp.float32,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    vjp_order: int = 0,
    about: str = "",
) -> None:
    """Write a denoiser as a folder that `load` makes a denoiser of, without the code of its network.

    Args:
        path: the folder to write; nothing may be in it.
        denoise: the denoiser, or guidance around denoisers. Parameters and all other numbers are kept. What it is given
            for each sample, as classes (B,), is an example: `ExportedDenoise.given` takes the rows of a call.
        shape: of one sample.
        dtype: of x.
        platforms: what the programs are to run on, of "cpu", "cuda", "rocm" and "tpu".
        vjp_order: 1 to export the gradient too.
        about: Markdown for the model card: data, metrics, licence.

    Raises:
        ValueError: for a denoiser that cannot be exported, and for a schedule that is not one of this library.
        OSError: the folder cannot be written, or something is in it.
        MissingExtra: the libraries of the extra `export` are not installed.
    """
    folder.check_libraries()
    check_is("denoise", denoise, Denoise, "a denoiser, as jdiff.denoiser(...); for a function, jdiff.as_denoise")
    schedule = schedules.written(denoise.schedule)
    leaves, tree, batch = named_leaves(denoise), jax.tree.structure(denoise), any_batch()
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(denoise)]
    has_rows = {
        name: row_field(path) is not None and jnp.ndim(leaves[name]) > 0
        for name, path in zip(leaves, paths, strict=True)
    }
    first_of: dict[int, str] = {}  # branches of guidance share their parameters: they are stored once
    stored = {name: first_of.setdefault(id(leaf), name) for name, leaf in leaves.items()}
    numbers = concrete_numbers({n: leaf for n, leaf in leaves.items() if not has_rows[n] and stored[n] == n})
    x = jax.ShapeDtypeStruct((batch, *shape), dtype)
    t = jax.ShapeDtypeStruct((batch,), as_time(jnp.zeros((), dtype)).dtype)
    given = {name: spec_of(leaf, batch) for name, leaf in leaves.items() if has_rows[name]}
    if clash := given.keys() & {X, T}:
        raise ValueError(f"a field of rows named {min(clash)} cannot be exported; give it another name")
    rows = {X: x, T: t} | given

    def predict(numbers, rows, settings):
        found = {name: numbers[stored[name]] for name in leaves if name not in given} | {n: rows[n] for n in given}
        prediction = jax.tree.unflatten(tree, [found[name] for name in leaves]).predict(rows[X], rows[T])
        return tuple(prediction)

    specs = {name: spec_of(leaf) for name, leaf in numbers.items()}
    made = programs.make(predict, specs, rows, {}, platforms=platforms, vjp_order=vjp_order)
    folder.write(path, "denoiser", numbers, made, rows=rows, about=about, vjp_order=vjp_order, schedule=schedule)


def of_export(found: folder.Export) -> ExportedDenoise:
    """The denoiser of a folder."""
    schedule = schedules.read(found.record.get("schedule"))
    return ExportedDenoise(found.numbers, schedule, None, found.program, folder.Fixed(found.record["rows"]))
