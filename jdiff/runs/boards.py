"""Boards, on which a run shows its numbers and pictures: TensorBoard, Weights & Biases. A new one is one class."""

import secrets
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from jdiff.config import ConfigError, first_line
from jdiff.core import files
from jdiff.core.extras import needs


class Board(Protocol):
    """What shows a run while it trains."""

    def numbers(self, step: int, values: dict[str, float]) -> None:
        """Show numbers of a step."""

    def histogram(self, step: int, name: str, edges: np.ndarray, heights: np.ndarray) -> None:
        """Show a height (n,) for each of the intervals between edges (n + 1,)."""

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        """Show an image, uint8 (H, W, 3)."""

    def flush(self) -> None:
        """Let everything so far reach the disk."""

    def close(self) -> None:
        """Write what is left, and end."""


class TensorBoard:
    """Event files in DIR/tensorboard, for `tensorboard --logdir runs`.

    Args:
        directory: of the run.
        start: the step at which the run goes on; what was shown of later steps is hidden.

    Raises:
        MissingExtra: tensorboardX is not installed.
    """

    def __init__(self, directory: Path, start: int):
        with needs("the log of a run needs"):
            from tensorboardX import SummaryWriter
        self._writer = SummaryWriter(str(directory / "tensorboard"), purge_step=start + 1)

    def numbers(self, step: int, values: dict[str, float]) -> None:
        for name, value in values.items():
            self._writer.add_scalar(name, value, step)

    def histogram(self, step: int, name: str, edges: np.ndarray, heights: np.ndarray) -> None:
        h, middle = heights, (edges[1:] + edges[:-1]) / 2
        self._writer.add_histogram_raw(
            name, float(edges[0]), float(edges[-1]), float(h.sum()), float(h @ middle), float(h @ middle**2),
            edges[1:].tolist(), h.tolist(), step,
        )  # fmt: skip

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._writer.add_image(name, image, step, dataformats="HWC")

    def flush(self) -> None:
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()


class Wandb:
    """A run of a project of Weights & Biases, which goes on when the training goes on.

    Args:
        directory: of the run. The identity of the board's run is kept there, in wandb.id.
        project: where it is shown.
        name: of the run.
        settings: of the run, as JSON can hold them.

    Raises:
        MissingExtra: wandb is not installed.
        ConfigError: wandb cannot begin, for example because nobody is logged in.
    """

    def __init__(self, directory: Path, project: str, name: str, settings: dict):
        self._wandb = _wandb()
        path = directory / "wandb.id"
        if not path.is_file():
            files.write(path, lambda file: file.write(secrets.token_hex(8).encode()))
        identity = path.read_text().strip()
        try:
            self._run: Any = self._wandb.init(
                project=project, name=name, id=identity, resume="allow", dir=str(directory), config=settings,
                settings=self._wandb.Settings(console="off"),
            )  # fmt: skip
        except Exception as error:  # its own kinds, of the network, the account and the name
            why = first_line(error).rstrip(".")
            raise ConfigError(f"--wandb {project}: {why}; or set WANDB_MODE=offline, to send it later") from error

    def numbers(self, step: int, values: dict[str, float]) -> None:
        self._run.log(dict(values), step=step)

    def histogram(self, step: int, name: str, edges: np.ndarray, heights: np.ndarray) -> None:
        self._run.log({name: self._wandb.Histogram(np_histogram=(heights, edges))}, step=step)

    def picture(self, step: int, name: str, image: np.ndarray) -> None:
        self._run.log({name: self._wandb.Image(image)}, step=step)

    def flush(self) -> None:
        """Nothing to do: a process of wandb's own has everything already."""

    def close(self) -> None:
        self._run.finish()


def check_wandb() -> None:
    """Find out, before any work, whether wandb is installed.

    Raises:
        MissingExtra: it is not.
    """
    _wandb()


def _wandb() -> Any:
    with needs("--wandb needs", "wandb"):
        import wandb
    return wandb
