"""Visits: the steps that run in one program between two looks of the host, and what it sees there."""

import contextlib
from collections.abc import Callable, Iterator
from pathlib import Path

import jax
import numpy as np

from jdiff.config import ConfigError, Train
from jdiff.process.clock import log_snr

EDGES = np.linspace(-14.0, 14.0, 29)  # log-SNR, for the histogram of the loss


def visits(step: int, last: int, settings: Train) -> Iterator[tuple[int, int]]:
    """Divide the steps from `step` to `last` into visits, none of which runs past something that is due.

    Args:
        step: the steps that have been taken.
        last: the step to stop at.
        settings: the length of a visit, and how often checkpoints, pictures and snapshots are due.

    Yields:
        (first step, number of steps) of each visit.
    """
    due = [every for every in (settings.save_every, settings.sample_every) if every]
    due += [settings.snapshot_every] if settings.posthoc else []
    while step < last:
        count = min(settings.visit, last - step, *((step // every + 1) * every - step for every in due))
        yield step, count
        step += count


def padded(a: np.ndarray, length: int) -> np.ndarray:
    """`a` with rows of zeros up to `length` rows, so that whole visits and remainders are one program."""
    return a if len(a) == length else np.concatenate([a, np.zeros((length - len(a), *a.shape[1:]), a.dtype)])


def make_record(schedule) -> Callable:
    """What is kept of each step of a visit, for `make_train_loop`.

    Args:
        schedule: the noise schedule.

    Returns:
        `record(aux) -> metrics`: the numbers in aux; `each` (B,), the loss of each sample; `level` (B,), its log-SNR.
    """

    def record(aux):
        numbers = {name: a for name, a in aux.items() if name != "extra" and a.ndim == 0}
        return dict(numbers, each=aux["each"], level=log_snr(schedule, aux["t"]))

    return record


def means(metrics: dict[str, np.ndarray]) -> dict[str, float]:
    """The mean over a visit of each number that is noted once a step, over the steps where it is finite, or nan."""
    return {name: _finite_mean(values) for name, values in metrics.items() if values.ndim == 1}


def _finite_mean(values: np.ndarray) -> float:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else float("nan")


def by_level(level: np.ndarray, each: np.ndarray) -> np.ndarray:
    """The mean loss of a visit's samples in each interval between `EDGES`.

    Args:
        level: the log-SNR of each sample, of any shape.
        each: the loss of each sample, of that shape.

    Returns:
        (len(EDGES) - 1,), nan where an interval has no sample.
    """
    level = np.clip(level.ravel(), EDGES[0], EDGES[-1])
    total, number = (np.histogram(level, EDGES, weights=weights)[0] for weights in (each.ravel(), None))
    return np.where(number, total / np.maximum(number, 1), np.nan)


def check_finite(metrics: dict, start: int, skipped: int, limit: int, last: Callable[[], str]) -> int:
    """Count the steps in a row whose loss or gradient is not finite.

    Args:
        metrics: `loss` and `grad_norm` of each step of a visit.
        start: the first step of the visit.
        skipped: how many such steps came in a row before the visit.
        limit: how many may come in a row.
        last: says which checkpoint is the last one, for the message.

    Returns:
        How many such steps have come in a row at the end of the visit.

    Raises:
        ConfigError: there were more than the limit.
    """
    bad = ~np.isfinite(metrics["loss"]) | ~np.isfinite(metrics["grad_norm"])
    for i, is_bad in enumerate(bad):
        skipped = skipped + 1 if is_bad else 0
        if skipped > limit:
            times = f", {limit} steps before it left out" if limit else ""
            raise ConfigError(
                f"the loss became {metrics['loss'][i]}, its gradient's norm {metrics['grad_norm'][i]}, at step "
                f"{start + i:,}{times}; {last()}; try a lower train.lr"
            )
    return skipped


@contextlib.contextmanager
def profiled(directory: Path, wanted: bool) -> Iterator[None]:
    """Write a trace of the block for TensorBoard or Perfetto into `directory`, if it is wanted."""
    with jax.profiler.trace(str(directory)) if wanted else contextlib.nullcontext():
        yield
