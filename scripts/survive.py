"""Kill a training run again and again, and compare: `python scripts/survive.py CONFIG [--kills 20 ...] [-- OVERRIDES]`.

Trains a config once undisturbed. Then trains it again with SIGKILLs, half of them at random moments, half while a
checkpoint is being written, each followed by the same command. Prints what each kill cost, and whether the
final parameters, averages and optimiser state are bitwise those of the undisturbed run. What follows `--` goes to
scripts/train.py.
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
from typing import Annotated

import jax
import numpy as np
import tyro

from jdiff import checkpoint, runs
from jdiff import config as configs

TRAIN = Path(__file__).parent / "train.py"


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Kill a training run again and again, and compare it with an undisturbed one."""

    config: Annotated[str, tyro.conf.Positional]
    """The config file to train."""
    kills: int = 20
    """How often."""
    within: float = 4.0
    """Seconds after a restart has begun to train, within which a random kill falls."""
    seed: int = 0
    """Of the moments."""
    dir: str | None = None
    """Where both runs go; a temporary directory when left out."""


def main(argv: list[str]) -> int:
    argv, overrides = (argv[: argv.index("--")], argv[argv.index("--") + 1 :]) if "--" in argv else (argv, [])
    a = configs.parse(Arguments, argv, prog="scripts/survive.py")
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
        writing = lost = 0
        rng = random.Random(a.seed)
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
        whole, killed = (final(where / name) for name in ("whole", "killed"))
        pairs = zip(jax.tree.leaves(whole), jax.tree.leaves(killed), strict=True)
        equal = all(np.array_equal(x, y) for x, y in pairs)
        print(
            f"{a.kills} kills, {writing} while saving; at most {lost} steps lost at once; "
            f"step {int(killed.step):,}: {'bitwise equal' if equal else 'DIFFERENT'}"
        )
    return 0 if equal else 1


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
    from jdiff.watch import read_metrics

    return [entry["step"] for entry in read_metrics(metrics)]


def final(directory: Path):
    """The state of the newest checkpoint, which must be whole."""
    run = runs.open_run(directory)
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        return checkpoint.restore(run.checkpoints, runs.new_state(run))


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (configs.ConfigError, checkpoint.CheckpointError, OSError) as error:
        configs.fail(error)
