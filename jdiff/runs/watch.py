"""Watching a run: progress on the terminal, metrics.jsonl, TensorBoard, and what the numbers mean for the machine."""

import contextlib
import json
import math
import os
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdiff.core.extras import needs
from jdiff.core.files import write

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
    """One entry for each visit: on the terminal, in metrics.jsonl and for TensorBoard.

    Args:
        directory: of the run.
        start: the step at which it goes on; entries of later steps are removed from metrics.jsonl.
        total: the step at which the run ends.
        images: samples in a step, to show a rate of images; 0 to show a rate of steps.
        peak: steps a second that the devices could make at most, to note the share that is reached (MFU), or None.
        first: whether this process speaks for the run. One that does not writes nothing.

    Raises:
        MissingExtra: tqdm or tensorboardX is not installed.
    """

    def __init__(
        self, directory: Path, start: int, total: int, images: int, peak: float | None = None, first: bool = True
    ):
        with needs("the log of a run needs"):
            from tqdm import tqdm

        self.path, self.total, self.images, self.first = directory / "metrics.jsonl", total, images, first
        self.peak = peak
        self.board: Any = None  # TensorBoard's writer, where this process speaks
        if first:
            with needs("the log of a run needs"):
                from tensorboardX import SummaryWriter

            if self.path.exists():  # entries of steps that were lost are made again; the last may be half a line
                entries = read_metrics(self.path, lambda text: say("warning:", text, file=sys.stderr))
                kept = [entry for entry in entries if entry["step"] <= start]
                text = "".join(json.dumps(entry) + "\n" for entry in kept)
                write(self.path, lambda file: file.write(text.encode()))
            self.board = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)
        quiet = not (first and sys.stderr.isatty())
        self.bar = tqdm(total=total, initial=start, unit="step", disable=quiet, dynamic_ncols=True)
        self.step, self.time, self.spoke, self.visits = start, time.perf_counter(), 0.0, 0
        self.compiled: tuple[int, float] | None = None  # step and time of the first visit

    def visit(self, step: int, numbers: dict[str, float], waited: float = 0.0) -> None:
        """Note the steps since the last visit: their mean `numbers`, `loss` among them, and seconds spent on data."""
        now = time.perf_counter()
        elapsed = now - self.time
        rate = (step - self.step) / elapsed
        entry = dict(step=step, **numbers, steps_per_s=rate, images_per_s=rate * (self.images or 1))
        entry["data_wait"] = waited / elapsed
        if self.peak:
            entry["mfu"] = rate / self.peak
        if (held := memory()) is not None:
            entry["memory_gb"] = held
        if self.first:
            with self.path.open("a") as file:
                file.write(json.dumps({k: v if math.isfinite(v) else None for k, v in entry.items()}) + "\n")
            for name, value in entry.items():
                if name != "step":
                    self.board.add_scalar(name, value, step)
        speed = f"{rate * self.images:,.0f} images/s" if self.images else f"{rate:,.0f} steps/s"
        speed += f", MFU {entry['mfu']:.0%}" if "mfu" in entry else ""
        with silenced(sys.stderr):
            self.bar.set_postfix_str(f"loss {numbers['loss']:.4f}, {speed}")
            self.bar.update(step - self.step)
        if self.compiled is None:
            self.compiled = (step, now)  # the first visit compiles: it tells nothing of the rate
        if self.first and self.bar.disable and (now - self.spoke > 10 or step == self.total):
            done, elapsed = step - self.compiled[0], now - self.compiled[1]
            left = f"{(self.total - step) * elapsed / done:,.0f} s left" if done else "compiled"
            say(f"step {step:,}/{self.total:,}  loss {numbers['loss']:.4f}  {speed}  {left}")
            self.spoke = now
        self.step, self.time, self.visits = step, now, self.visits + 1

    def histogram(self, step: int, name: str, edges: np.ndarray, heights: np.ndarray) -> None:
        """Note for TensorBoard a value for each of the intervals between edges (n + 1,); nan where there is none."""
        if self.board is not None:
            h, middle = np.nan_to_num(heights), (edges[1:] + edges[:-1]) / 2
            self.board.add_histogram_raw(
                name, float(edges[0]), float(edges[-1]), float(h.sum()), float(h @ middle), float(h @ middle**2),
                edges[1:].tolist(), h.tolist(), step,
            )  # fmt: skip

    def picture(self, path: Path | None, step: int) -> None:
        """Note a picture for TensorBoard; the time it took is nobody's rate."""
        if self.board is not None and path is not None:
            with needs("pictures need"):
                from PIL import Image

            self.board.add_image("samples", np.asarray(Image.open(path).convert("RGB")), step, dataformats="HWC")
        self.time = time.perf_counter()

    def close(self) -> None:
        """Flush and close everything."""
        with silenced(sys.stderr):
            self.bar.close()
        if self.board is not None:
            self.board.close()


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
