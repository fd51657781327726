"""Checkpoints on Orbax: atomic, one directory a step, the newest good one restored.

`DIR/STEP/{params, ema, opt_state, extra}`. A directory appears under its final name only when it is complete. It holds
a CRC-32 of each array that a process holds whole: Orbax notices a file that is cut or gone, but not a flipped bit.
"""

import contextlib
import errno
import json
import logging
import time
import warnings
import zlib
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.parallel import anywhere, unstack
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


def save(
    directory, state: TrainState, keep: int | None = 3, *, keep_every: int | None = None, note: dict | None = None
) -> int:
    """Write the state under its own step, drop all but the newest `keep` up to it (None: none), return the step.

    Steps that are multiples of `keep_every` stay. A pmapped state is saved as one copy. A checkpoint of the same step
    is left as it is: the step is a function of nothing else; those of later steps are not touched (see `set_aside`).
    `note`: what else belongs to it, as JSON can hold it (see `read_note`). Under several processes all of them call
    this. Raises ValueError unless keep and keep_every >= 1, and OSError where the directory cannot be written; earlier
    checkpoints stay.
    """
    with Writer(directory, keep, keep_every) as writer:
        return writer.save(state, note)


class Writer:
    """Writes checkpoints as `save` does, but in the background: `save` returns as soon as the state is on the host.

    Use it in a `with`: leaving it waits for the last one. At most one is being written; what is older than the kept
    ones goes only when a newer one is complete.
    """

    def __init__(self, directory, keep: int | None = 3, keep_every: int | None = None):
        if keep is not None and keep < 1:
            raise ValueError(f"keep is a number of checkpoints, at least 1, or None for all; got {keep}")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every is a number of steps, at least 1, or None; got {keep_every}")
        self._directory, self._keep, self._keep_every = Path(directory), keep, keep_every
        self._manager, self._step = None, None

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def save(self, state: TrainState, note: dict | None = None) -> int:
        """Begin to write the state, once the one before is complete; its step. Raises OSError if that one failed."""
        import orbax.checkpoint as ocp

        if jnp.ndim(state.step):
            state = unstack(state)
        step = int(state.step)
        items = {name: jax.tree.map(_host, getattr(state, name)) for name in ITEMS}
        items = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
        self.wait()
        with _quiet(), _writing(self._directory, step):
            if self._manager is None:
                self._manager = _open(self._directory, write=True)
            if step not in self._manager.all_steps():
                about = dict(items=list(items), crc32=_checksums(items), note=note or {})
                # force: Orbax drops without a word what is older than its newest checkpoint
                args = ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()})
                self._manager.save(step, args=args, force=True, custom_metadata=about)
            self._step = step
        return step

    def wait(self) -> None:
        """Wait until the checkpoint being written is complete. Raises OSError if it could not be written."""
        if self._step is None:
            return
        step, self._step = self._step, None
        with _quiet(), _writing(self._directory, step):
            self._manager.wait_until_finished()
            found = sorted(s for s in self._manager.all_steps() if s <= step)
            for old in found[: -self._keep if self._keep else 0]:
                if not self._keep_every or old % self._keep_every:
                    self._manager.delete(old)

    def close(self) -> None:
        """Wait as `wait` does, and let go of the directory."""
        try:
            self.wait()
        finally:
            if self._manager is not None:
                manager, self._manager = self._manager, None
                with _quiet(), _writing(self._directory, None):
                    manager.close()


def read_note(directory, step: int) -> dict:
    """What `save` was given as `note` with the checkpoint of this step; {} where there is none."""
    return _about(Path(directory), step).get("note", {})


def restore(directory, like: TrainState, step: int | None = None) -> TrainState:
    """The newest checkpoint that can be read, or that of `step`, in the structure, shapes and dtypes of `like`.

    Arrays that are committed to devices in `like` are placed as they are there, all others left uncommitted, as a new
    state is. Walks downward past damaged checkpoints with a warning each; a damaged one that was asked for by `step` is
    an error. Raises CheckpointError if there is none, if all are damaged (`last_good` is set where there is another),
    or if they are of another model or optimizer.
    """
    if jnp.ndim(like.step):
        raise CheckpointError("like is a pmapped state; restore into the single one, then parallel.stack the result")
    trees = {name: getattr(like, name) for name in ITEMS}
    good, items, damaged = _newest(directory, trees, step)
    if step is not None:
        _check_undamaged(directory, good, damaged)
    for bad, reason in damaged.items():
        warnings.warn(f"checkpoint {bad} in {directory} is damaged ({reason}); going on from {good}", stacklevel=2)
    return like.replace(step=_place(like.step, np.asarray(good, np.int32)), **items)


