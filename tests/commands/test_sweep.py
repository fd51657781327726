"""jdiff sweep with a trainer that only writes metrics; `slow`: with the real one."""

import csv
import json
import math
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest

from jdiff import config as configs
from jdiff.commands import sweep as command
from jdiff.core.extras import MissingExtra

ROOT = Path(__file__).parents[2]
CONFIG = str(ROOT / "configs" / "scurve.py")
LR, BATCH = "train.lr=1e-5:1e-1:log", "train.batch=64,128"
# its loss ends at (log10 lr + 3)^2, plus 1 for another batch than 128
TRAINER = """
import json, math, os, pathlib, sys, time
words = dict(word[2:].split("=", 1) for word in sys.argv if "=" in word)
lr, batch = float(words["train.lr"]), int(words.get("train.batch", 128))
directory = pathlib.Path(sys.argv[sys.argv.index("--run-dir") + 1])
directory.mkdir(exist_ok=True)
with (directory / "starts").open("a") as file:
    file.write(" ".join(sys.argv[1:]) + "\\n")
if lr > 1e-2:
    sys.exit(print("error: the loss became nan at step 7; try a lower train.lr", file=sys.stderr) or 2)
if lr < 1e-4:
    raise RuntimeError("no memory")
while (directory.parent.parent / "wait").exists():
    time.sleep(0.02)
loss = (math.log10(lr) + 3) ** 2 + (batch != 128)
with (directory / "metrics.jsonl").open("w") as file:
    for step in range(10, 201, 10):
        file.write(json.dumps(dict(step=step, loss=loss + (100 if step <= 180 else (step - 195) / 1e3))) + "\\n")
"""


@pytest.fixture
def sweep(tmp_path, monkeypatch):
    """A function of the command line: (exit status, rows of results.csv)."""
    pytest.importorskip("optuna")
    (tmp_path / "trainer.py").write_text(TRAINER)
    monkeypatch.setattr(command, "TRAINER", [str(tmp_path / "trainer.py")])
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}

    def run(*words, out="out"):
        code = command.main([CONFIG, "--out", str(tmp_path / out), *words])
        return code, read(tmp_path / out)

    yield run
    for number, handler in handlers.items():
        signal.signal(number, handler)


def read(out):
    with (out / "results.csv").open() as file:
        return list(csv.DictReader(file))


def test_random_then_grid(sweep, tmp_path, capsys):
    from PIL import Image

    words = ("--param", LR, "--param", BATCH, "--trials", "10", "--refine", "3", "--", "--train.steps", "200")
    code, rows = sweep(*words)
    assert code == 0
    done = [row for row in rows if row["state"] == "complete"]
    for row in done:  # the mean over steps 190 and 200: the last tenth
        want = (math.log10(float(row["train.lr"])) + 3) ** 2 + (row["train.batch"] != "128")
        assert float(row["loss"]) == pytest.approx(want, abs=1e-9)
    losses = [float(row["loss"]) for row in done]
    assert losses == sorted(losses) and rows[: len(done)] == done
    random = [row for row in rows if row["phase"] == "random"]
    grid = [row for row in rows if row["phase"] == "grid"]
    assert len(random) == 10 and 1 <= len(grid) <= 3 and rows[0]["phase"] == "grid"
    best = min((row for row in random if row["loss"]), key=lambda row: float(row["loss"]))
    assert all(row["train.batch"] == best["train.batch"] for row in grid)
    # 10 points over 4 decades lie 0.4 apart
    steps = sorted(math.log10(float(row["train.lr"]) / float(best["train.lr"])) for row in grid)
    np.testing.assert_allclose(np.abs(steps)[np.abs(steps) > 1e-6], 0.2, rtol=1e-6)
    failed = [row for row in rows if row["state"] == "fail"]
    assert failed and all(row["loss"] == "" for row in failed)
    for row in failed:
        large = float(row["train.lr"]) > 1e-2
        assert ("loss became nan at step 7" in row["error"] and "(exit status 2)" in row["error"]) == large
        assert ("RuntimeError: no memory" in row["error"]) == (not large)
    starts = (tmp_path / "out" / "trials" / "000" / "starts").read_text()
    assert f"{CONFIG} --train.steps 200 --train.lr=" in starts
    with Image.open(tmp_path / "out" / "results.png") as image:
        assert image.width > 600
    out = capsys.readouterr().out
    table = out[out.index("trial  ") :].splitlines()
    assert table[1].split()[0] == rows[0]["trial"] and "results.csv" in table[-1]

    code, again = sweep(*words)  # nothing is left to do
    assert code == 0 and again == rows
    assert (tmp_path / "out" / "trials" / "000" / "starts").read_text() == starts


