"""Processes of one run that watch each other: by themselves on sockets, and scripts/train.py in two processes."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from jdiff import parallel
from jdiff.runs import peers

ROOT = Path(__file__).parents[2]
CONFIG = """
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="plane", data=Named("scurve", {"n": 500}), model=Named("mlp_step", {"features": 16, "steps": 20}),
    schedule=Named("discrete", {"table": "linear", "T": 20}), conditioning=Named("index", {"T": 20}),
    train=Train(steps=1_000_000, batch=8, visit=50, save_every=100), sample=Sample(steps=3, num=10),
)
"""


class Ended(BaseException):
    pass


def watched(monkeypatch, act, timeout=60.0, rank=0):
    """What a process that watches another one ends with after `act(the other one's socket)`; None if it goes on."""
    ended = []

    def end(line, status):
        ended.append((line, status))
        raise Ended

    monkeypatch.setattr(peers, "end", end)
    monkeypatch.setattr(peers, "TICK", 0.05)
    watch, (ours, theirs) = peers.Watch(timeout, lambda: "the last checkpoint is 300"), socket.socketpair()
    ours.settimeout(0.0)
    watch._rank, watch._count, watch._peers = rank, 2, {1 - rank: ours}

    def run():
        try:
            watch._watch()
        except Ended:
            pass

    thread = threading.Thread(target=run)
    thread.start()
    act(theirs)
    thread.join(0.4)
    watch._done.set()
    thread.join()
    theirs.close()
    return ended[0] if ended else None


@pytest.mark.parametrize("rank", [0, 1])
def test_a_broken_connection_is_a_lost_process(monkeypatch, rank):
    line, status = watched(monkeypatch, lambda other: other.close(), rank=rank)
    assert status == peers.LOST == os.EX_TEMPFAIL
    assert f"process {1 - rank} of 2 is lost: its connection is closed; the last checkpoint is 300" in line


def test_silence_is_one_too(monkeypatch):
    line, status = watched(monkeypatch, lambda other: None, timeout=0.2)
    assert status == peers.LOST and "process 1 of 2 is lost: nothing was heard of it for 0 s" in line


@pytest.mark.parametrize("words, want", [(b"left 0\n", None), (b"left 2\n", None), (b"left 143\n", 143)])
def test_one_that_leaves_says_so(monkeypatch, words, want):
    def leave(other):
        other.send(words)
        other.close()

    ended = watched(monkeypatch, leave)
    assert ended is None if want is None else ended[1] == want and "process 1 was stopped by signal 15" in ended[0]


def test_one_that_failed_is_not_waited_for_for_ever(monkeypatch):
    line, status = watched(monkeypatch, lambda other: other.send(b"left 2\n"), timeout=0.2)
    assert status == 2 and "process 1 has ended with status 2" in line


def test_process_0_speaks_for_the_others(monkeypatch):
    assert watched(monkeypatch, lambda other: other.send(b"he"), rank=1) is None  # half a word
    assert watched(monkeypatch, lambda other: other.send(b"here\nend 75\n"), rank=1) == ("", 75)


def test_only_who_shows_the_token_is_admitted():
    with socket.create_server(("localhost", 0)) as server:
        offer = dict(hosts=["localhost"], port=server.getsockname()[1], token="right")
        admitted = {}
        thread = threading.Thread(target=lambda: admitted.update(peers._admit(server, "right", 3)))
        thread.start()
        with socket.create_connection(("localhost", offer["port"])) as stranger:
            stranger.sendall(b"wrong 2\n")
            assert stranger.recv(1) == b""
        ends = [peers._reach(offer, rank)[0] for rank in (1, 2)]
        thread.join()
    assert sorted(admitted) == [1, 2]
    for end in (*ends, *admitted.values()):
        end.close()


def test_idle_strangers_hold_nobody_up(monkeypatch):
    """More of them than may wait, who say nothing or only a part: who shows the token is admitted within a second."""
    monkeypatch.setattr(peers, "MOST_GUESTS", 20)
    with socket.create_server(("localhost", 0), backlog=64) as server, contextlib.ExitStack() as open_ones:
        offer = dict(hosts=["localhost"], port=server.getsockname()[1], token="right")
        strangers = [open_ones.enter_context(socket.create_connection(("localhost", offer["port"]))) for _ in range(30)]
        for words, stranger in zip((b"rig", b"right", b"right 0\n", b"right x\n", b"\n"), strangers, strict=False):
            stranger.sendall(words)
        admitted = {}
        thread = threading.Thread(target=lambda: admitted.update(peers._admit(server, "right", 3)))
        began = time.monotonic()
        thread.start()
        ends = [peers._reach(offer, rank)[0] for rank in (2, 1)]
        thread.join()
        assert time.monotonic() - began < 5 and sorted(admitted) == [1, 2]
        for end in ends:
            open_ones.enter_context(end)
        for rank, end in zip((2, 1), ends, strict=True):  # each end is connected with the one of its rank
            open_ones.enter_context(admitted[rank]).sendall(str(rank).encode())
            assert end.recv(8) in (str(rank).encode(), b"\n" + str(rank).encode())
        for stranger in strangers:
            stranger.settimeout(5.0)
            with contextlib.suppress(ConnectionResetError):
                assert stranger.recv(8) == b""


def test_who_comes_too_late_is_not_waited_for(monkeypatch):
    monkeypatch.setattr(peers, "ADMISSION", 0.3)
    server = socket.create_server(("localhost", 0))
    assert peers._admit(server, "right", 3) == {} and server.fileno() == -1


def test_who_is_awaited_is_said(tmp_path, monkeypatch):
    said, ended = [], threading.Event()
    monkeypatch.setattr(peers, "PATIENCE", 0.1)
    monkeypatch.setattr(peers, "TICK", 0.1)
    monkeypatch.setattr(peers, "end", lambda line, status: (said.append((line, status)), ended.set()))
    with peers.awaited(tmp_path, (0, 3), "here:1", 0.6, said.append):
        assert ended.wait(10)
    assert said[0] in [f"waiting for process 1 and 2 of 3, for {left} s more" for left in (0, 1)]
    assert said[1] == ("error: process 1 and 2 of 3 did not come within 1 s; start all of them again", peers.LOST)
    assert list(tmp_path.iterdir()) == []


def test_launchers_tell_the_place(monkeypatch):
    for name in ("SLURM_PROCID", "SLURM_NTASKS", "OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.launched() is None
    monkeypatch.setenv("OMPI_COMM_WORLD_RANK", "3")
    monkeypatch.setenv("OMPI_COMM_WORLD_SIZE", "4")
    assert parallel.launched() == (3, 4)


# ---------------------------------------------------------------- the script in two processes


@pytest.fixture(autouse=True)
def hangup():
    """Where the tests run under nohup, their processes would ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, lambda number, frame: None)
    yield
    signal.signal(signal.SIGHUP, before)


