"""Checkpoints on Orbax: each is one directory, which is complete or not there; the newest good one is restored.

A checkpoint is `DIR/STEP/{params, ema, opt_state, extra}`. The directory gets its final name only when it is complete.

Orbax notices a file that is cut short or gone. It does not notice a flipped bit, nor a directory that was renamed or
put in the place of another one. So each checkpoint holds a record: its step, its items, a CRC-32 of each array, the
note, and a CRC-32 of the record itself. An array that several processes hold in parts has a CRC-32 for each part. They
can be compared where the parts are the same, or where one process holds the whole array. A checkpoint that cannot be
compared is reported as unverified.
"""

import contextlib
import dataclasses
import errno
import json
import logging
import os
import re
import shutil
import sys
import time
import warnings
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.trees import named_leaves, named_shapes, shape_difference
from jdiff.train.parallel import anywhere, unstack
from jdiff.train.step import TrainState

ITEMS = ("params", "ema", "opt_state", "extra")
DOT = "."  # between the names of a leaf in records, which earlier versions have written so


class CheckpointError(ValueError):
    """There is no checkpoint that can be used as asked; `last_good` is a step that can be used, or None."""

    def __init__(self, message: str, last_good: int | None = None):
        super().__init__(message)
        self.last_good = last_good


class CheckpointWarning(UserWarning):
    """A checkpoint was passed over, or it is used although a part of it could not be verified."""


def steps(directory) -> list[int]:
    """The steps with a finished checkpoint in `directory`, ascending; an unreadable one still counts."""
    return [step for step, path in _named(directory).items() if path.is_dir()]


def save(
    directory, state: TrainState, keep: int | None = 3, *, keep_every: int | None = None, note: dict | None = None
) -> int:
    """Write the state as the checkpoint of its step, and delete old checkpoints.

    Under several processes all of them call this. A pmapped state is saved as one copy. A checkpoint of the same step
    is left as it is, because a run has one state at each step. Checkpoints of later steps stay too (see `set_aside`).

    Args:
        directory: the directory of the checkpoints.
        state: the state.
        keep: how many checkpoints stay, the newest up to this step; None for all.
        keep_every: checkpoints of steps that are multiples of it stay as well; None for no others.
        note: what else belongs to the checkpoint, as JSON can hold it (see `read_note`).

    Returns:
        The step.

    Raises:
        ValueError: keep or keep_every is below 1.
        OSError: the directory cannot be written; earlier checkpoints are intact.
    """
    with Writer(directory, keep, keep_every) as writer:
        return writer.save(state, note)


class Writer:
    """Writes checkpoints in the background: `save` returns as soon as the state is on the host.

    Use it in a `with` statement, whose end waits for the last checkpoint. At most one checkpoint is being written at a
    time, and old ones are deleted only when a newer one is complete.

    Args:
        directory, keep, keep_every: as for the function `save`.

    Raises:
        ValueError: keep or keep_every is below 1.
    """

    def __init__(self, directory, keep: int | None = 3, keep_every: int | None = None):
        if keep is not None and keep < 1:
            raise ValueError(f"keep is a number of checkpoints, at least 1, or None for all; got {keep}")
        if keep_every is not None and keep_every < 1:
            raise ValueError(f"keep_every is a number of steps, at least 1, or None; got {keep_every}")
        self._directory, self._keep, self._keep_every = Path(directory), keep, keep_every
        self._manager: Any = None  # Orbax's, from the first `save` to `close`
        self._step: int | None = None  # which is being written
        self._background = contextlib.ExitStack()  # of what holds from the first `save` to `close`

    def __enter__(self) -> "Writer":
        return self

    def __exit__(self, *error) -> None:
        self.close()

    def save(self, state: TrainState, note: dict | None = None) -> int:
        """Begin to write the state, once the checkpoint before is complete.

        Args:
            state, note: as for the function `save`.

        Returns:
            The step of the state.

        Raises:
            OSError: the checkpoint before, or the beginning of this one, could not be written.
        """
        import orbax.checkpoint as ocp

        if jnp.ndim(state.step):
            state = unstack(state)
        step = int(state.step)
        items = {name: jax.tree.map(_host, getattr(state, name)) for name in ITEMS}
        items = {name: tree for name, tree in items.items() if jax.tree.leaves(tree)}
        self.wait()
        with _quiet(), _writing(self._directory, step):
            if self._manager is None:
                self._background.enter_context(_quiet())
                if jax.process_index() == 0:
                    remove_unfinished(self._directory)
                    if _hollow(self._directory / str(step)):
                        _put_aside(self._directory / str(step))
                anywhere(False)  # all see the same directory
                self._manager = _open(self._directory)
            if step not in self._manager.all_steps():
                about = _record(step, items, note)
                # force: Orbax drops without a word what is older than its newest checkpoint
                args = ocp.args.Composite(**{name: ocp.args.PyTreeSave(tree) for name, tree in items.items()})
                self._manager.save(step, args=args, force=True, custom_metadata=about)
            self._step = step
        return step

    def wait(self) -> None:
        """Wait until the checkpoint that is being written is complete.

        Raises:
            OSError: it could not be written.
        """
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
        """Wait as `wait` does, then release the directory."""
        with self._background:
            try:
                self.wait()
            finally:
                if self._manager is not None:
                    manager, self._manager = self._manager, None
                    with _writing(self._directory, None):
                        manager.close()


