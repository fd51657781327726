"""A run directory, and what its config makes of it: data, network, training state.

`DIR/{config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/}`.
"""

import dataclasses
import json
import math
import os
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff.config import Config, ConfigError
from jdiff.core import files
from jdiff.data import Dataset, without_labels
from jdiff.losses import Regression
from jdiff.losses.levels import LossAware
from jdiff.runs import lock
from jdiff.train import checkpoint, parallel
from jdiff.train.step import TrainState, init_state

UNFIT = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError)  # what wrong sizes raise
DATA_PLACE = ("data.args.data_dir", "data.args.cache", "data.args.threads")  # where data are, and how they are read
# the settings that samples of a trained average do not depend on, or only as asked for when they are drawn
UNSAMPLED = ("name", "seed", "levels", "weight", "coupling", "loss.args", "train", "sample", *DATA_PLACE)
# the settings that may change between two starts of one training run
FREE = (
    "train.save_every", "train.keep", "train.keep_every", "train.sample_every", "train.threads", "train.devices",
    "train.fsdp", "train.peer_timeout", "train.steps", "sample", *DATA_PLACE,
)  # fmt: skip
ENDING = ("cosine", "linear")  # learning rates that end at train.steps: another number of steps is another run


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything that a config names, built."""

    directory: Path
    """Where the run is kept."""
    config: Config
    """What it is made of."""
    dataset: Dataset
    """Its data."""
    model: Any
    """Its network: a module with `init` and `apply`."""
    regression: Regression
    """What its loss regresses, and at which noise levels."""
    loss: Any
    """Its loss, one of `jdiff.losses`; `make_loss` adds what training does to data and labels."""

    @property
    def schedule(self):
        """The noise schedule."""
        return self.regression.schedule

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.directory / "checkpoints"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """The shape of one sample as the network sees it: where it is self-conditioned, beside an earlier estimate."""
        *space, channels = self.dataset.shape
        return (*space, channels if self.config.self_conditioning is None else 2 * channels)

    def init_params(self) -> Any:
        """Fresh parameters, a function of the config's seed."""
        x = jnp.zeros((1, *self.input_shape))
        cond = jnp.zeros(1, jnp.int32) if self.dataset.classes else None
        return jax.jit(self.model.init)(jax.random.key(self.config.seed), x, jnp.zeros(1), cond)


# ---------------------------------------------------------------- the run of a config, of a directory


def build(directory, config: Config) -> Run:
    """Build a run from its config.

    Args:
        directory: where it is kept; nothing is read or written there.
        config: what it is made of.

    Returns:
        The run.

    Raises:
        ConfigError: something in the config has no meaning, or does not fit the data.
    """
    configs.check(config)
    dataset = configs.build_data(config)
    if config.train.batch > dataset.size:
        raise ConfigError(f"train.batch is {config.train.batch}, but {dataset.name} has {dataset.size:,} samples")
    if (config.train.flip or config.train.augment) and not dataset.is_image:
        raise ConfigError(f"train.flip and train.augment are for images, and {dataset.name} holds points")
    model = configs.build_model(config, dataset.classes)
    if dataset.classes and not getattr(model, "num_classes", 0):
        dataset = without_labels(dataset)
    return Run(Path(directory), config, dataset, model, configs.build_regression(config), configs.build_loss(config))


