"""Pictures of a run's samples: images by their class, or the figure of a plane."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff.process.forward import q_sample
from jdiff.runs import plot, watch
from jdiff.runs.draw import BATCH, Program, draw
from jdiff.runs.progress import SILENT, Progress
from jdiff.runs.run import Run

PANELS = 6  # of the figure of a plane, in a row


class Painter:
    """Draws the pictures of a run while it trains, all of them by one compiled program.

    Args:
        run: the run.
        progress: tells what is done.
        compiling: what is told while the program is compiled.
    """

    def __init__(self, run: Run, progress: Progress = SILENT, compiling: str = "compiling the sampler"):
        self.run, self._progress, self._compiling = run, progress, compiling
        self._program: Program | None = None  # from the first picture on

    def picture(self, params: Any, name: str) -> Path:
        """Draw samples of the run, from the same noise each time, and write DIR/samples/NAME.png.

        Args:
            params: the parameters of its network.
            name: of the picture, as "0000100" or "final".

        Returns:
            The path of the picture.

        Raises:
            ConfigError: a sample is not finite, or explodes; nothing is written then.
            OSError: the picture cannot be written.
        """
        path = self.run.directory / "samples" / f"{name}.png"
        (self._images if self.run.facts.is_image else self._plane)(params, path)
        return path

    def _draw(self, params: Any, batch: int, path: bool):
        """As `draw`, from the noise of the pictures."""
        run, sampling = self.run, self.run.config.sample
        if self._program is None:
            self._program = Program(run, sampling, min(batch, sampling.num), self._compiling)
        return draw(
            run, params, jax.random.key(run.config.seed + 2), sampling.num, sampling, batch=batch, path=path,
            progress=self._progress, program=self._program,
        )  # fmt: skip

    def _images(self, params: Any, path: Path) -> None:
        """Write a grid of images, by their class where there are classes."""
        x, labels = self._draw(params, BATCH, False)
        grid(self.run, path, self.run.facts.to_data(x), labels)

    def _plane(self, params: Any, path: Path) -> None:
        """Write the figure of a plane: the data as noise grows, the samples as it falls, and the loss so far."""
        run, data, sampling = self.run, self.run.facts, self.run.config.sample
        x, _, states = self._draw(params, sampling.num, True)
        _, times = configs.build_sampler(sampling, run.schedule)
        picks = np.unique(np.linspace(0, len(times) - 1, PANELS).round().astype(int))[:-1]
        forward = []
        if data.points is not None:
            x0 = data.to_model(data.points)
            eps, at = jax.random.normal(jax.random.key(run.config.seed + 2), x0.shape), [float(times[i]) for i in picks]
            noised = [(t, q_sample(run.schedule, x0, jnp.asarray(t), eps)) for t in at[::-1]]
            forward = [(0.0, x0), *noised]
        sampled = [(float(times[i]), states[i]) for i in picks]
        entries = watch.read_metrics(run.directory / "metrics.jsonl")
        entries = [entry for entry in entries if isinstance(entry.get("loss"), float)]  # None where it was not finite
        losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
        plot.plane_figure(path, forward, [*sampled, (0.0, x)], losses)


def grid(run: Run, path, samples: np.ndarray, labels: np.ndarray | None) -> int:
    """Write samples of a run as a grid, under the names of the classes that were asked for.

    Args:
        run: the run, whose data are images.
        path: where to, a .png.
        samples: images as they are stored.
        labels: their classes, (N,), or None where the run has no classes.

    Returns:
        How many of the samples the picture holds: at the most, what fits into `plot.LARGEST` pixels a side.
    """
    if labels is None:
        return plot.image_grid(path, samples)
    return plot.class_grid(path, samples, labels, run.facts.class_names)