def read_note(directory, step: int) -> dict:
    """The note that `save` wrote with the checkpoint of this step; {} if there is none."""
    return _about(Path(directory) / str(step)).get("note", {})


def restore(directory, like: TrainState, step: int | None = None) -> TrainState:
    """Restore the newest checkpoint that can be read, or the checkpoint of `step`.

    A damaged checkpoint is passed over with a `CheckpointWarning`, and the one before it is tried. There is a warning,
    too, where a part of the result could not be verified: in checkpoints of earlier versions, the step.

    Args:
        directory: the directory of the checkpoints.
        like: a state of the structure, shapes and dtypes that the result has. Arrays that are committed to devices in
            it are placed in the same way; all others are left uncommitted, as those of a new state.
        step: the step to restore; None for the newest.

    Raises:
        CheckpointError: there is no checkpoint, all are damaged, the one of `step` is damaged (then `last_good` is set
            where there is another), or they are of another model or optimiser.
    """
    if jnp.ndim(like.step):
        raise CheckpointError("like is a pmapped state; restore into the single one, then parallel.stack the result")
    good, items = _newest(directory, {name: getattr(like, name) for name in ITEMS}, step)
    return like.replace(step=_place(like.step, np.asarray(good, np.int32)), **items)


def restore_ema(directory, like: Any, step: int | None = None) -> tuple[int, Any]:
    """Restore the averaged parameters alone, which are what sampling needs.

    What holds nothing, such as an empty directory, is passed over with a `CheckpointWarning`. A damaged checkpoint is
    not: nobody samples from an older model without having asked for it.

    Args:
        directory: the directory of the checkpoints.
        like: a tree of the structure, shapes and dtypes of the average.
        step: the step to restore; None for the newest.

    Returns:
        (step, averaged parameters).

    Raises:
        CheckpointError: the checkpoint is missing, damaged (then `last_good` is set) or of another model.
    """
    good, items = _newest(directory, dict(ema=like), step, strict=True)
    return good, items["ema"]


def set_aside(directory, after: int) -> None:
    """Rename the checkpoints of steps above `after` to STEP.damaged, so that those steps can be saved again."""
    for step, path in _named(directory).items():
        if step > after:
            _put_aside(path)


# ---------------------------------------------------------------- reading


