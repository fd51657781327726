"""Watching a run: progress on the terminal, metrics.jsonl, boards, and what the numbers mean for the machine."""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import jax
import numpy as np

from jdiff.core.extras import needs
from jdiff.core.files import write
from jdiff.runs.boards import Board
from jdiff.runs.progress import on_terminal

# dense bfloat16 products a second of one device, as their makers state them, by what JAX calls the device
PEAK_FLOPS = {
    "NVIDIA V100": 125e12, "NVIDIA A100": 312e12, "NVIDIA H100": 989e12, "NVIDIA H200": 989e12,
    "NVIDIA B200": 2250e12, "NVIDIA L4": 121e12, "NVIDIA L40": 181e12, "NVIDIA L40S": 362e12, "TPU v2": 22.5e12,
    "TPU v3": 61.5e12, "TPU v4": 275e12, "TPU v5 lite": 197e12, "TPU v5": 459e12, "TPU v6 lite": 918e12,
}  # fmt: skip


def peak_flops(devices) -> float | None:
    """What these devices can do together, FLOP/s; None where the kind is not known."""
    kind = devices[0].device_kind
    known = [(name, peak) for name, peak in PEAK_FLOPS.items() if kind.startswith(name)]
    return max(known)[1] * len(devices) if known else None  # the longest name that fits


def say(*words, file=None, **keywords) -> None:
    """As `print`, to stdout or `file`, at once; a terminal that was closed does not matter."""
    file = file or sys.stdout
    with silenced(file):
        print(*words, file=file, flush=True, **keywords)


@contextlib.contextmanager
def silenced(file) -> Iterator[None]:
    """Let no failure to write to `file`, stdout or stderr, leave the block: what follows goes nowhere.

    A run that its terminal has left goes on, or saves.
    """
    try:
        yield
    except OSError:
        null = os.open(os.devnull, os.O_WRONLY)
        os.dup2(null, file.fileno())
        os.close(null)


def memory() -> float | None:
    """The most memory that this process's first device has held, in GB; None where the platform does not say."""
    stats = jax.local_devices()[0].memory_stats() or {}
    return stats["peak_bytes_in_use"] / 1e9 if "peak_bytes_in_use" in stats else None


class Log:
    """One entry for each visit: on the terminal, in metrics.jsonl and on the boards.

    Args:
        directory: of the run.
        start: the step at which it goes on; entries of later steps are removed from metrics.jsonl.
        total: the step at which the run ends.
        images: samples in a step, to show a rate of images; 0 to show a rate of steps.
        peak: steps a second that the devices could make at most, to note the share that is reached (MFU), or None.
        first: whether this process speaks for the run. One that does not writes nothing.
        boards: what else shows the entries, where this process speaks; they are closed with the log.

    Raises:
        MissingExtra: tqdm is not installed.
    """

    def __init__(
        self,
        directory: Path,
        start: int,
        total: int,
        images: int,
        peak: float | None = None,
        first: bool = True,
        boards: Sequence[Board] = (),
    ):
        with needs("the log of a run needs"):
            from tqdm import tqdm

        self.path, self.total, self.images, self.first = directory / "metrics.jsonl", total, images, first
        self.peak, self.boards = peak, list(boards) if first else []
        if first and self.path.exists():  # entries of steps that were lost are made again; the last may be half a line
            entries = read_metrics(self.path, lambda text: say("warning:", text, file=sys.stderr))
            kept = [entry for entry in entries if entry["step"] <= start]
            text = "".join(json.dumps(entry) + "\n" for entry in kept)
            write(self.path, lambda file: file.write(text.encode()))
        quiet = not (first and on_terminal(sys.stderr))
        self.bar = tqdm(total=total, initial=start, unit="step", disable=quiet, dynamic_ncols=True)
        self.step, self.spoke, self.visits = start, 0.0, 0
        self.start()

    def start(self) -> None:
        """Begin to count the time: what came before, such as compiling, is nobody's rate."""
        self.time = time.perf_counter()
        self.began = (self.step, self.time)

    def visit(self, step: int, numbers: dict[str, float], waited: float = 0.0) -> None:
        """Note the steps since the last visit: their mean `numbers`, `loss` among them, and seconds spent on data."""
        now = time.perf_counter()
        elapsed = now - self.time
        rate = (step - self.step) / elapsed
        values = dict(**numbers, steps_per_s=rate, images_per_s=rate * (self.images or 1), data_wait=waited / elapsed)
        if self.peak:
            values["mfu"] = rate / self.peak
        if (held := memory()) is not None:
            values["memory_gb"] = held
        if self.first:
            entry = {"step": step} | {k: v if math.isfinite(v) else None for k, v in values.items()}
            with self.path.open("a") as file:
                file.write(json.dumps(entry) + "\n")
        for board in self.boards:
            board.numbers(step, values)
        speed = f"{rate * self.images:,.0f} images/s" if self.images else f"{rate:,.0f} steps/s"
        speed += f", MFU {values['mfu']:.0%}" if "mfu" in values else ""
        with silenced(sys.stderr):
            self.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {speed}")
            self.bar.update(step - self.step)
        if self.first and self.bar.disable and (now - self.spoke > 10 or step == self.total):
            left = (self.total - step) * (now - self.began[1]) / (step - self.began[0])
            say(f"step {step:,}/{self.total:,}  loss {numbers['loss']:.4f}  {speed}  {left:,.0f} s left")
            self.spoke = now
        self.step, self.time, self.visits = step, now, self.visits + 1

    def histogram(self, step: int, name: str, edges: np.ndarray, heights: np.ndarray) -> None:
        """Show on the boards a value for each of the intervals between edges (n + 1,); nan where there is none."""
        for board in self.boards:
            board.histogram(step, name, edges, np.nan_to_num(heights))

    def picture(self, path: Path | None, step: int) -> None:
        """Show a picture on the boards; the time it took is nobody's rate."""
        if self.boards and path is not None:
            with needs("pictures need"):
                from PIL import Image

            image = np.asarray(Image.open(path).convert("RGB"))
            for board in self.boards:
                board.picture(step, "samples", image)
        self.time = time.perf_counter()

    def rest(self) -> None:
        """End the bar after the last visit, and let the boards write what they have: a last picture may follow."""
        with silenced(sys.stderr):
            self.bar.close()
        for board in self.boards:
            board.flush()

    def close(self) -> None:
        """Flush and close everything."""
        with silenced(sys.stderr):
            self.bar.close()
        for board in self.boards:
            board.close()


def read_metrics(path, warn: Callable[[str], object] = warnings.warn) -> list[dict]:
    """The entries of a metrics.jsonl, oldest first; [] where there is none.

    A line that is damaged, or has no whole number as its step, is left out, and `warn` is given a text that says how
    many. A last line that a kill has cut short is left out in silence.
    """
    path = Path(path)
    if not path.exists():
        return []
    *lines, cut = path.read_text(errors="replace").split("\n")
    entries = [_entry(line) for line in (*lines, cut)]
    if bad := entries[:-1].count(None):
        warn(f"{path}: {bad} of {len(lines)} lines are damaged and left out")
    return [entry for entry in entries if entry is not None]


def _entry(line: str) -> dict | None:
    try:
        entry = json.loads(line)
    except (ValueError, RecursionError):
        return None
    return entry if isinstance(entry, dict) and type(entry.get("step")) is int else None
