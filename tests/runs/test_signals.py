"""Signals: what is noted and what ends a run, by themselves and sent to scripts/train.py at any moment."""

import json
import os
import pty
import signal
import subprocess
import sys
import time
from pathlib import Path

import chex
import numpy as np
import pytest

from jdiff import runs
from jdiff.core import files
from jdiff.runs import signals
from jdiff.train import checkpoint

ROOT = Path(__file__).parents[2]
CONFIG = """
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="plane", data=Named("scurve", {"n": 500}), model=Named("mlp_step", {"features": 16, "steps": 20}),
    schedule=Named("discrete", {"table": "linear", "T": 20}), conditioning=Named("index", {"T": 20}),
    train=Train(steps=3000, batch=8, visit=10, save_every=50), sample=Sample(steps=3, num=10),
)
"""
NAMES = ["SIGINT", "SIGTERM", "SIGHUP"]


def wait_for(condition, seconds=100):
    until = time.time() + seconds
    while not condition():
        assert time.time() < until
        time.sleep(0.005)


@pytest.fixture(autouse=True)
def hangup():
    """Where the tests run under nohup, their processes would ignore SIGHUP."""
    before = signal.signal(signal.SIGHUP, lambda number, frame: None)
    yield
    signal.signal(signal.SIGHUP, before)


@pytest.fixture
def ended(monkeypatch):
    """(line, status) of each end that `Signals` would have made of this process."""
    found = []
    monkeypatch.setattr(signals, "end", lambda line, status: found.append((line, status)))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_the_first_is_noted_and_the_second_ends(ended, name):
    number = signal.Signals[name]
    before = [signal.getsignal(signal.Signals[n]) for n in NAMES]
    called = []
    with signals.Signals() as stop:
        stop.before_end.append(called.append)
        stop.patient, stop.when = True, "while it was saving"
        os.kill(os.getpid(), number)
        wait_for(lambda: stop.number == number)
        assert not ended and not called
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: ended)
    assert ended == [(f"stopped by {name}, then by SIGTERM while it was saving", 143)] and called == [143]
    assert before == [signal.getsignal(signal.Signals[n]) for n in NAMES]


@pytest.mark.parametrize("name", [*NAMES, "SIGUSR1"])
def test_before_the_first_step_it_ends_at_once(ended, name):
    """Also while the main thread is held up; what is called before may fail; one that is not to speak is silent."""
    with signals.Signals(["SIGUSR1"]) as stop:
        stop.before_end.append(lambda status: 1 / 0)
        os.kill(os.getpid(), signal.Signals[name])
        wait_for(lambda: ended)
        stop.speaks = False
        os.kill(os.getpid(), signal.Signals[name])
        wait_for(lambda: len(ended) == 2)
    status = 128 + signal.Signals[name]
    assert ended == [(f"stopped by {name} before the first step", status), ("", status)] and stop.number == 0


def test_one_that_goes_to_another_loop_is_not_lost(ended):
    """Event loops put their own socket in place of ours while they run; each signal counts once all the same."""
    with signals.Signals() as stop:
        stop.patient = True
        ours = signal.set_wakeup_fd(-1)
        os.kill(os.getpid(), signal.SIGTERM)
        wait_for(lambda: stop.number == signal.SIGTERM)
        signal.set_wakeup_fd(ours)
        time.sleep(0.05)
        assert not ended
        os.kill(os.getpid(), signal.SIGINT)
        wait_for(lambda: ended)
        time.sleep(0.05)
    assert [status for _, status in ended] == [130]


def test_nohup_is_respected(ended):
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with signals.Signals():
            os.kill(os.getpid(), signal.SIGHUP)
            os.kill(os.getpid(), signal.SIGTERM)
            wait_for(lambda: ended)
        assert [status for _, status in ended] == [143]
    finally:
        signal.signal(signal.SIGHUP, before)


# ---------------------------------------------------------------- the script


def command(where, name, *words):
    (where / "plane.py").write_text(CONFIG)
    train = str(ROOT / "scripts" / "train.py")
    return [sys.executable, train, str(where / "plane.py"), "--run-dir", str(where / name), *map(str, words)]