def _newest(directory, like: dict, step: int | None, strict: bool = False) -> tuple[int, dict]:
    """(step, items) of the newest checkpoint up to `step` that can be read, with a warning for each one passed over.

    Raises CheckpointError if the one of `step` is damaged; with `strict`, if any that holds something is damaged.
    """
    named = _named(directory)
    if step is not None and step not in named:
        found = ", ".join(map(str, steps(directory))) or "none"
        raise CheckpointError(f"no checkpoint {step} in {directory}; there are {found}")
    candidates = [s for s in named if step is None or s <= step]
    if not candidates:
        raise CheckpointError(f"no checkpoints in {directory}; train first, or name another run directory")
    damaged, fatal = {}, set()
    with _quiet():
        for candidate in reversed(candidates):
            path, difference, doubt, hollow = named[candidate], None, None, None
            items: dict[str, Any] = {}
            try:
                if hollow := _hollow(path):
                    raise _Damaged(hollow)
                about = _about(path)
                _check_record(about, candidate)
                difference = shape_difference(_stored_shapes(path, about, like), named_shapes(like, DOT))
                if not difference:
                    items, doubt = _read(path, about, like)
            except Exception as error:  # Orbax and TensorStore raise many kinds for a damaged file
                kind = "" if isinstance(error, _Damaged) else f"{type(error).__name__}: "
                damaged[candidate] = f"{kind}{error}".splitlines()[0][:120]
            if anywhere(candidate in damaged):  # all processes go on from one step
                damaged.setdefault(candidate, "another process could not read it")
                if candidate == step or strict and not hollow:
                    fatal.add(candidate)
                continue
            if difference:
                raise CheckpointError(
                    f"checkpoint {candidate} in {directory} is of another model or optimizer: {difference}"
                )
            for bad, reason in damaged.items():
                if bad in fatal:
                    raise CheckpointError(
                        f"checkpoint {bad} in {directory} is damaged ({reason}); the last good one is {candidate}",
                        candidate,
                    )
                _warn(f"checkpoint {bad} in {directory} is damaged ({reason}); going on from {candidate}")
            if doubt:
                _warn(f"checkpoint {candidate} in {directory} is unverified: {doubt}")
            return candidate, items
    reasons = "; ".join(f"step {bad}: {reason}" for bad, reason in damaged.items())
    upto = "" if step is None else f" up to step {step}"
    raise CheckpointError(f"every checkpoint in {directory}{upto} is damaged ({reasons})")


class _Damaged(ValueError):
    """Damage that this module found; its text says enough without the name of the error."""


def _warn(text: str) -> None:
    warnings.warn(text, CheckpointWarning, stacklevel=4)  # at the caller of `restore`


def _read(path: Path, about: dict, like: dict) -> tuple[dict, str | None]:
    """(items of the checkpoint at `path`, placed as in `like`; what could not be verified, or None).

    A damaged checkpoint raises an error of any kind.
    """
    import orbax.checkpoint as ocp

    like, empty = _with_leaves(like)
    items = {}
    for name, tree in like.items():
        arguments = ocp.args.PyTreeRestore(tree, restore_args=jax.tree.map(_restore_args, tree))
        items[name] = _handler().restore(_orbax_path(path / name), args=arguments)
    doubt = _verify(about, items)
    return {name: jax.tree.map(_place, like[name], items[name]) for name in like} | empty, doubt


def _read_through(item: Path) -> None:
    """Read the files of an item in turn: Orbax reads all at once, and fills stderr when one of them is damaged."""
    import tensorstore as ts

    if not (item / "manifest.ocdbt").is_file():
        raise _Damaged(f"{item.name} is incomplete")
    store = ts.KvStore.open({"driver": "ocdbt", "base": {"driver": "file", "path": f"{item}/"}}).result()
    for key in store.list().result():
        store.read(key).result()


def _restore_args(leaf):
    """Arguments that read an array to the host, where it is checked and placed; or, if others hold parts, in place."""
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
    """The leaf as a NumPy array, or unchanged if other processes hold parts of it."""
    if isinstance(leaf, jax.Array) and not leaf.is_fully_addressable:
        return np.asarray(leaf.addressable_data(0)) if leaf.is_fully_replicated else leaf
    return np.asarray(leaf)


def _checksum(leaf) -> int | dict[str, int]:
    """The CRC-32 of an array that this process holds whole; of any other, {part: CRC-32} of the parts it holds."""
    if isinstance(leaf, np.ndarray):
        return zlib.crc32(leaf.tobytes())
    sums = {}
    for shard in leaf.addressable_shards:
        ranges = [s.indices(n)[:2] for s, n in zip(shard.index, leaf.shape, strict=True)]
        sums[",".join(f"{start}:{stop}" for start, stop in ranges)] = zlib.crc32(np.asarray(shard.data).tobytes())
    return sums


def _matches(leaf, noted) -> bool | None:
    """Whether an array matches the checksum that was noted; None if they cannot be compared."""
    if isinstance(leaf, np.ndarray) and isinstance(noted, dict):
        parts = {part: tuple(slice(*map(int, one.split(":"))) for one in part.split(",")) for part in noted}
        return all(_checksum(leaf[parts[part]]) == crc for part, crc in noted.items())
    found = _checksum(leaf)
    if isinstance(found, dict) and isinstance(noted, dict):
        known = found.keys() & noted.keys()
        same = all(found[part] == noted[part] for part in known)
        return None if same and len(known) < len(found) else same
    return found == noted if isinstance(found, int) and isinstance(noted, int) else None


