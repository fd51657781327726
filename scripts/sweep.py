"""Search hyper-parameters: `python scripts/sweep.py CONFIG --param train.lr=1e-4:1e-2:log --param train.batch=64,128`.

At random over the ranges first, then on a grid around the best. Each trial is a run of scripts/train.py of its own, in
OUT/trials; what follows `--` is given to all of them: `-- --train.steps 2000 --data.args.n 5000`. The same command
again goes on where a sweep stopped. Needs the extra `sweep`, optuna.
"""

import csv
import dataclasses
import fcntl
import io
import itertools
import math
import re
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Annotated, Any

import numpy as np
import tyro

from jdiff import config as configs
from jdiff.core import files
from jdiff.core.names import did_you_mean
from jdiff.runs import plot
from jdiff.runs.watch import read_metrics

TRAINER = Path(__file__).resolve().parent / "train.py"
SHOWN = 12  # rows of the table on the terminal; results.csv has them all


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Search hyper-parameters at random, then on a grid around the best. What follows -- goes to scripts/train.py."""

    config: Annotated[str, tyro.conf.Positional]
    """A config file."""
    param: tyro.conf.UseAppendAction[tuple[str, ...]] = ()
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


@dataclasses.dataclass(frozen=True)
class Range:
    """LOW to HIGH, both included; whole numbers or not, evenly in the number or in its logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial, name: str):
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(name, int(self.low) if self.whole else self.low, self.high, log=self.log)

    def around(self, best: float, trials: int, ranges: int, count: int) -> list:
        """`count` values about `best`, on each side within half the distance of random ones: span / trials^(1/ranges).

        For an even count the best is not among them, which has been tried; whatever is past an end is at that end.
        """
        low, high, best = (math.log(v) if self.log else v for v in (self.low, self.high, best))
        reach = (high - low) / (2 * max(trials, 1) ** (1 / ranges))
        values = [best + reach * u for u in (np.linspace(-1, 1, count) if count > 1 else [0.0])]
        values = [float(np.clip(math.exp(v) if self.log else v, self.low, self.high)) for v in values]
        return sorted({round(v) if self.whole else v for v in values})


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of some words, each as it is given to scripts/train.py."""

    words: tuple[str, ...]

    def suggest(self, trial, name: str):
        return trial.suggest_categorical(name, self.words)

    def around(self, best: str, trials: int, ranges: int, count: int) -> list:
        """The best alone: there is nothing between words."""
        del trials, ranges, count
        return [best]


# ---------------------------------------------------------------- the sweep


def main(argv: list[str]) -> int:
    cut = argv.index("--") if "--" in argv else len(argv)
    a, rest = configs.parse(Arguments, argv[:cut], prog="scripts/sweep.py"), argv[cut + 1 :]
    configs.check_seed(a.seed)
    optuna = import_optuna()
    config = configs.load_config(a.config)
    space = parse_space(a.param, config)
    if a.trials < 1 or a.refine < 0:
        raise configs.ConfigError(f"--trials must be 1 or more and --refine 0 or more, got {a.trials} and {a.refine}")
    configs.parse(configs.Config, rest, config, "scripts/train.py")  # a typo shows now, not in every trial
    out = Path(a.out or f"sweeps/{config.name}")
    study = open_study(optuna, out, dict(config=a.config, param=list(a.param), metric=a.metric, seed=a.seed, rest=rest))

    stop = []
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda number, frame: stop.append(number))

    def run(trial) -> None:
        params = dict(trial.params)
        print(f"trial {trial.number}: " + ", ".join(f"{k} {shown(v)}" for k, v in params.items()), flush=True)
        value, error = run_trial(a.config, out, trial.number, params, rest, a.metric, stop)
        if stop:
            return  # it stays open, and goes on from its checkpoint
        if error is None:
            study.tell(trial.number, value)
            print(f"trial {trial.number}: {a.metric} {value:.5g}", flush=True)
        else:
            trial.set_user_attr("error", error)
            study.tell(trial.number, state=optuna.trial.TrialState.FAIL)
            print(f"trial {trial.number}: failed: {error}", flush=True)

    def draw():
        # a sampler of its own for each trial, so that a sweep that goes on draws what an undisturbed one does
        seed = np.random.SeedSequence([a.seed, len(study.trials)]).generate_state(1)[0]
        study.sampler = optuna.samplers.RandomSampler(seed=int(seed))
        trial = study.ask()
        for name, values in space.items():
            values.suggest(trial, name)
        return trial

    state = optuna.trial.TrialState
    for trial in study.get_trials(states=(state.RUNNING,)):
        if len(trial.params) < len(space):  # killed while it was being drawn
            study.tell(trial.number, state=state.FAIL)
        elif not stop:
            run(optuna.trial.Trial(study, trial._trial_id))
    while not stop and number_of(study, "random") < a.trials:
        run(draw())
    if a.refine and not stop:
        for params in refinement(study, space, a.trials, a.refine):
            study.enqueue_trial(params, user_attrs=dict(phase="grid"), skip_if_exists=True)
        while not stop and study.get_trials(states=(state.WAITING,)):
            run(draw())

    rows = results(study, space, a.metric)
    write_csv(out / "results.csv", rows)
    if any(row["state"] == "complete" for row in rows):
        figure(out / "results.png", rows, space, a.metric)
    print(table(rows[:SHOWN]))
    if len(rows) > SHOWN:
        print(f"... and {len(rows) - SHOWN} more")
    if stop:
        print(f"stopped by {signal.Signals(stop[0]).name}; the same command goes on from there")
        return 128 + stop[0]
    if rows[0]["state"] != "complete":
        raise configs.ConfigError(f"none of {len(rows)} trials came to its end; the first: {rows[0]['error']}")
    print(f"all {len(rows)} trials in {out / 'results.csv'} and {out / 'results.png'}")
    return 0


def import_optuna():
    try:
        import optuna
    except ImportError as error:
        raise configs.ConfigError("scripts/sweep.py needs optuna: pip install 'jdiff[sweep]'") from error
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    return optuna


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


def number_of(study, phase: str) -> int:
    return sum(trial.user_attrs.get("phase", "random") == phase for trial in study.trials)


def refinement(study, space: dict, trials: int, count: int) -> list[dict]:
    """The points of the grid around the best of the random trials."""
    done = [t for t in study.trials if t.value is not None and t.user_attrs.get("phase") != "grid"]
    ranges = sum(isinstance(values, Range) for values in space.values())
    if not done or not ranges:
        return []
    best = min(done, key=lambda t: t.value).params
    axes = [values.around(best[name], trials, ranges, count) for name, values in space.items()]
    points = [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]
    return [point for point in points if point != best]


# ---------------------------------------------------------------- a trial


def run_trial(config: str, out: Path, number: int, params: dict, rest, metric: str, stop: list):
    """(metric, None) of one run of scripts/train.py, or (None, what went wrong); it is told when `stop` fills."""
    directory, log = out / "trials" / f"{number:03d}", out / "trials" / f"{number:03d}.log"
    words = [f"--{name}={shown(value, exact=True)}" for name, value in params.items()]
    command = [sys.executable, str(TRAINER), config, *rest, *words, "--run-dir", str(directory)]
    with log.open("a") as file:
        try:  # the run inherits the lock with its output: it may have outlived a sweep that was killed
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise configs.ConfigError(f"trial {number} of an earlier sweep still runs: it writes {log}") from error
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
    return read_metric(directory / "metrics.jsonl", metric)


def read_metric(path: Path, metric: str):
    """(the mean over the last tenth of the steps, None), or (None, what went wrong)."""
    if not path.is_file():
        return None, f"{path.name} cannot be read: there is none"
    entries = read_metrics(path, warn=lambda text: None)  # a damaged line costs no trial
    if not entries:
        return None, f"{path.name} is empty"
    known = [name for name in entries[-1] if name != "step"]
    last = [entry[metric] for entry in entries if metric in entry and entry["step"] > 0.9 * entries[-1]["step"]]
    if not last:
        return None, f"no {metric!r} in {path.name} of its last steps; it has {', '.join(known)}"
    value = float(np.mean([math.nan if number is None else number for number in last]))
    return (value, None) if math.isfinite(value) else (None, f"{metric} is {value}")


# ---------------------------------------------------------------- the ranges


def parse_space(texts, config) -> dict[str, Range | Choices]:
    """{setting: its values} of SETTING=... texts. Raises ConfigError for what is no setting or makes no sense."""
    known, space = configs.flat(config), {}
    if not texts:
        raise configs.ConfigError("nothing to search: give --param SETTING=LOW:HIGH[:log] or --param SETTING=A,B,C")
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise configs.ConfigError(f"--param {text}: expected SETTING=LOW:HIGH, SETTING=LOW:HIGH:log or SETTING=A,B")
        if name not in known and not configs.is_argument(config, name):
            hint = did_you_mean(name, known)
            raise configs.ConfigError(f"--param {text}: the config has no setting {name!r}{hint}")
        if name in space:
            raise configs.ConfigError(f"--param {name} is given twice")
        is_range = ":" in values
        space[name] = parse_range(text, values, known.get(name)) if is_range else parse_choices(text, values)
    return space


def parse_choices(text: str, values: str) -> Choices:
    words = tuple(word.strip() for word in values.split(","))
    if len(set(words)) < 2 or len(set(words)) < len(words) or not all(words):
        raise configs.ConfigError(f"--param {text}: expected two different values or more, or a range LOW:HIGH")
    return Choices(words)


def parse_range(text: str, values: str, setting: Any) -> Range:
    ends = values.split(":")
    log = ends[-1] == "log"
    ends = ends[:-1] if log else ends
    try:
        low, high = map(float, ends)
    except ValueError as error:
        raise configs.ConfigError(f"--param {text}: expected two numbers, LOW:HIGH or LOW:HIGH:log") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise configs.ConfigError(f"--param {text}: expected LOW below HIGH, both finite")
    if log and low <= 0:
        raise configs.ConfigError(f"--param {text}: a logarithmic range begins above 0")
    whole = all(re.fullmatch(r"[+-]?\d+", end.strip()) for end in ends) and not isinstance(setting, float)
    if isinstance(setting, int) and not isinstance(setting, bool) and not whole:
        raise configs.ConfigError(f"--param {text}: this setting is a whole number, and so must both ends be")
    return Range(int(low) if whole else low, int(high) if whole else high, log, whole)


def shown(value, exact: bool = False) -> str:
    return f"{value:.4g}" if isinstance(value, float) and not exact else str(value)


# ---------------------------------------------------------------- results


def results(study, space: dict, metric: str) -> list[dict]:
    """A row a trial, the best first, the failed last."""
    rows = []
    for trial in study.trials:
        finished = trial.state.is_finished()
        if not finished and not trial.params:
            continue
        seconds = trial.duration.total_seconds() if finished and trial.duration else None
        rows.append({
            "trial": trial.number, "phase": trial.user_attrs.get("phase", "random"),
            "state": trial.state.name.lower() if finished else "unfinished", metric: trial.value,
            **{name: trial.params.get(name) for name in space},
            "seconds": None if seconds is None else round(seconds, 1), "error": trial.user_attrs.get("error", ""),
        })  # fmt: skip
    return sorted(rows, key=lambda row: (row[metric] is None, row[metric] or 0.0, row["trial"]))


def write_csv(path: Path, rows: list[dict]) -> None:
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["trial"])
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, lambda file: file.write(text.getvalue().encode()))


def table(rows: list[dict]) -> str:
    """The rows as text, in columns; the errors, which are long, at their end."""
    names = [name for name in rows[0] if name != "error"] if rows else []
    cells = [names] + [["" if row[name] is None else shown(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    errors = [""] + [row["error"] for row in rows]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(f"{line}  {error}".rstrip() for line, error in zip(lines, errors, strict=True))


def figure(path: Path, rows: list[dict], space: dict, metric: str) -> None:
    """The metric against each setting: random trials, those of the grid, the best; failed ones at the upper edge."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    done = [row for row in rows if row[metric] is not None]
    failed = [row for row in rows if row["state"] == "fail" and row[next(iter(space))] is not None]
    sheet = Figure(figsize=(3.2 * len(space) + 0.6, 3.2), dpi=110, layout="constrained")
    FigureCanvasAgg(sheet)
    axes = np.atleast_1d(sheet.subplots(1, len(space), sharey=True))
    for column, (name, values) in enumerate(space.items()):
        a, place = axes[column], (lambda v: v)
        if isinstance(values, Choices):
            place = values.words.index
            a.set_xticks(range(len(values.words)), values.words)
            a.set_xlim(-0.5, len(values.words) - 0.5)
        else:
            mark_range(a, values)
        for phase, color in (("random", plot.FAINT), ("grid", plot.ACCENT)):
            some = [row for row in done if row["phase"] == phase]
            if some:
                x = [place(row[name]) for row in some]
                a.scatter(x, [row[metric] for row in some], s=26, color=color, label=phase, zorder=2)
        best = done[0]
        style = dict(facecolors="none", edgecolors=plot.INK, linewidths=1.4, zorder=3)
        a.scatter([place(best[name])], [best[metric]], s=90, label="best", **style)
        if failed:
            x = [place(row[name]) for row in failed]
            to_top = a.get_xaxis_transform()
            a.scatter(x, [0.97] * len(x), s=26, marker="x", color="#b3402e", label="failed", transform=to_top)
        a.set_xlabel(name, fontsize=9, color=plot.INK)
        a.tick_params(labelsize=8, color="#d5dbe1", labelcolor=plot.INK)
        a.spines[["top", "right"]].set_visible(False)
        a.margins(y=0.12)
    axes[0].set_ylabel(metric, fontsize=9, color=plot.INK)
    sheet.legend(*axes[0].get_legend_handles_labels(), loc="outside upper right", ncols=4, frameon=False, fontsize=8)
    plot.write(path, lambda file: sheet.savefig(file, format="png"))


def mark_range(axes, values: Range) -> None:
    """The whole range on the axis, and at most five numbers below it."""
    margin = 0.05
    if not values.log:
        margin *= values.high - values.low
        axes.set_xlim(values.low - margin, values.high + margin)
        axes.locator_params(axis="x", nbins=5)
        return
    margin = (values.high / values.low) ** margin
    axes.set_xscale("log")
    axes.set_xlim(values.low / margin, values.high * margin)
    if values.high / values.low < 100:  # too few powers of ten: matplotlib's own labels run into each other
        ticks = sorted({float(f"{v:.3g}") for v in np.geomspace(values.low, values.high, 4)})
        axes.set_xticks(ticks, [f"{v:g}" for v in ticks])
        axes.minorticks_off()


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (configs.ConfigError, OSError) as error:
        configs.fail(error)