def start(where, *words, ranks=(0, 1)):
    """The processes of a run, their output in WHERE/RANK.log."""
    (where / "plane.py").write_text(CONFIG)
    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=1")
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(where / "plane.py"), "--run-dir",
               str(where / "run"), "--coordinator", f"localhost:{port}", "--processes", "2", *words]  # fmt: skip
    processes = {}
    for rank in ranks:
        with (where / f"{rank}.log").open("w") as log:
            processes[rank] = subprocess.Popen(
                [*command, "--process-id", str(rank)], env=env, stdout=log, stderr=subprocess.STDOUT
            )
    return processes


def wait_for(condition, seconds=200):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until
        time.sleep(0.02)


def errors(where, rank):
    """Its lines that begin with error:, if nothing in its output is a traceback."""
    text = (where / f"{rank}.log").read_text()
    assert "Traceback" not in text, text
    return [line for line in text.splitlines() if line.startswith("error:")]


@pytest.mark.slow
@pytest.mark.parametrize("victim", [0, 1])
@pytest.mark.parametrize("moment", ["compiling", "training", "frozen"])
def test_one_that_dies_ends_the_other(tmp_path, victim, moment):
    """Within seconds, with one line that names it and the last checkpoint, and the status that is to be requeued."""
    from jdiff.train import checkpoint

    processes = start(tmp_path, "--train.peer-timeout", "8")
    saved = tmp_path / "run" / "checkpoints"
    try:
        if moment == "compiling":
            wait_for(lambda: "parameters" in (tmp_path / "0.log").read_text())
        else:
            wait_for(lambda: checkpoint.steps(saved))
        processes[victim].send_signal(signal.SIGSTOP if moment == "frozen" else signal.SIGKILL)
        began = time.monotonic()
        assert processes[1 - victim].wait(60) == peers.LOST
        assert time.monotonic() - began < (20 if moment == "frozen" else 10)
        (line,) = errors(tmp_path, 1 - victim)
        assert f"process {victim} of 2 is lost" in line
        assert "the last checkpoint is " in line or moment == "compiling"
    finally:
        for process in processes.values():
            process.kill()


@pytest.mark.slow
def test_one_that_never_comes_is_named(tmp_path):
    began = time.monotonic()
    process = start(tmp_path, "--wait", "13", ranks=[1])[1]
    try:
        assert process.wait(60) == peers.LOST and time.monotonic() - began < 50
    finally:
        process.kill()
    text = (tmp_path / "1.log").read_text().splitlines()
    assert text[0].startswith("waiting for process 0 of 2, for ") and len(text) == 2
    assert errors(tmp_path, 1) == ["error: process 0 of 2 did not come within 13 s; start all of them again"]


@pytest.mark.slow
def test_a_second_pair_is_refused_and_the_first_shares_the_lock(tmp_path):
    """All of the second run end with the line and status 2; a signal to one of the first saves and ends both."""
    first = start(tmp_path)
    (tmp_path / "again").mkdir()
    try:
        wait_for(lambda: "\nstep " in (tmp_path / "0.log").read_text())
        (tmp_path / "again" / "run").symlink_to(tmp_path / "run")
        second = start(tmp_path / "again")
        try:
            assert [second[rank].wait(100) for rank in (0, 1)] == [2, 2]
        finally:
            for process in second.values():
                process.kill()
        for rank in (0, 1):
            (line,) = errors(tmp_path / "again", rank)
            assert f"is in use: process {first[0].pid} on {socket.gethostname()} trains in it" in line
        first[1].send_signal(signal.SIGHUP)
        assert [first[rank].wait(60) for rank in (0, 1)] == [129, 129]
    finally:
        for process in first.values():
            process.kill()
    assert "stopped by SIGHUP: saved at step" in (tmp_path / "0.log").read_text()
    assert not (tmp_path / "run" / "lock.json").exists() and not (tmp_path / "run" / "processes").exists()