def _checksums(items: dict) -> dict[str, int | dict[str, int]]:
    """{name: checksum}, with the parts of all processes; all of them call this together."""
    sums = {path: _checksum(leaf) for path, leaf in named_leaves(items, DOT).items()}
    in_parts = {path: parts for path, parts in sums.items() if isinstance(parts, dict)}
    if in_parts:
        from jax.experimental.multihost_utils import process_allgather

        text = np.frombuffer(json.dumps(in_parts).encode(), np.uint8)
        longest = process_allgather(np.int32(text.size)).max()
        for row in process_allgather(np.pad(text, (0, longest - text.size), constant_values=ord(" "))):
            for path, parts in json.loads(row.tobytes()).items():
                sums[path] |= parts
    return sums


def _record(step: int, items: dict, note: dict | None) -> dict:
    """The record of a checkpoint, as it is after a round trip through JSON."""
    record = dict(step=step, items=list(items), crc32=_checksums(items), note=note or {})
    record = json.loads(json.dumps(record))
    return record | dict(record_crc32=_record_checksum(record))


def _record_checksum(record: dict) -> int:
    parts = {name: part for name, part in record.items() if name != "record_crc32"}
    return zlib.crc32(json.dumps(parts, sort_keys=True).encode())


def _check_record(about: dict, step: int) -> None:
    """Raise if the record is damaged or of another step; records of earlier versions say neither."""
    if "step" not in about and "record_crc32" not in about:
        return
    if about.get("record_crc32") != _record_checksum(about):
        raise _Damaged("its record does not match its checksum")
    if about["step"] != step:
        raise _Damaged(f"it holds step {about['step']}, not {step}: it was renamed; rename it back")


def _verify(about: dict, items: dict) -> str | None:
    """What could not be verified, in a few words, or None. Raises if an array does not match its checksum."""
    sums = about.get("crc32", {})
    match = {path: _matches(_host(leaf), sums.get(path)) for path, leaf in named_leaves(items, DOT).items()}
    wrong, unknown = ([path for path in match if match[path] is answer] for answer in (False, None))
    if wrong:
        raise _Damaged(f"{min(wrong)} does not match its checksum")
    if not sums:
        return "its checksums are missing"
    if unknown:
        return f"{len(unknown)} of {len(match)} arrays have no checksum to compare with"
    return None if "step" in about else "it is of an earlier version, which took the step from the directory's name"


def _about(path: Path) -> dict:
    """The record of the checkpoint at `path`; empty if it is lost, and then nothing can be verified."""
    try:  # not by manager.metadata, which opens all arrays first
        about = json.loads((path / "_CHECKPOINT_METADATA").read_text())["custom_metadata"]
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return {}
    kinds = dict(items=list, crc32=dict, note=dict)
    right = isinstance(about, dict) and all(isinstance(about.get(name, kind()), kind) for name, kind in kinds.items())
    return about if right else {}


def _named(directory) -> dict[int, Path]:
    """{step: path}, ascending, of whatever has the name of a step: also of a file, or of a link to nothing."""
    directory = Path(directory)
    paths = directory.iterdir() if directory.is_dir() else ()
    found = {int(path.name): path for path in paths if re.fullmatch("0|[1-9][0-9]{0,9}", path.name)}
    return {step: found[step] for step in sorted(found) if step < 2**31}


def _hollow(path: Path) -> str | None:
    """Why what is at a path is no checkpoint at all; None if it is one, or if nothing is there."""
    if path.is_dir():
        return None if any((path / name).is_dir() for name in ITEMS) else "nothing is stored in it"
    if path.is_symlink():
        return "it is a link to nothing"
    return "it is not a directory" if path.exists() else None


def remove_unfinished(directory) -> list[Path]:
    """Remove the checkpoints in `directory` whose writing failed or was killed.

    Nobody may be writing there. After a failure in this process, threads of TensorStore may go on for a moment: a
    folder that they fill again is removed again, for up to 10 seconds.

    Returns:
        What was removed.

    Raises:
        OSError: one of them could not be removed.
    """
    directory, until = Path(directory), time.monotonic() + 10
    paths = sorted(directory.iterdir()) if directory.is_dir() else ()
    paths = [path for path in paths if re.fullmatch(r"\d+\.orbax-checkpoint-tmp(-\d+)?", path.name)]
    paths = [path for path in paths if path.is_dir() and not path.is_symlink()]
    for path in paths:
        while path.exists():
            try:
                shutil.rmtree(path)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.ENOENT) or time.monotonic() > until:
                    raise
                time.sleep(0.1)
    return paths


