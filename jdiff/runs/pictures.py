"""Pictures of a run's samples: images by their class, or the figure of a plane."""

from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff.process.forward import q_sample
from jdiff.runs import plot, watch
from jdiff.runs.draw import draw
from jdiff.runs.run import Run

PANELS = 6  # of the figure of a plane, in a row


def picture(run: Run, params: Any, name: str) -> Path:
    """Draw samples of a run, from the same noise each time, and write DIR/samples/NAME.png.

    Args:
        run: the run.
        params: the parameters of its network.
        name: of the picture, as "0000100" or "final".

    Returns:
        The path of the picture.

    Raises:
        ConfigError: a sample is not finite, or explodes; nothing is written then.
        OSError: the picture cannot be written.
    """
    path = run.directory / "samples" / f"{name}.png"
    key = jax.random.key(run.config.seed + 2)
    (images if run.facts.is_image else plane)(run, params, key, path)
    return path


def images(run: Run, params: Any, key, path: Path) -> None:
    """Write a grid of images, by their class where there are classes."""
    sampling = run.config.sample
    x, labels = draw(run, params, key, sampling.num, sampling)
    grid(run, path, run.facts.to_data(x), labels)


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


def plane(run: Run, params: Any, key, path: Path) -> None:
    """Write the figure of a plane: the data as noise grows, the samples as it falls, and the loss so far."""
    sampling, data = run.config.sample, run.facts
    x, _, states = draw(run, params, key, sampling.num, sampling, batch=sampling.num, path=True)
    _, times = configs.build_sampler(sampling, run.schedule)
    picks = np.unique(np.linspace(0, len(times) - 1, PANELS).round().astype(int))[:-1]
    forward = []
    if data.points is not None:
        x0 = data.to_model(data.points)
        eps = jax.random.normal(key, x0.shape)
        noised = [(float(times[i]), q_sample(run.schedule, x0, jnp.asarray(float(times[i])), eps)) for i in picks[::-1]]
        forward = [(0.0, x0), *noised]
    sampled = [(float(times[i]), states[i]) for i in picks]
    entries = watch.read_metrics(run.directory / "metrics.jsonl")
    entries = [entry for entry in entries if isinstance(entry.get("loss"), float)]  # None where it was not finite
    losses = [entry["step"] for entry in entries], [entry["loss"] for entry in entries]
    plot.plane_figure(path, forward, [*sampled, (0.0, x)], losses)
