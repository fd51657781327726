"""Disturb a training run again and again, and compare: `python benchmarks/survive.py CONFIG [-- OVERRIDES]`.

Trains a config once undisturbed. Then trains it again with SIGKILLs, half of them at random moments, half while a
checkpoint is being written, each followed by the same command. Prints what each kill cost, and whether the
final parameters, averages and optimiser state are bitwise those of the undisturbed run. What follows `--` goes to
scripts/train.py.

With --signals the run is sent SIGHUP, SIGINT, SIGTERM and SIGUSR1 instead, one time in three two of them: while it
starts, compiles, trains or saves. With --double the same command is started twice at once: one of the two has to leave
with a line and status 2, the other one to end as if it were alone.
"""

import dataclasses
import os
import random
import signal
import subprocess
import sys
import tempfile
import time
import warnings
from pathlib import Path

import jax
import numpy as np

from jdiff import config as configs
from jdiff import runs
from jdiff.core import files
from jdiff.runs.watch import read_metrics
from jdiff.train import checkpoint

TRAIN = Path(__file__).resolve().parents[1] / "scripts" / "train.py"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Disturb a training run again and again, and compare it with an undisturbed one."""

    config: str
    """The config file to train."""
    kills: int = 20
    """How often."""
    signals: bool = False
    """Send signals that let it save, instead of SIGKILL."""
    double: bool = False
    """Start it twice at once in a new directory each time, instead of killing it."""
    within: float = 4.0
    """Seconds after a restart has begun to train, within which a random kill falls."""
    seed: int = 0
    """Of the moments."""
    dir: str | None = None
    """Where both runs go; a temporary directory when left out."""


def main(argv: list[str]) -> int:
    argv, overrides = configs.split_at_dashes(argv)
    a = configs.parse(Arguments, argv, prog="benchmarks/survive.py")
    configs.load_config(a.config)
    if a.kills < 1 or a.within <= 0:
        raise configs.ConfigError("--kills and --within must be positive")
    with tempfile.TemporaryDirectory() as temporary:
        where = Path(a.dir or temporary)
        where.mkdir(parents=True, exist_ok=True)
        command = [sys.executable, str(TRAIN), a.config, *overrides, "--run-dir"]
        start = time.perf_counter()
        finish([*command, str(where / "whole")], where / "whole.log")
        print(f"undisturbed: {time.perf_counter() - start:.0f} s", flush=True)
        rng = random.Random(a.seed)
        if a.double:
            return twice(command, where, rng, a.kills)
        if a.signals:
            return signalled([*command, str(where / "killed")], where, rng, a.kills, a.within)
        writing = lost = 0
        for kill in range(a.kills):
            during, cost = disturb([*command, str(where / "killed")], where, rng, kill % 2 == 1, a.within)
            if cost is None:
                raise configs.ConfigError(f"the run ended before kill {kill + 1}: give it more --train.steps")
            writing, lost = writing + during, max(lost, cost)
            print(
                f"kill {kill + 1}: {'while saving' if during else 'between saves'}, at most {cost} steps lost",
                flush=True,
            )
        finish([*command, str(where / "killed")], where / "killed.log")
        equal, verdict = compared(where, "killed")
        print(f"{a.kills} kills, {writing} while saving; at most {lost} steps lost at once; {verdict}")
    return 0 if equal else 1


def compared(where: Path, name: str) -> tuple[bool, str]:
    """Whether the run `name` ended in the state of the undisturbed one, and that in words."""
    whole, other = final(where / "whole"), final(where / name)
    pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(other), strict=True)
    equal = all(np.array_equal(x, y) for x, y in pairs)
    return equal, f"step {int(other.step):,}: {'bitwise equal' if equal else 'DIFFERENT'}"


def remains(run: Path) -> list[str]:
    """What a run that ended well does not leave: temporary files, damaged checkpoints, rows of a step twice."""
    found = [str(path.relative_to(run)) for place in (run, run / "samples") for path in files.leftovers(place)]
    found += [path.name for path in (run / "checkpoints").iterdir() if not path.name.isdigit()]
    steps = rows(run / "metrics.jsonl")
    if steps != sorted(set(steps)):
        found.append("rows of metrics.jsonl")
    return found + [path.name for path in (run / "lock.json",) if path.exists()]


# -------------------------------------------------------------------- twice at once


def twice(command: list[str], where: Path, rng, times: int) -> int:
    """Start the same command twice, the second up to a second later, `times` times; 0 if all went as it must."""
    wrong = 0
    for i in range(times):
        run, logs = where / f"double{i}", [where / f"double{i}.{j}.log" for j in range(2)]
        pair = []
        for log in logs:
            with log.open("w") as file:
                pair.append(subprocess.Popen([*command, str(run)], stdout=file, stderr=subprocess.STDOUT))
            time.sleep(rng.uniform(0, 1) if len(pair) == 1 else 0)
        codes = [process.wait() for process in pair]
        said = [line for log in logs for line in log.read_text().splitlines() if line.startswith("error: ")]
        text = "".join(log.read_text() for log in logs)
        told = len(said) == 1 and f"process {pair[codes.index(0)].pid if 0 in codes else 0} on " in said[0]
        equal, verdict = compared(where, run.name) if 0 in codes else (False, "none has ended")
        good = sorted(codes) == [0, 2] and told and equal and not remains(run) and "Traceback" not in text
        wrong += not good
        print(f"pair {i + 1}: statuses {codes}, {verdict}{'' if good else f', WRONG: {text}'}", flush=True)
    print(f"{times} pairs, {times - wrong} as they must be: one refused, the other bitwise equal, nothing left over")
    return 1 if wrong else 0


# -------------------------------------------------------------------- signals


def signalled(command: list[str], where: Path, rng, times: int, within: float) -> int:
    """Send signals, `times` times, and start the command again after each; 0 if all went as it must."""
    signal.signal(signal.SIGHUP, lambda number, frame: None)  # under nohup the run would inherit that it is ignored
    wrong, kinds = 0, {"starting": 0, "training": 0, "saving": 0}
    command, log = [*command, "--requeue-on", "USR1"], where / "killed.log"
    for i in range(times):
        first, second = (rng.choice([signal.SIGHUP, signal.SIGINT, signal.SIGTERM, signal.SIGUSR1]) for _ in range(2))
        moment, double = list(kinds)[i % 3], rng.random() < 1 / 3
        with log.open("w") as file:
            process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
        if moment == "starting":  # imports, data, compilation
            time.sleep(rng.uniform(0.2, 10.0))
        else:
            while process.poll() is None and "\nstep " not in log.read_text():
                time.sleep(0.005)
            until = time.monotonic() + (30.0 if moment == "saving" else rng.uniform(0, within))
            while process.poll() is None and time.monotonic() < until:
                if moment == "saving" and unfinished(where / "killed" / "checkpoints"):
                    break
                time.sleep(0.0005)
        process.send_signal(first)
        if double:
            time.sleep(rng.uniform(0, 0.1))
            process.send_signal(second)
        code = process.wait()
        said = [line for line in log.read_text().splitlines() if line.startswith("stopped by ")]
        good = code == 128 + first or double and code == 128 + second
        good = good and 1 <= len(said) <= 1 + double and "Traceback" not in log.read_text()
        if code == 0:
            raise configs.ConfigError(f"the run ended before signal {i + 1}: give it more --train.steps")
        wrong, kinds[moment] = wrong + (not good), kinds[moment] + 1
        names = f"{first.name}, {second.name}" if double else first.name
        print(f"{names} while {moment}: status {code}, {said}{'' if good else ' WRONG'}", flush=True)
    finish(command, log)
    equal, verdict = compared(where, "killed")
    left = remains(where / "killed")
    counts = ", ".join(f"{count} while {moment}" for moment, count in kinds.items())
    short = f"{wrong} without a line or their status; {verdict}; left over: {left or 'nothing'}"
    print(f"{times} signals: {counts}; {short}")
    return 0 if equal and not wrong and not left else 1


# -------------------------------------------------------------------- killing


def finish(command: list[str], log: Path) -> None:
    """Run to the end."""
    with log.open("w") as file:
        code = subprocess.run(command, stdout=file, stderr=subprocess.STDOUT).returncode
    if code:
        raise configs.ConfigError(f"training failed with status {code}: {log.read_text().splitlines()[-1:]}")


def disturb(command: list[str], where: Path, rng, saving: bool, within: float) -> tuple[bool, int | None]:
    """(whether it was saving, steps lost) of one run that is killed; None if it ended by itself."""
    checkpoints, metrics = where / "killed" / "checkpoints", where / "killed" / "metrics.jsonl"
    log = where / "killed.log"
    with log.open("w") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT)
    while process.poll() is None and "\nstep " not in log.read_text():
        time.sleep(0.005)  # compiling
    if saving:
        while process.poll() is None and not unfinished(checkpoints):
            time.sleep(0.0005)
        time.sleep(rng.uniform(0, 0.03))
    else:
        time.sleep(rng.uniform(0, within))
    os.kill(process.pid, signal.SIGSTOP)  # look while nothing moves
    during, steps = unfinished(checkpoints), rows(metrics)
    process.kill()
    if process.wait() != -signal.SIGKILL:
        return during, None
    return during, max(0, max(steps, default=0) - max(checkpoint.steps(checkpoints), default=0))


def unfinished(checkpoints: Path) -> bool:
    """Whether a checkpoint is being written: its directory has not its final name yet."""
    return checkpoints.is_dir() and any(
        path.is_dir() and not path.name.isdigit() and ".damaged" not in path.name for path in checkpoints.iterdir()
    )


def rows(metrics: Path) -> list[int]:
    """The steps of a log."""
    return [entry["step"] for entry in read_metrics(metrics)]


def final(directory: Path):
    """The state of the newest checkpoint, which must be whole."""
    run = runs.open_run(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return checkpoint.restore(run.checkpoints, runs.new_state(run))


if __name__ == "__main__":
    configs.run_script(main)