def _put_aside(path: Path) -> None:
    target = path.with_suffix(".damaged")
    path.rename(target if not os.path.lexists(target) else path.with_suffix(f".damaged.{time.time_ns()}"))


def _stored_shapes(path: Path, about: dict, like: dict) -> dict[str, tuple]:
    """{name: shape} of the items in the checkpoint at `path` that `like` names."""
    always = [name for name in ("params", "ema") if jax.tree.leaves(like.get(name))]
    stored = about.get("items") or [name for name in ITEMS if (path / name).is_dir() or name in always]
    names = [name for name in stored if name in like]
    for name in names:
        _read_through(path / name)
    trees = {name: _handler().metadata(_orbax_path(path / name)).tree for name in names}
    return named_shapes(trees, DOT)


def _with_leaves(trees: dict) -> tuple[dict, dict]:
    """(the trees with leaves, the trees without), because Orbax stores no empty ones."""
    full = {name: tree for name, tree in trees.items() if jax.tree.leaves(tree)}
    return full, {name: tree for name, tree in trees.items() if name not in full}


def _handler():
    """What reads and writes an item. Orbax's manager does not read here, because it opens all other steps first."""
    import orbax.checkpoint as ocp

    return ocp.PyTreeCheckpointHandler(use_ocdbt=True)


def _orbax_path(path: Path):
    from etils import epath

    return epath.Path(path.resolve())


def _open(directory):
    """An Orbax manager that writes in the background, and first removes what a killed save left behind."""
    import orbax.checkpoint as ocp

    options = ocp.CheckpointManagerOptions(
        max_to_keep=None, create=True, cleanup_tmp_directories=True, enable_async_checkpointing=True
    )
    return ocp.CheckpointManager(
        Path(directory).resolve(), options=options, item_handlers={name: _handler() for name in ITEMS}
    )


@contextlib.contextmanager
def _quiet():
    """Keep the reports of Orbax and TensorStore off stderr, because this module says once what went wrong.

    After an error their threads may have more to report, so they are kept quiet from then on.
    """
    hook = sys.unraisablehook
    if not isinstance(hook, _Hook):
        hook = sys.unraisablehook = _Hook(hook)
        logging.getLogger("absl").addFilter(_not_of_orbax)
    hook.users += 1
    try:
        yield
    except BaseException:
        hook.users += 1  # never to be taken back
        raise
    finally:
        hook.users -= 1
        if not hook.users:
            logging.getLogger("absl").removeFilter(_not_of_orbax)
            if sys.unraisablehook is hook:
                sys.unraisablehook = hook.before


def _not_of_orbax(record: logging.LogRecord) -> bool:
    return "orbax" not in record.pathname


@dataclasses.dataclass
class _Hook:
    """A `sys.unraisablehook` that is silent about results which come after Orbax has given up; else it calls `before`.

    Orbax closes its event loop at the first array that fails, while TensorStore's threads still work on the others.
    Each of them then calls `loop.call_soon_threadsafe(callback, a tensorstore.Future, ...)` on the closed loop. The
    call comes from C++, where nobody can catch the RuntimeError "Event loop is closed".
    """

    before: Callable
    users: int = 0

    def __call__(self, unraisable) -> None:
        error, trace = unraisable.exc_value, unraisable.exc_traceback
        if isinstance(error, RuntimeError) and str(error) == "Event loop is closed" and trace is not None:
            outermost = trace.tb_frame
            arguments = outermost.f_locals.get("args") or (None,)
            if outermost.f_code.co_name == "call_soon_threadsafe" and type(arguments[0]).__module__ == "tensorstore":
                return
        self.before(unraisable)


@contextlib.contextmanager
def _writing(directory, step):
    """Raise one OSError with a clear line for failures of the file system, some of which come as ValueErrors."""
    try:
        yield
    except (OSError, ValueError, TypeError, RecursionError) as error:
        text = " ".join(str(error).split())
        kept = [s for s in steps(directory) if step is None or s < step]
        full = "No space left" in text or getattr(error, "errno", None) == errno.ENOSPC
        why = "the disk is full" if full else getattr(error, "strerror", None) or text[:200]
        good = f"earlier checkpoints are intact, the last is {kept[-1]}" if kept else "there is no earlier one"
        what = f"checkpoint {step}" if step is not None else "checkpoints"
        raise OSError(f"cannot write {what} in {directory}: {why}; {good}") from error
