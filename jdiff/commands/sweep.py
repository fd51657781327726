"""Search hyper-parameters: `jdiff sweep CONFIG --param train.lr=1e-4:1e-2:log --param train.batch=64,128`.

At random over the ranges first, then on a grid around the best. Each trial is a run of jdiff train of its own, in
OUT/trials; what follows `--` is given to all of them: `-- --train.steps 2000 --data.args.n 5000`. The same command
again goes on where a sweep stopped. Needs the extra `sweep`, optuna.
"""

import dataclasses
import fcntl
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

from jdiff import config as configs
from jdiff.core.extras import needs
from jdiff.runs import plot, search

TRAINER = ["-m", "jdiff_command", "train"]
SHOWN = 12  # rows of the table on the terminal; results.csv has them all


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Search hyper-parameters at random, then on a grid around the best. What follows -- goes to jdiff train."""

    config: str
    """A config file."""
    param: tuple[str, ...] = ()
    """SETTING=LOW:HIGH, SETTING=LOW:HIGH:log (whole numbers if both ends are) or SETTING=A,B,C; again for each one."""
    trials: int = 8
    """Trials at random."""
    refine: int = 2
    """Values of each range on the grid around the best, which has refine^ranges points; 0 for no grid."""
    metric: str = "loss"
    """What to minimise: an entry of metrics.jsonl, its mean over the last tenth of the steps."""
    out: str | None = None
    """Where to; sweeps/NAME of the config when left out."""
    seed: int = 0
    """Trial i of the random ones is a function of (seed, i)."""


def main(argv: list[str]) -> int:
    """Run the trials of a sweep, and write what they gave; return the exit status."""
    argv, rest = configs.split_at_dashes(argv)
    a = configs.parse(Arguments, argv, prog="jdiff sweep", repeated=True)
    configs.check_seed(a.seed)
    with needs("jdiff sweep needs", "sweep"):
        import optuna
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    config = configs.load_config(a.config)
    space = search.parse_space(a.param, config)
    if a.trials < 1 or a.refine < 0:
        raise configs.ConfigError(f"--trials must be 1 or more and --refine 0 or more, got {a.trials} and {a.refine}")
    configs.parse(configs.Config, rest, config, prog="jdiff train")  # a typo shows now, not in every trial
    out = Path(a.out or f"sweeps/{config.name}")
    study = open_study(optuna, out, dict(config=a.config, param=list(a.param), metric=a.metric, seed=a.seed, rest=rest))

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))
    for trial in trials(optuna, study, space, a):
        if stop:
            break
        params = ", ".join(f"{name} {search.shown(value)}" for name, value in trial.params.items())
        print(f"trial {trial.number}: {params}", flush=True)
        value, error = run_trial(a, out, trial, rest, stop)
        if stop:
            break  # the trial stays open, and goes on from its checkpoint
        if error is None:
            study.tell(trial.number, value)
            print(f"trial {trial.number}: {a.metric} {value:.5g}", flush=True)
        else:
            trial.set_user_attr("error", error)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            print(f"trial {trial.number}: failed: {error}", flush=True)

    rows = search.results(study, space, a.metric)
    search.write_csv(out / "results.csv", rows)
    if any(row["state"] == "complete" for row in rows):
        plot.search_figure(out / "results.png", rows, space, a.metric)
    print(search.table(rows[:SHOWN]))
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more")
    if stop:
        print(f"stopped by {signal.Signals(stop[0]).name}; the same command goes on from there")
        return 128 + stop[0]
    if rows[0]["state"] != "complete":
        raise configs.ConfigError(f"none of {len(rows)} trials came to its end; the first: {rows[0]['error']}")
    print(f"all {len(rows)} trials in {out / 'results.csv'} and {out / 'results.png'}")
    return 0


def open_study(optuna, out: Path, asked: dict):
    """The sweep in a directory, new or old; an old one must be of the same question."""
    try:
        (out / "trials").mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise configs.ConfigError(f"cannot write {out}: {error.strerror}") from error
    path = out / "sweep.db"
    try:
        study = optuna.create_study(storage=f"sqlite:///{path}", study_name="sweep", load_if_exists=True)
    except Exception as error:  # SQLAlchemy's own, of a file that is damaged or no database
        raise configs.ConfigError(f"cannot read {path}: {configs.first_line(error)}; choose --out") from error
    old = study.user_attrs.get("asked", asked)
    for name, value in asked.items():
        if old.get(name) != value:
            raise configs.ConfigError(
                f"{out} holds another sweep: {name} was {old.get(name)!r}, is {value!r}; choose --out"
            )
    study.set_user_attr("asked", asked)
    if study.trials:
        print(f"going on with {out}: {len(study.trials)} trials")
    return study


def trials(optuna, study, space: dict, a: Arguments):
    """The trials to run, one after the other: open ones of before, those at random, the grid around the best."""
    state = optuna.trial.TrialState

    def draw():
        # a sampler of its own for each trial, so that a sweep that goes on draws what an undisturbed one does
        seed = np.random.SeedSequence([a.seed, len(study.trials)]).generate_state(1)[0]
        study.sampler = optuna.samplers.RandomSampler(seed=int(seed))
        trial = study.ask()
        for name, values in space.items():
            values.suggest(trial, name)
        return trial

    for trial in study.get_trials(states=(state.RUNNING,)):
        if len(trial.params) < len(space):  # killed while it was being drawn
            study.tell(trial.number, state=state.FAIL)
        else:
            yield optuna.trial.Trial(study, trial._trial_id)
    while search.number_of(study, "random") < a.trials:
        yield draw()
    if a.refine:
        for params in search.refinement(study, space, a.trials, a.refine):
            study.enqueue_trial(params, user_attrs=dict(phase="grid"), skip_if_exists=True)
        while study.get_trials(states=(state.WAITING,)):
            yield draw()


def run_trial(a: Arguments, out: Path, trial, rest: list[str], stop: list):
    """(metric, None) of one run of jdiff train, or (None, what went wrong); it is told when `stop` fills."""
    directory, log = out / "trials" / f"{trial.number:03d}", out / "trials" / f"{trial.number:03d}.log"
    words = [f"--{name}={search.shown(value, exact=True)}" for name, value in trial.params.items()]
    command = [sys.executable, *TRAINER, a.config, *rest, *words, "--run-dir", str(directory)]
    with log.open("a") as file:
        try:  # the run inherits the lock with its output: it may have outlived a sweep that was killed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise configs.ConfigError(
                f"trial {trial.number} of an earlier sweep still runs: it writes {log}"
            ) from error
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, stdin=subprocess.DEVNULL)
        told = False
        while process.poll() is None:
            if stop and not told:
                process.send_signal(signal.SIGTERM)
                told = True
            time.sleep(0.1)
    if process.returncode:
        lines = [line for line in log.read_text(errors="replace").splitlines() if line.strip()]
        said = [line.removeprefix("error: ") for line in lines if line.startswith("error: ")] or lines[-1:]
        return None, f"{said[-1] if said else 'it said nothing'} (exit status {process.returncode})"
    return search.read_metric(directory / "metrics.jsonl", a.metric)


if __name__ == "__main__":
    configs.run_script(main)