def restore_ema(directory, like: Any, step: int | None = None) -> tuple[int, Any]:
    """(step, averaged parameters) of the newest checkpoint, or of `step`: what sampling needs, without the rest.

    Raises CheckpointError if it is missing, damaged (with `last_good` set) or of another model.
    """
    good, items, damaged = _newest(directory, dict(ema=like), step)
    _check_undamaged(directory, good, damaged)
    return good, items["ema"]


def set_aside(directory, after: int) -> None:
    """Rename the checkpoints of steps above `after` to STEP.damaged, so that those steps can be saved again."""
    for step in steps(directory):
        if step > after:
            source = Path(directory) / str(step)
            target = source.with_suffix(".damaged")
            source.rename(target if not target.exists() else source.with_suffix(f".damaged.{time.time_ns()}"))


# ---------------------------------------------------------------- reading


def _newest(directory, like: dict, step: int | None) -> tuple[int, dict, dict[int, str]]:
    """(step, items, {damaged step: why}) for the newest checkpoint, up to `step`, that can be read."""
    found = steps(directory)
    if step is not None and step not in found:
        raise CheckpointError(f"no checkpoint {step} in {directory}; there are {', '.join(map(str, found)) or 'none'}")
    candidates = [s for s in found if step is None or s <= step]
    if not candidates:
        raise CheckpointError(f"no checkpoints in {directory}; train first, or name another run directory")
    damaged = {}
    with _manager(directory) as manager:
        for candidate in reversed(candidates):
            difference, items = None, None
            try:
                difference = _difference(_stored_shapes(manager, candidate, like), _shapes(like))
                if not difference:
                    items = _read(manager, candidate, like)
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                damaged[candidate] = f"{type(error).__name__}: {error}".splitlines()[0][:120]
            if anywhere(candidate in damaged):  # all processes go on from one step
                damaged.setdefault(candidate, "another process could not read it")
                continue
            if items is not None:
                return candidate, items, damaged
            raise CheckpointError(
                f"checkpoint {candidate} in {directory} is of another model or optimizer: {difference}"
            )
    reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in damaged.items())
    upto = "" if step is None else f" up to step {step}"
    raise CheckpointError(f"every checkpoint in {directory}{upto} is damaged ({reasons})")


def _check_undamaged(directory, good: int, damaged: dict[int, str]) -> None:
    for bad, reason in damaged.items():
        raise CheckpointError(
            f"checkpoint {bad} in {directory} is damaged ({reason}); the last good one is {good}", good
        )


def _read(manager, step: int, like: dict) -> dict:
    """The items of one checkpoint, placed as in `like`. Raises whatever is wrong with a damaged one."""
    import orbax.checkpoint as ocp

    like, empty = _with_leaves(like)
    arguments = {
        name: ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(_restore_args, tree))
        for name, tree in like.items()
    }
    restored = manager.restore(step, args=ocp.args.Composite(**arguments))
    items = {name: restored[name] for name in like}
    sums = _about(manager.directory, step).get("crc32", {})
    for path, found in _checksums(items).items():
        if sums.get(path, found) != found:
            raise ValueError(f"{path} does not match its checksum")
    return {name: jax.tree.map(_place, like[name], items[name]) for name in like} | empty


def _read_through(item: Path) -> None:
    """Read an item's files in turn: Orbax reads them all at once, and litters stderr when one is damaged."""
    import tensorstore as ts

    if not (item / "manifest.ocdbt").is_file():
        raise ValueError(f"{item.name} is incomplete")
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result()
    for key in store.list().result():
        store.read(key).result()


def _restore_args(leaf):
    """Read to the host, to check and place it there, unless other processes hold parts of the array."""
    import orbax.checkpoint as ocp

    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return ocp.ArrayRestoreArgs(sharding=leaf.sharding, global_shape=leaf.shape, dtype=leaf.dtype)
    return ocp.RestoreArgs(restore_type=np.ndarray)


