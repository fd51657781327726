"""The search of hyper-parameters: what is searched, the grid around the best, and the table of results.

The trials themselves are run by jdiff sweep, and kept by Optuna.
"""

import csv
import dataclasses
import io
import itertools
import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np

from jdiff.config import Config, ConfigError, flat, is_argument
from jdiff.core import files
from jdiff.core.names import did_you_mean
from jdiff.runs.watch import read_metrics

# ---------------------------------------------------------------- what is searched


@dataclasses.dataclass(frozen=True)
class Range:
    """LOW to HIGH, both included; whole numbers or not, evenly in the number or in its logarithm."""

    low: float
    high: float
    log: bool = False
    whole: bool = False

    def suggest(self, trial, name: str):
        """Let Optuna draw a value at random."""
        suggest = trial.suggest_int if self.whole else trial.suggest_float
        return suggest(name, int(self.low) if self.whole else self.low, self.high, log=self.log)

    def around(self, best: float, trials: int, ranges: int, count: int) -> list:
        """Values about the best one, evenly spaced, from half a distance below it to half a distance above it.

        Trials at random lie about span / trials^(1/ranges) apart: that is the distance.

        Args:
            best: the best value so far.
            trials: how many trials at random there were.
            ranges: how many ranges are searched.
            count: how many values to return. Where it is even, the best is not among them: it has been tried.

        Returns:
            The values in ascending order; one that lies past an end of the range is at that end.
        """
        low, high, best = (math.log(v) if self.log else v for v in (self.low, self.high, best))
        reach = (high - low) / (2 * max(trials, 1) ** (1 / ranges))
        values = [best + reach * u for u in (np.linspace(-1, 1, count) if count > 1 else [0.0])]
        values = [float(np.clip(math.exp(v) if self.log else v, self.low, self.high)) for v in values]
        return sorted({round(v) if self.whole else v for v in values})


@dataclasses.dataclass(frozen=True)
class Choices:
    """One of some words, each as it is given to jdiff train."""

    words: tuple[str, ...]

    def suggest(self, trial, name: str):
        """Let Optuna draw a word at random."""
        return trial.suggest_categorical(name, self.words)

    def around(self, best: str, trials: int, ranges: int, count: int) -> list:
        """The best alone: there is nothing between words. The arguments are those of `Range.around`."""
        del trials, ranges, count
        return [best]


def parse_space(texts: Iterable[str], config: Config) -> dict[str, Range | Choices]:
    """Read what is searched.

    Args:
        texts: of the form SETTING=LOW:HIGH, SETTING=LOW:HIGH:log or SETTING=A,B,C.
        config: the config whose settings they name.

    Returns:
        {setting: its values}.

    Raises:
        ConfigError: a text has another form, names no setting, or makes no sense.
    """
    known, space = flat(config), {}
    if not texts:
        raise ConfigError("nothing to search: give --param SETTING=LOW:HIGH[:log] or --param SETTING=A,B,C")
    for text in texts:
        name, equals, values = text.partition("=")
        if not equals or not values:
            raise ConfigError(f"--param {text}: expected SETTING=LOW:HIGH, SETTING=LOW:HIGH:log or SETTING=A,B")
        if name not in known and not is_argument(config, name):
            hint = did_you_mean(name, known)
            raise ConfigError(f"--param {text}: the config has no setting {name!r}{hint}")
        if name in space:
            raise ConfigError(f"--param {name} is given twice")
        is_range = ":" in values
        space[name] = parse_range(text, values, known.get(name)) if is_range else parse_choices(text, values)
    return space


def parse_choices(text: str, values: str) -> Choices:
    """Read A,B,C; `text` is the whole of it, for the message. Raises ConfigError for fewer than two different words."""
    words = tuple(word.strip() for word in values.split(","))
    if len(set(words)) < 2 or len(set(words)) < len(words) or not all(words):
        raise ConfigError(f"--param {text}: expected two different values or more, or a range LOW:HIGH")
    return Choices(words)


