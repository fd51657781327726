"""The lock of a run directory: who is refused, what is taken over, and what is swept away under it."""

import json
import os
import signal
import socket
import subprocess
import sys
import threading
import time

import pytest

from jdiff.runs import lock

HOST = socket.gethostname()
DEAD = 2**22 + 1  # above the largest process id of Linux

# another trainer, without the time that its imports take
HOLDER = """
import fcntl, json, os, socket, sys, time
file = open(sys.argv[1] + "/lock", "w")
fcntl.flock(file, fcntl.LOCK_EX)
record = dict(pid=os.getpid(), host=socket.gethostname(), started="then", token="t", heartbeat=time.time())
json.dump(record, open(sys.argv[1] + "/lock.json", "w"))
print("held", flush=True)
time.sleep(60)
"""


def record(directory, **changes):
    entry = dict(pid=DEAD, host=HOST, started="2000-01-01", token="old", heartbeat=time.time()) | changes
    (directory / "lock.json").write_text(json.dumps(entry))


def test_one_at_a_time(tmp_path):
    run, said = tmp_path / "runs" / "x", []
    for _ in range(2):
        with lock.held(run, said.append):
            entry = json.loads((run / "lock.json").read_text())
            assert (entry["pid"], entry["host"]) == (os.getpid(), HOST) and abs(entry["heartbeat"] - time.time()) < 60
            with pytest.raises(OSError, match=f"x is in use: process {os.getpid()} on {HOST} trains in it since 20"):
                with lock.held(run, said.append):
                    pass
            assert json.loads((run / "lock.json").read_text())["token"] == entry["token"]  # as it was
        assert not (run / "lock.json").exists()
    with pytest.raises(ZeroDivisionError):
        with lock.held(run, said.append):
            _ = 1 / 0
    with lock.held(run, said.append):
        assert said == []


def test_sigkill_frees_it(tmp_path):
    process = subprocess.Popen([sys.executable, "-c", HOLDER, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    try:
        assert process.stdout.readline() == "held\n"
        with pytest.raises(OSError, match=f"process {process.pid} on {HOST}"):
            with lock.held(tmp_path, print):
                pass
    finally:
        process.kill()
    assert process.wait() == -signal.SIGKILL
    said = []
    with lock.held(tmp_path, said.append):
        assert [f"process {process.pid} on {HOST} has ended" in line for line in said] == [True]


@pytest.mark.parametrize("age, beats, refused", [(1e6, False, False), (0.0, False, False), (0.0, True, True)])
def test_another_host(tmp_path, monkeypatch, age, beats, refused):
    """Where flock does not reach, a heartbeat that moves is alive, and one that stands still is not."""
    monkeypatch.setattr(lock, "STALE", 0.6)
    monkeypatch.setattr(lock, "BEAT", 0.2)
    began, said = time.time() - age, []
    record(tmp_path, host="elsewhere", heartbeat=began)
    later = threading.Timer(0.15, lambda: record(tmp_path, host="elsewhere", heartbeat=began + 1))
    if beats:
        later.start()
    try:
        with lock.held(tmp_path, said.append):
            assert not refused
    except BlockingIOError as error:
        assert refused and f"process {DEAD} on elsewhere trains in it" in str(error)
    assert len(said) == (1 if refused else 2)
    assert ("gave no sign of life" in said[-1]) == (not refused)


@pytest.mark.parametrize("pid", [os.getpid(), DEAD], ids=["alive", "dead"])
def test_without_flock_the_record_counts(tmp_path, monkeypatch, pid):
    monkeypatch.setitem(sys.modules, "fcntl", None)  # its import is an ImportError then
    monkeypatch.setattr(lock.time, "sleep", lambda seconds: None)
    record(tmp_path, pid=pid)
    try:
        with lock.held(tmp_path, lambda text: None):
            assert pid == DEAD
    except BlockingIOError as error:
        assert pid != DEAD and "is in use" in str(error)


def test_the_heartbeat_goes_on_and_one_that_was_taken_over_ends(tmp_path, monkeypatch):
    ended = threading.Event()
    monkeypatch.setattr(lock, "BEAT", 0.02)
    monkeypatch.setattr(lock, "end", lambda line, status: (ended.set(), seen.append((line, status))))
    seen = []
    with lock.held(tmp_path, print):
        first, until = json.loads((tmp_path / "lock.json").read_text())["heartbeat"], time.time() + 10
        while json.loads((tmp_path / "lock.json").read_text())["heartbeat"] == first:
            assert time.time() < until
            time.sleep(0.01)
        assert not seen
        temporary = tmp_path / "other"
        temporary.mkdir()
        record(temporary, host="elsewhere")
        (temporary / "lock.json").replace(tmp_path / "lock.json")
        assert ended.wait(10)
    assert seen[0][1] == 2 and "process" in seen[0][0] and "elsewhere" in seen[0][0]


@pytest.mark.parametrize("name", ["lock", "lock.json"])
def test_links_are_not_followed(tmp_path, name):
    victim = tmp_path / "victim"
    victim.write_text("as it was")
    (tmp_path / "run").mkdir()
    (tmp_path / "run" / name).symlink_to(victim)
    try:
        with lock.held(tmp_path / "run", print):
            assert name == "lock.json" and not (tmp_path / "run" / name).is_symlink()
    except OSError as error:
        assert name == "lock" and str(error).startswith("cannot write the run directory")
    assert victim.read_text() == "as it was"


@pytest.mark.parametrize(
    "text", [b"", b"\xff\xfe\x00", b"[" * 5000, b"[1]", b"null", b'{"pid": 1}', b'{"pid": "1", "host": 3}', b"{"]
)
def test_a_record_that_makes_no_sense(tmp_path, text):
    (tmp_path / "lock.json").write_bytes(text)
    with lock.held(tmp_path, print):
        assert json.loads((tmp_path / "lock.json").read_text())["pid"] == os.getpid()


def test_where_nothing_can_be_written(tmp_path):
    (tmp_path / "file").write_text("")
    for directory in ("/proc/nowhere", tmp_path / "file", tmp_path / "file" / "run"):
        with pytest.raises(OSError, match=f"^cannot write the run directory {directory}: [A-Z][a-z ]+$"):
            with lock.held(directory, print):
                pass


def test_only_remains_of_our_naming_are_swept(tmp_path):
    ours = ["tmpab12_xyz.json", "samples/tmpabcdefgh.png", "snapshots/tmpabcdefgh.npz",
            "checkpoints/300.orbax-checkpoint-tmp/a", "checkpoints/300.orbax-checkpoint-tmp-17/b/c"]  # fmt: skip
    others = ["config.json", "tmp.png", "samples/tmpmine.png", "samples/final.png", "checkpoints/300/params/x",
              "checkpoints/200.damaged/x", "checkpoints/notes.orbax-checkpoint-tmp/x", "posthoc/tmpabcdefgh.npz",
              "elsewhere/9.orbax-checkpoint-tmp/x"]  # fmt: skip
    for name in ours + others:
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text("x")
    (tmp_path / "checkpoints/7.orbax-checkpoint-tmp").symlink_to(tmp_path / "elsewhere")
    (tmp_path / "tmpzzzzzzzz.json").symlink_to(tmp_path / "config.json")
    assert len(lock.sweep(tmp_path)) == len(ours)
    left = sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())
    assert left == sorted([*others, "tmpzzzzzzzz.json"]) and lock.sweep(tmp_path) == []