def _place(leaf, value):
    if isinstance(value, jax.Array):
        return value
    value = jnp.array(value, leaf.dtype, copy=True)
    sharding = getattr(leaf, "sharding", None)
    return jax.device_put(value, sharding) if sharding is not None and getattr(leaf, "committed", True) else value


# ---------------------------------------------------------------- what a checkpoint says of itself


def _host(leaf):
    """The leaf as NumPy, which any number of devices can read; as it is if other processes hold parts of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(leaf.addressable_data(0)) if leaf.is_fully_replicated else leaf
    return np.asarray(leaf)


def _checksums(items: dict) -> dict[str, int]:
    """{path: CRC-32} of the NumPy leaves."""
    return {path: zlib.crc32(leaf.tobytes()) for path, leaf in _leaves(items) if isinstance(leaf, np.ndarray)}


def _about(directory, step: int) -> dict:
    """What `save` noted: items, checksums, note; empty where that is lost, which harms nothing but the check."""
    path = Path(directory) / str(step) / "_CHECKPOINT_METADATA"
    try:  # not by manager.metadata, which opens all arrays first
        return json.loads(path.read_text())["custom_metadata"] or {}
    except (OSError, ValueError, KeyError):
        return {}


def _stored_shapes(manager, step: int, like: dict) -> dict[str, tuple]:
    """{path: shape} of those stored items that `like` names."""
    directory = Path(manager.directory) / str(step)
    stored = _about(manager.directory, step).get("items") or [name for name in ITEMS if (directory / name).is_dir()]
    names = [name for name in stored if name in like]
    for name in names:
        _read_through(directory / name)
    metadata = manager.item_metadata(step)
    shapes = {}
    for name in names:
        if metadata[name] is None:
            raise ValueError(f"{name} is incomplete")
        shapes |= _shapes({name: getattr(metadata[name], "tree", metadata[name])})
    return shapes


def _difference(stored: dict[str, tuple], like: dict[str, tuple]) -> str | None:
    """What differs between stored and expected shapes, in a few words; None if nothing does."""
    for label, names in (("missing", like.keys() - stored.keys()), ("unexpected", stored.keys() - like.keys())):
        if names:
            return f"{label} {min(names)}" + (f" and {len(names) - 1} more" if len(names) > 1 else "")
    for path in like:
        if like[path] != stored[path]:
            return f"{path} has shape {stored[path]}, expected {like[path]}"
    return None


def _shapes(tree) -> dict[str, tuple]:
    return {path: tuple(leaf.shape) for path, leaf in _leaves(tree)}


def _leaves(tree):
    """(path, leaf) pairs, the path written alike for attributes, keys and indices."""

    def name(key):
        return str(getattr(key, "name", getattr(key, "key", getattr(key, "idx", key))))

    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(".".join(map(name, path)), leaf) for path, leaf in leaves]


def _with_leaves(trees: dict) -> tuple[dict, dict]:
    """The trees that have leaves, and those that have none: Orbax stores no empty ones."""
    full = {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
    return full, {name: tree for name, tree in trees.items() if name not in full}


@contextlib.contextmanager
def _manager(directory):
    """An Orbax manager to read with, that keeps quiet."""
    with _quiet():
        manager = _open(directory, write=False)
        try:
            yield manager
        finally:
            manager.close()


def _open(directory, write: bool):
    """An Orbax manager; one that writes does so in the background, and removes first what a killed save has left."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=None, create=write, cleanup_tmp_directories=write, enable_async_checkpointing=write
    )
    handlers = {name: ocp.PyTreeCheckpointHandler(use_ocdbt=True) for name in ITEMS}
    return ocp.CheckpointManager(Path(directory).resolve(), options=options, item_handlers=handlers)


@contextlib.contextmanager
def _quiet():
    logger = logging.getLogger("absl")
    level = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextlib.contextmanager
def _writing(directory, step):
    """Name the file system's failures, of which TensorStore makes ValueErrors, as what they are to the user."""
    try:
        yield
    except (OSError, ValueError) as error:
        text = " ".join(str(error).split())
        kept = [s for s in steps(directory) if s != step]
        full = "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC
        why = "the disk is full" if full else getattr(error, "strerror", None) or text[:200]
        good = f"earlier checkpoints are intact, the last is {kept[-1]}" if kept else "there is no earlier one"
        what = f"checkpoint {step}" if step is not None else "checkpoints"
        raise OSError(f"cannot write {what} in {directory}: {why}; {good}") from error