def read_config(directory) -> Config:
    """The config of an existing run directory.

    Raises:
        ConfigError: there is no run, or its config has no meaning to this version.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} is no run directory: it has no config.json; make one with jdiff train")
    return configs.from_json(path)


def open_run(directory) -> Run:
    """Build the run of an existing directory from its config.json.

    Raises:
        ConfigError: there is no run, or its config has no meaning to this version.
    """
    return build(directory, read_config(directory))


def prepare_directory(run: Run) -> None:
    """Make a directory that of a run, to be trained in: all processes call this together, under the lock.

    An old directory must be of the same run. The config is written, and what a killed run has left is removed.

    Raises:
        ConfigError: the directory holds another run, or one that was trained on other data.
        OSError: it cannot be written.
    """
    path = run.directory / "config.json"
    ends = run.config.train.lr_schedule.name in ENDING
    free = [name for name in FREE if not (ends and name == "train.steps")]
    if path.is_file() and (change := configs.change(configs.from_json(path), run.config, ignore=free)):
        raise ConfigError(f"{run.directory} holds another run: {change}; choose another --run-dir")
    with checkpoint.told():  # the checkpoints know the config too, where config.json was lost or edited
        check_noted(run, ignore=free)
    notes = (checkpoint.read_note(run.checkpoints, step) for step in reversed(checkpoint.steps(run.checkpoints)))
    check_same_data(run, next(filter(None, notes), {}))
    parallel.anywhere(False)  # all processes have read the directory before one of them writes in it
    if jax.process_index() == 0:
        lock.sweep(run.directory)
        files.write(path, lambda file: file.write(configs.to_json(run.config).encode()))


# ---------------------------------------------------------------- what its checkpoints say


def about_data(run: Run) -> dict:
    """What a checkpoint notes of the data that it was trained on."""
    return dict(size=run.dataset.size, shape=list(run.dataset.shape))


def check_same_data(run: Run, note: dict) -> None:
    """Check that a checkpoint was trained on as many samples, of the same shape; else its batches were others.

    Args:
        run: the run, with the data of now.
        note: of the checkpoint; those of earlier versions say nothing of the data.

    Raises:
        ConfigError: the data are others.
    """
    old, new = note.get("samples"), about_data(run)
    if old is not None and old != new:
        raise ConfigError(
            f"{run.directory} was trained on other data: its samples had {old}, and these have {new}; bring the data "
            "back, or choose another --run-dir"
        )


def check_noted(run: Run, step: int | None = None, ignore: Iterable[str] = ()) -> None:
    """Check that a checkpoint was trained with the config of the run.

    A note that this version cannot read is not compared: a `CheckpointWarning` says so.

    Args:
        run: the run, with the config that is asked for now.
        step: the checkpoint's step; None for the newest that notes a config.
        ignore: dotted names of settings that may differ, with all below them.

    Raises:
        ConfigError: it was trained with another config.
    """
    steps = checkpoint.steps(run.checkpoints) if step is None else [step]
    notes = [(s, checkpoint.read_note(run.checkpoints, s).get("config")) for s in reversed(steps)]
    step, noted = next(((s, config) for s, config in notes if config), (None, None))
    if noted is None:
        return
    try:
        old = configs.from_json(json.dumps(noted))
    except ConfigError as error:
        text = f"the config noted in checkpoint {step} in {run.checkpoints} is not compared: {error}"
        warnings.warn(text, checkpoint.CheckpointWarning, stacklevel=2)
        return
    if change := configs.change(old, run.config, ignore):
        raise ConfigError(
            f"checkpoint {step} in {run.checkpoints} is of another run: {change}; put config.json back as it was, or "
            "name another run directory"
        )


def last_checkpoint(directory: Path) -> str:
    """Which checkpoint of a run directory is the last one, in words."""
    steps = checkpoint.steps(directory / "checkpoints")
    return f"the last checkpoint is {steps[-1]:,}" if steps else "there is no checkpoint yet"


# ---------------------------------------------------------------- its parameters and its training state


def param_shapes(run: Run) -> Any:
    """The shapes and dtypes of the run's parameters.

    Raises:
        ConfigError: the network cannot be made, or its parameters do not fit into the memory.
    """
    try:
        shapes = jax.eval_shape(run.init_params)
    except UNFIT as error:
        raise ConfigError(f"the parts of this config do not fit: {configs.first_line(error)}") from error
    check_memory(run, shapes, "its parameters")
    return shapes


def check_memory(run: Run, shapes, what: str) -> None:
    """Check that arrays fit into the memory of the machines.

    Args:
        run: the run, whose model is named in the message.
        shapes: a tree of arrays or of `jax.ShapeDtypeStruct`.
        what: what the arrays are, for the message, as "its parameters".

    Raises:
        ConfigError: they are larger than the memory.
    """
    size = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    if size > memory:
        raise ConfigError(
            f"model {run.config.model.name!r} is too large: {what} would take {size / 2**30:,.0f} GiB, and there are "
            f"{memory / 2**30:,.0f} GiB of memory"
        )


def like(run: Run) -> Any:
    """Zeros in the structure of the run's parameters, to restore into. Raises ConfigError as `param_shapes` does."""
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), param_shapes(run))


def state_of(run: Run, params: Any) -> TrainState:
    """The run's training state at step 0, with these parameters."""
    law = run.regression.levels
    extra = {"levels": law.init()} if isinstance(law, LossAware) else None
    return init_state(params, configs.build_optimizer(run.config), extra, averages=configs.average_names(run.config))


def new_state(run: Run) -> TrainState:
    """The run's training state at step 0, with fresh parameters."""
    return state_of(run, run.init_params())


def main_average(state: TrainState) -> Any:
    """The average of the parameters that is sampled, whole and on the host: all processes call this together."""
    return parallel.host(state.ema["main"] if "main" in state.ema else state.ema)


def restore_ema(run: Run, step: int | None = None) -> tuple[int, Any]:
    """Restore the average of the parameters that is sampled; what was passed over is told on stderr.

    Args:
        run: the run.
        step: the checkpoint's step; None for the newest.

    Returns:
        (step, averaged parameters).

    Raises:
        CheckpointError: as `checkpoint.restore_ema` does.
        ConfigError: the checkpoint was trained with another config.
    """
    names = configs.average_names(run.config)
    trees = like(run) if names is None else {name: like(run) for name in names}
    with checkpoint.told():
        step, trees = checkpoint.restore_ema(run.checkpoints, trees, step)
        check_noted(run, step, ignore=UNSAMPLED)
    return step, trees if names is None else trees["main"]
