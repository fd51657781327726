"""One trainer at a time in a run directory, and the remains of those that were killed."""

import contextlib
import datetime
import errno
import json
import os
import secrets
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jdiff.core import files, foreign
from jdiff.runs.signals import end
from jdiff.train import checkpoint
from jdiff.train.parallel import anywhere

BEAT = 5.0  # seconds between two heartbeats
STALE = 60.0  # seconds without one after which a process on another host is taken for dead
UNSUPPORTED = (errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP, errno.EINVAL, errno.EBADF)


@contextlib.contextmanager
def held(directory, notify: Callable[[str], object], before_end: list | None = None) -> Iterator[None]:
    """Hold the lock of a run directory in the block. The directory is made if it is missing.

    The lock is a flock on DIR/lock, which the system frees however the process dies. DIR/lock.json says who holds it:
    process id, host, when it began, and a heartbeat that a thread renews every `BEAT` seconds. People read it, and so
    do hosts on file systems where flock does not reach from host to host. Where a run has several processes, all of
    them call this together, and the first one takes the lock for all.

    Args:
        directory: of the run.
        notify: receives a line when the lock of a dead process is taken over, and when that takes a while.
        before_end: a list to which the release of the lock is added, for whoever ends the process from another thread.

    Raises:
        OSError: another process holds the lock, or the directory cannot be written. All processes raise it if one does.
    """
    directory, error, release = Path(directory), None, lambda *_: None
    if jax.process_index() == 0:
        try:
            release = _take(directory, notify)
        except OSError as caught:
            error = caught
    if anywhere(error is not None):
        raise error or BlockingIOError(_in_use(directory, _read(directory / "lock.json")))
    if before_end is not None:
        before_end.append(release)
    try:
        yield
    finally:
        release()


def sweep(directory) -> list[Path]:
    """Remove what killed trainers have left in a run directory; the lock must be held.

    Args:
        directory: of the run.

    Returns:
        The paths that were removed: unfinished checkpoints of Orbax, and temporary files of `files.write`.
    """
    directory, removed = Path(directory), []
    for place in (directory, directory / "samples", directory / "snapshots", directory / "processes"):
        for path in files.leftovers(place):
            if path.is_file() and not path.is_symlink():
                path.unlink()
                removed.append(path)
    return removed + checkpoint.remove_unfinished(directory / "checkpoints")


def _take(directory: Path, notify) -> Callable:
    """Take the lock; what releases it."""
    try:
        directory.mkdir(parents=True, exist_ok=True)
        # neither followed, if it is a link, nor ever removed: a name that comes and goes locks two files
        file = os.open(directory / "lock", os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0), 0o644)
    except OSError as error:
        raise OSError(f"cannot write the run directory {directory}: {error.strerror}") from error
    path, free = directory / "lock.json", _flock(file)
    try:
        if free is False:
            raise BlockingIOError(_in_use(directory, _soon(path)))
        _take_over(directory, _read(path), free, notify)
        mine = dict(pid=os.getpid(), host=socket.gethostname(), started=_now(), token=secrets.token_hex(8))
        _beat(path, mine)
        if free is None:  # without flock, two who found it free have both written: the later one has it
            time.sleep(1.0)
            if (record := _read(path)).get("token") != mine["token"]:
                raise BlockingIOError(_in_use(directory, record))
    except BaseException:
        os.close(file)
        raise
    done = threading.Event()
    thread = threading.Thread(target=_keep, args=(directory, mine, done), daemon=True)
    thread.start()

    def release(*_) -> None:
        done.set()
        thread.join(BEAT)  # it may hang on a file system that does
        with contextlib.suppress(OSError):
            if _read(path).get("token") == mine["token"]:
                path.unlink()
        os.close(file)

    return release


def _flock(file: int) -> bool | None:
    """Whether the file was free and is ours now; None where that cannot be known, as on some network file systems."""
    try:
        import fcntl
    except ImportError:  # not on Windows: there the record alone counts
        return None
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        return True
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno in UNSUPPORTED:
            return None
        raise


def _take_over(directory: Path, record: dict, free: bool | None, notify) -> None:
    """Return if whoever wrote the record is dead; else raise BlockingIOError."""
    if not record:
        return
    who = f"process {record['pid']} on {record['host']}"
    if record["host"] == socket.gethostname():
        if free is None and _runs(record["pid"]):
            raise BlockingIOError(_in_use(directory, record))
        notify(f"took over the lock of {directory}: {who} has ended without releasing it")
        return
    age = time.time() - record["heartbeat"]  # which clocks that differ make wrong: so one that moves is alive
    left = max(STALE - max(age, 0.0), 2.4 * BEAT)
    notify(f"waiting up to {left:.0f} s to see whether {who}, which holds {directory}, is alive")
    until = time.monotonic() + left
    while time.monotonic() < until:
        time.sleep(min(1.0, BEAT / 2))
        if (now := _read(directory / "lock.json")) and now != record:
            raise BlockingIOError(_in_use(directory, now))
    notify(f"took over the lock of {directory}: {who} gave no sign of life for {max(age, STALE):.0f} s")


def _keep(directory: Path, mine: dict, done: threading.Event) -> None:
    """Renew the heartbeat until it is done; end the process if another one has taken the lock over."""
    while not done.wait(BEAT):
        with contextlib.suppress(OSError):  # the disk may be full for a while
            record = _read(directory / "lock.json")
            if record and record["token"] != mine["token"]:
                end(f"error: {_in_use(directory, record)}; it took this one for dead", 2)
            _beat(directory / "lock.json", mine)


def _beat(path: Path, mine: dict) -> None:
    files.write(path, lambda file: file.write(json.dumps(dict(mine, heartbeat=time.time())).encode()))


def _read(path: Path) -> dict:
    """The record; {} where there is none that makes sense."""
    try:
        record = foreign.read_json(path)
    except (OSError, ValueError):
        return {}
    kinds = dict(pid=int, host=str, started=str, token=str, heartbeat=float)
    right = isinstance(record, dict) and all(type(record.get(name)) is kind for name, kind in kinds.items())
    return record if right else {}


def _soon(path: Path) -> dict:
    """The record of one who has the lock: it may be about to write it."""
    for _ in range(20):
        record = _read(path)
        if record and (record["host"] != socket.gethostname() or _runs(record["pid"])):
            break
        time.sleep(0.05)
    return record


def _in_use(directory: Path, record: dict) -> str:
    who = "another process trains in it"
    if record:
        who = f"process {record['pid']} on {foreign.one_line(record['host'], 100)} trains in it"
        who += f" since {foreign.one_line(record['started'], 40)}"
    return f"{directory} is in use: {who}; wait for it, stop it, or choose another --run-dir"


def _runs(pid: int) -> bool:
    """Whether there is such a process on this host."""
    try:
        os.kill(pid, 0)
    except PermissionError:
        return True
    except (OSError, OverflowError):
        return False
    return True


def _now() -> str:
    return datetime.datetime.now().astimezone().isoformat(" ", "seconds")