def parse_range(text: str, values: str, setting: Any) -> Range:
    """Read LOW:HIGH or LOW:HIGH:log.

    Args:
        text: the whole of it, for the message.
        values: the range.
        setting: what the config has there: where that is a whole number, the values must be whole.

    Returns:
        The range; of whole numbers if both ends are whole, and the setting is not a float.

    Raises:
        ConfigError: the ends are no numbers, or not in this order, or not what the setting takes.
    """
    ends = values.split(":")
    log = ends[-1] == "log"
    ends = ends[:-1] if log else ends
    try:
        low, high = map(float, ends)
    except ValueError as error:
        raise ConfigError(f"--param {text}: expected two numbers, LOW:HIGH or LOW:HIGH:log") from error
    if not (math.isfinite(low) and math.isfinite(high) and low < high):
        raise ConfigError(f"--param {text}: expected LOW below HIGH, both finite")
    if log and low <= 0:
        raise ConfigError(f"--param {text}: a logarithmic range begins above 0")
    whole = all(re.fullmatch(r"[+-]?\d+", end.strip()) for end in ends) and not isinstance(setting, float)
    if isinstance(setting, int) and not isinstance(setting, bool) and not whole:
        raise ConfigError(f"--param {text}: this setting is a whole number, and so must both ends be")
    return Range(int(low) if whole else low, int(high) if whole else high, log, whole)


def shown(value, exact: bool = False) -> str:
    """A value as text: a float with four digits, or with all of them if `exact`."""
    return f"{value:.4g}" if isinstance(value, float) and not exact else str(value)


# ---------------------------------------------------------------- trials


def number_of(study, phase: str) -> int:
    """How many trials of a study were drawn in a phase, "random" or "grid"."""
    return sum(trial.user_attrs.get("phase", "random") == phase for trial in study.trials)


def refinement(study, space: dict, trials: int, count: int) -> list[dict]:
    """The grid around the best of the trials at random.

    Args:
        study: Optuna's study.
        space: {setting: its values}.
        trials: how many trials at random there were to be.
        count: values of each range on the grid.

    Returns:
        [{setting: value}, ...] without the best itself; [] where no trial came to its end or nothing is a range.
    """
    done = [t for t in study.trials if t.value is not None and t.user_attrs.get("phase") != "grid"]
    ranges = sum(isinstance(values, Range) for values in space.values())
    if not done or not ranges:
        return []
    best = min(done, key=lambda t: t.value).params
    axes = [values.around(best[name], trials, ranges, count) for name, values in space.items()]
    points = [dict(zip(space, point, strict=True)) for point in itertools.product(*axes)]
    return [point for point in points if point != best]


def read_metric(path: Path, metric: str) -> tuple[float | None, str | None]:
    """Read how good a run was.

    Args:
        path: of its metrics.jsonl.
        metric: the name of an entry.

    Returns:
        (the mean of the metric over the last tenth of the steps, None), or (None, what went wrong).
    """
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


# ---------------------------------------------------------------- results


def results(study, space: dict, metric: str) -> list[dict]:
    """The rows of the table of a study.

    Args:
        study: Optuna's study.
        space: {setting: its values}.
        metric: the name of what is minimised.

    Returns:
        A dict for each trial: its number, phase, state, metric, settings, seconds and error. The best comes first, and
        those without a metric last.
    """
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
    """Write the rows of `results` as a table in a file."""
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]) if rows else ["trial"])
    writer.writeheader()
    writer.writerows(rows)
    files.write(path, lambda file: file.write(text.getvalue().encode()))


def table(rows: list[dict]) -> str:
    """The rows of `results` as text in columns; the errors, which are long, stand at the ends of the lines."""
    names = [name for name in rows[0] if name != "error"] if rows else []
    cells = [names] + [["" if row[name] is None else shown(row[name]) for name in names] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(names))]
    errors = [""] + [row["error"] for row in rows]
    lines = ["  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)) for line in cells]
    return "\n".join(f"{line}  {error}".rstrip() for line, error in zip(lines, errors, strict=True))
