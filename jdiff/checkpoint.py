"""Checkpoints on Orbax: atomic, one directory a step, the newest good one restored.

`DIR/STEP/{params, ema, opt_state, extra}`. A directory appears under its final name only when it is complete.
"""

import contextlib
import logging
import time
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from jdiff.train import TrainState

ITEMS = ("params", "ema", "opt_state", "extra")


class CheckpointError(ValueError):
    """No checkpoint here that can be used as asked; `last_good` is a step that can, or None."""

    def __init__(self, message: str, last_good: int | None = None):
        super().__init__(message)
        self.last_good = last_good


def steps(directory) -> list[int]:
    """The steps with a finished checkpoint in `directory`, ascending; an unreadable one still counts."""
    directory = Path(directory)
    if not directory.is_dir():
        return []
    return sorted(int(p.name) for p in directory.iterdir() if p.is_dir() and p.name.isdigit())


def save(directory, state: TrainState, keep: int = 3) -> int:
    """Write the state under its own step, drop all but the newest `keep`, and return the step.

    A checkpoint of the same step is left as it is: the step is a function of nothing else. Raises OSError where
    the directory cannot be written; earlier checkpoints stay.
    """
    import orbax.checkpoint as ocp

    step = int(state.step)
    items = {name: getattr(state, name) for name in ITEMS if jax.tree.leaves(getattr(state, name))}
    with _manager(directory, keep) as manager:
        if step not in manager.all_steps():
            manager.save(step, args=ocp.args.Composite(**{k: ocp.args.StandardSave(v) for k, v in items.items()}))
    return step


def restore(directory, like: TrainState) -> TrainState:
    """The newest checkpoint that can be read, in the structure, shapes and placement of `like`.

    Walks downward past damaged ones with a warning each. Raises CheckpointError if there are none, if all are damaged,
    or if they are of another model or optimiser.
    """
    names = [name for name in ITEMS if jax.tree.leaves(getattr(like, name))]
    step, items, damaged = _newest(directory, {name: getattr(like, name) for name in names}, steps(directory))
    for bad, reason in damaged.items():
        warnings.warn(f"checkpoint {bad} in {directory} is damaged ({reason}); going on from {step}", stacklevel=2)
    return like.replace(step=jnp.asarray(step, jnp.int32), **items)


def restore_ema(directory, like: Any, step: int | None = None) -> tuple[int, Any]:
    """(step, averaged parameters) of the newest checkpoint, or of `step`: what sampling needs, without the rest.

    Raises CheckpointError if it is missing, damaged (with `last_good` set) or of another model.
    """
    found = steps(directory)
    if step is not None and step not in found:
        raise CheckpointError(f"no checkpoint {step} in {directory}; there are {', '.join(map(str, found)) or 'none'}")
    good, items, damaged = _newest(directory, dict(ema=like), found if step is None else [step])
    if damaged:
        bad, reason = next(iter(damaged.items()))
        raise CheckpointError(
            f"checkpoint {bad} in {directory} is damaged ({reason}); the last good one is {good}", good
        )
    return good, items["ema"]


def set_aside(directory, after: int) -> None:
    """Rename the checkpoints of steps above `after` to STEP.damaged, so that those steps can be saved again."""
    for step in steps(directory):
        if step > after:
            source = Path(directory) / str(step)
            target = source.with_suffix(".damaged")
            source.rename(target if not target.exists() else source.with_suffix(f".damaged.{time.time_ns()}"))


def _newest(directory, like: dict, candidates: list[int]) -> tuple[int, dict, dict[int, str]]:
    """(step, items, {damaged step: why}) for the newest of the candidates that can be read."""
    import orbax.checkpoint as ocp

    if not candidates:
        raise CheckpointError(f"no checkpoints in {directory}; train first, or name another run directory")
    abstract = jax.tree.map(ocp.utils.to_shape_dtype_struct, like)
    args = ocp.args.Composite(**{name: ocp.args.StandardRestore(tree) for name, tree in abstract.items()})
    damaged = {}
    with _manager(directory, None) as manager:
        for step in reversed(candidates):
            try:
                stored = manager.item_metadata(step)
                difference = _difference({name: stored[name] for name in like}, like)
                if not difference:
                    items = manager.restore(step, args=args)
                    return step, {name: items[name] for name in like}, damaged
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                damaged[step] = (str(error).strip() or type(error).__name__).splitlines()[0][:120]
                continue
            raise CheckpointError(f"checkpoint {step} in {directory} is of another model or optimizer: {difference}")
    raise CheckpointError(f"every checkpoint in {directory} is damaged (steps {', '.join(map(str, candidates))})")


def _difference(stored: dict, like: dict) -> str | None:
    """What differs between stored and expected trees, in a few words; None if nothing does."""
    ours, theirs = _shapes(like), {}
    for name, metadata in stored.items():
        if metadata is None:
            raise ValueError(f"{name} is missing")
        theirs |= _shapes({name: getattr(metadata, "tree", metadata)})
    missing, extra = sorted(set(ours) - set(theirs)), sorted(set(theirs) - set(ours))
    wrong = [k for k in ours if k in theirs and ours[k] != theirs[k]]
    for label, names in (("missing", missing), ("unexpected", extra)):
        if names:
            return f"{label} {names[0]}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    if wrong:
        return f"{wrong[0]} has shape {theirs[wrong[0]]}, expected {ours[wrong[0]]}"
    return None


def _shapes(tree) -> dict[str, tuple]:
    """{path: shape} over the leaves, the path written alike for attributes, keys and indices."""

    def name(key):
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return {".".join(map(name, path)): tuple(leaf.shape) for path, leaf in leaves}


@contextlib.contextmanager
def _manager(directory, keep):
    import orbax.checkpoint as ocp

    logging.getLogger("absl").setLevel(logging.ERROR)
    options = ocp.CheckpointManagerOptions(
        max_to_keep=keep, create=True, cleanup_tmp_directories=keep is not None, enable_async_checkpointing=False
    )
    handlers = {name: ocp.StandardCheckpointHandler() for name in ITEMS}
    manager = ocp.CheckpointManager(Path(directory).resolve(), options=options, item_handlers=handlers)
    try:
        yield manager
    finally:
        manager.close()