def test_going_on_with_more_trials(sweep):
    """4 trials, then 7, are 7 at once; another question is another sweep."""
    words = ("--param", "train.lr=1e-4:1e-2:log", "--refine", "0")
    sweep(*words, "--trials", "4")
    _, rows = sweep(*words, "--trials", "7")
    _, once = sweep(*words, "--trials", "7", out="once")
    for row, other in zip(rows, once, strict=True):
        assert all(row[name] == other[name] for name in ("trial", "train.lr", "loss"))
    assert len({row["train.lr"] for row in rows}) == 7
    _, others = sweep(*words, "--trials", "4", "--seed", "1", out="seed")
    assert not {row["train.lr"] for row in rows} & {row["train.lr"] for row in others}
    with pytest.raises(configs.ConfigError, match="out holds another sweep: param was .*choose --out"):
        sweep("--param", "train.lr=1e-4:2e-2:log")


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_killed_and_continued(sweep, tmp_path, number):
    """The trial in hand goes on in its directory; all parameters are those of the undisturbed sweep."""
    words = ["--param", "train.lr=1e-4:1e-2:log", "--trials", "4", "--refine", "2"]
    _, want = sweep(*words, out="undisturbed")
    out = tmp_path / "out"
    out.mkdir()
    program = (
        "import sys; from jdiff.commands import sweep;"
        f"sweep.TRAINER = [{str(tmp_path / 'trainer.py')!r}]; sys.exit(sweep.main(sys.argv[1:]))"
    )
    command = [sys.executable, "-c", program, CONFIG, "--out", str(out), *words]
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, cwd=ROOT)
    wait(lambda: (out / "trials" / "001").is_dir() or process.poll() is not None)
    (out / "wait").touch()  # from here on the trainer stands still
    wait(lambda: any(unfinished(out)) or process.poll() is not None)
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=60)
    assert process.returncode == (-9 if number == signal.SIGKILL else 128 + number), stderr
    if number == signal.SIGTERM:
        assert "stopped by SIGTERM; the same command goes on" in stdout and "unfinished" in stdout
    else:  # its run has outlived it, and is not started twice
        with pytest.raises(configs.ConfigError, match="trial . of an earlier sweep still runs"):
            sweep(*words)
    (out / "wait").unlink()
    wait(lambda: number == signal.SIGTERM or not any(unfinished(out)))
    time.sleep(0.5)
    code, rows = sweep(*words)
    assert code == 0
    for row, other in zip(rows, want, strict=True):
        assert all(row[name] == other[name] for name in ("trial", "phase", "state", "train.lr", "loss"))


def unfinished(out):
    """The trials that have started and not written their metrics."""
    return [p for p in (out / "trials").iterdir() if p.is_dir() and not (p / "metrics.jsonl").exists()]


def wait(condition):
    end = time.time() + 60
    while not condition():
        assert time.time() < end
        time.sleep(0.01)


def test_all_failed(sweep, tmp_path):
    with pytest.raises(configs.ConfigError, match="none of 2 trials came to its end; the first: the loss became nan"):
        sweep("--param", "train.lr=2e-2:1e-1", "--trials", "2")
    assert [row["state"] for row in read(tmp_path / "out")] == ["fail", "fail"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--param", LR, "--trials", "0"], "--trials must be 1 or more"),
        (["--param", LR, "--", "--train.stepz", "5"], "unknown setting --train.stepz"),
        (["--parm", LR], r"unknown setting --parm \(did you mean '--param'"),
    ],
)
def test_errors_of_the_command_line(sweep, words, message):
    with pytest.raises(configs.ConfigError, match=message):
        sweep(*words)


def test_optuna_is_missing(monkeypatch):
    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(MissingExtra, match=r"needs optuna: pip install 'jdiff\[sweep\]'"):
        command.main([CONFIG, "--param", LR])


@pytest.mark.slow
def test_with_the_real_trainer(tmp_path):
    """Two learning rates of one in which nothing is learnt: the larger wins, by the loss that the run wrote."""
    pytest.importorskip("optuna")
    env = {name: value for name, value in os.environ.items() if name != "XLA_FLAGS"}
    command = [sys.executable, str(ROOT / "scripts" / "sweep.py"), CONFIG, "--param", "train.lr=1e-8,3e-3",
               "--param", "model.args.features=16:64:log", "--trials", "4", "--refine", "1", "--out", str(tmp_path),
               "--", "--train.steps", "300", "--train.visit", "50", "--sample.num", "20"]  # fmt: skip
    result = subprocess.run(command, env=env, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    rows = read(tmp_path)
    assert len(rows) >= 4 and rows[0]["train.lr"] == "3e-3" and rows[-1]["train.lr"] == "1e-8"
    entries = (tmp_path / "trials" / f"{int(rows[0]['trial']):03d}" / "metrics.jsonl").read_text().splitlines()
    assert float(rows[0]["loss"]) == pytest.approx(json.loads(entries[-1])["loss"])
    assert (tmp_path / "results.png").stat().st_size > 5000
