"""A whole sampler as a folder, and the function that such a folder is."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.checks import check_is
from jdiff.core.pytrees import noun, static
from jdiff.core.trees import named_leaves
from jdiff.export import folder, programs
from jdiff.export.arguments import check_names, check_rows, concrete_numbers
from jdiff.export.denoise import DEFAULT_PLATFORMS
from jdiff.export.programs import Program, any_batch, spec_of

START, COND = "start", "cond"


@noun
class ExportedSampler:
    """A sampler that is a program read from a folder.

    Attributes:
        numbers: its parameters, by name.
        settings: the settings that a call may change, at the values that they had when it was exported.
        program: what runs.
        inputs: {name: shape and dtype} of the arguments.
    """

    numbers: dict[str, Any]
    settings: dict[str, Any]
    program: Program = static()
    inputs: Any = static()

    def __call__(self, start: Any, cond: Any = None, settings: Mapping[str, Any] | None = None) -> Any:
        """Draw samples.

        Args:
            start: noise (B, ...) or keys, in the form that was exported.
            cond: what the samples are of, as classes (B,), or None.
            settings: those that are to differ from the exported ones, by name.

        Returns:
            What the exported function returns: samples (B, ...).

        Raises:
            ValueError: for other names, shapes or dtypes than those that were exported.
        """
        rows = check_rows(named_leaves({START: start, COND: cond}), self.inputs)
        check_names("setting", settings or {}, self.settings)
        changed = {name: _as_exported(name, value, self.settings[name]) for name, value in (settings or {}).items()}
        return self.program(self.numbers, rows, self.settings | changed)


def save_sampler(
    path: str | Path,
    draw: Callable[[Any, Any, Any, Any], Any],
    params: Any,
    start: Any,
    cond: Any = None,
    settings: Mapping[str, Any] | None = None,
    *,
    platforms: Sequence[str] = DEFAULT_PLATFORMS,
    vjp_order: int = 0,
    about: str = "",
) -> None:
    """Write a sampler, with its grid, solver and guidance, as a folder that `load` makes a function of.

    Args:
        path: the folder to write; nothing may be in it.
        draw: the sampler, `draw(params, start, cond, settings) -> samples (B, ...)`, a pure function. What it closes
            over becomes part of the program.
        params: the parameters, a pytree of arrays.
        start: an example of what it starts from: noise (B, ...), keys (B,), one key (), or a pytree of these. The first
            axis of each is the batch, and a call may give any.
        cond: an example of what the samples are of, as classes (B,), or None.
        settings: numbers and arrays that a call may change, as the weight of guidance, by name; integers stay integers.
        platforms: what the programs are to run on, of "cpu", "cuda", "rocm" and "tpu".
        vjp_order: 1 to export the gradient too.
        about: Markdown for the model card: data, metrics, licence.

    Raises:
        ValueError: for a sampler that cannot be exported.
        OSError: the folder cannot be written, or something is in it.
        MissingExtra: the libraries of the extra `export` are not installed.
    """
    folder.check_libraries()
    check_is("draw", draw, Callable, "a function draw(params, start, cond, settings)")
    chosen = concrete_numbers(dict(settings or {}))
    numbers, of_params = named_leaves(params), jax.tree.structure(params)
    examples = {START: start, COND: cond}
    of_rows, batch = jax.tree.structure(examples), any_batch()
    rows = {name: spec_of(leaf, batch) for name, leaf in named_leaves(examples).items()}

    def run(numbers, rows, settings):
        # JAX sorts the names in dicts; the leaves of a tree stand in the order of the tree
        given = jax.tree.unflatten(of_rows, [rows[name] for name in names_of_rows])
        return draw(
            jax.tree.unflatten(of_params, [numbers[name] for name in names_of_params]),
            given[START], given[COND], settings,
        )  # fmt: skip

    names_of_rows, names_of_params = list(rows), list(numbers)
    specs = {name: spec_of(leaf) for name, leaf in concrete_numbers(numbers).items()}
    of_settings = {name: spec_of(value) for name, value in chosen.items()}
    made = programs.make(run, specs, rows, of_settings, platforms=platforms, vjp_order=vjp_order)
    noted = folder.shapes(of_settings)
    for name, value in chosen.items():
        noted[name]["value"] = np.asarray(value).tolist()
    folder.write(path, "sampler", numbers, made, rows=rows, about=about, vjp_order=vjp_order, settings=noted)


def of_export(found: folder.Export) -> ExportedSampler:
    """The sampler of a folder."""
    noted = found.record.get("settings")
    if not isinstance(noted, dict):
        raise ValueError("it has no 'settings' of kind dict")
    settings = {}
    for name, setting in noted.items():
        try:
            settings[name] = jnp.asarray(np.asarray(setting["value"], setting["dtype"]).reshape(setting["shape"]))
        except (KeyError, TypeError, ValueError) as error:
            raise ValueError(f"its setting {name} is no array") from error
    return ExportedSampler(found.numbers, settings, found.program, folder.Fixed(found.record["rows"]))


def _as_exported(name: str, value: Any, default: Any):
    """A setting in the shape and dtype that was exported. Raises ValueError for a number that it cannot hold."""
    array = jnp.asarray(value)
    if array.shape != default.shape:
        raise ValueError(f"setting {name} has shape {array.shape}; it was exported with {default.shape}")
    fraction = jnp.issubdtype(array.dtype, jnp.floating) and not jnp.issubdtype(default.dtype, jnp.floating)
    if fraction or jnp.issubdtype(array.dtype, jnp.bool_) != jnp.issubdtype(default.dtype, jnp.bool_):
        raise ValueError(f"setting {name} is {array.dtype}; it was exported as {default.dtype}")
    return array.astype(default.dtype)