def start(where, name, *words):
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    pipes = dict(stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, bufsize=1)
    return subprocess.Popen(command(where, name, *words), env=env, **pipes)


def until(process, text):
    for line in process.stdout:
        if text in line:
            return
    raise AssertionError(f"no {text!r}: {process.stderr.read()}")


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("signals")
    process = start(where, "whole")
    assert process.wait(300) == 0, process.stderr.read()
    return where


def final(directory):
    run = runs.open_run(directory)
    return checkpoint.restore(run.checkpoints, runs.new_state(run))


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
@pytest.mark.parametrize("moment", ["importing", "compiling", "training", "the last picture"])
def test_one_line_and_its_status(tmp_path, moment, name):
    """At any moment: one line beside those of the progress, 128 + its number, no traceback, nothing left over."""
    words = ["--train.steps", 30] if moment == "the last picture" else ["--train.steps", 10**7]
    words += ["--sample.steps", 20, "--sample.num", 100_000] if moment == "the last picture" else []
    process = start(tmp_path, "run", *words)
    if moment == "importing":
        time.sleep(0.3)
    else:
        until(process, {"compiling": "parameters", "training": "step 10", "the last picture": "step 30/30"}[moment])
        time.sleep(0.1 if moment == "compiling" else 0.5)
    process.send_signal(signal.Signals[name])
    out, err = process.communicate(timeout=100)
    assert process.returncode == 128 + signal.Signals[name], (out, err)
    lines = [line for line in err.splitlines() if not line.startswith(("warning: ", "checking ", "compiling "))]
    lines += [line for line in out.splitlines() if line.startswith("stopped")]
    assert len(lines) == 1 and lines[0].startswith(f"stopped by {name}")
    run = tmp_path / "run"
    assert not (run / "lock.json").exists() and not files.leftovers(run) + files.leftovers(run / "samples")
    kept = checkpoint.steps(run / "checkpoints")
    assert kept == [30] if moment == "the last picture" else bool(kept) == (moment == "training")


@pytest.mark.slow
@pytest.mark.parametrize("second", [None, signal.SIGTERM])
def test_usr1_on_request_and_a_second_signal(place, tmp_path, second):
    """The run goes on to the bits of the undisturbed one, and what the second signal left is gone."""
    process = start(tmp_path, "run", "--requeue-on", "USR1")
    until(process, "step 10")
    process.send_signal(signal.SIGUSR1)
    if second:
        process.send_signal(second)
    err = process.communicate(timeout=100)[1]
    assert process.returncode in ([138, 143] if second else [138]) and "Traceback" not in err, err
    run = tmp_path / "run"
    (run / "checkpoints" / "20.orbax-checkpoint-tmp" / "params").mkdir(parents=True)
    (run / "samples").mkdir(exist_ok=True)
    (run / "samples" / "tmpabcdefgh.png").write_text("")
    assert start(tmp_path, "run", "--requeue-on", "USR1").wait(300) == 0
    chex.assert_trees_all_equal(final(run), final(place / "whole"), strict=True)
    assert not files.leftovers(run / "samples") and all(p.name.isdigit() for p in (run / "checkpoints").iterdir())
    steps = [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()]
    np.testing.assert_array_equal(steps, np.arange(10, 3001, 10))


@pytest.mark.slow
def test_a_closed_terminal(tmp_path):
    """SIGHUP, and nobody there to read: it saves."""
    master, slave = pty.openpty()
    env = {k: v for k, v in os.environ.items() if k != "XLA_FLAGS"}
    words = command(tmp_path, "run", "--train.steps", 10**7)
    process = subprocess.Popen(words, env=env, stdin=slave, stdout=slave, stderr=slave, start_new_session=True)
    os.close(slave)
    wait_for(lambda: checkpoint.steps(tmp_path / "run" / "checkpoints"))
    os.close(master)
    process.send_signal(signal.SIGHUP)  # as the terminal's end does where it is the controlling one
    assert process.wait(100) == 129
    last = checkpoint.steps(tmp_path / "run" / "checkpoints")[-1]
    lines = (tmp_path / "run" / "metrics.jsonl").read_text().splitlines()
    assert json.loads(lines[-1])["step"] == last
