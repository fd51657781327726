"""A run directory, and what its config makes of it: data, network, training state.

`DIR/{config.json, data.json, data.npz, checkpoints/, metrics.jsonl, tensorboard/, samples/}`.
"""

import dataclasses
import functools
import inspect
import json
import math
import os
import warnings
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff.config import Config, ConfigError
from jdiff.core import files
from jdiff.data import DATASETS, DataFacts, DataWarning, facts_of, read_facts, without_labels, write_facts
from jdiff.losses import Regression
from jdiff.losses.levels import LossAware
from jdiff.runs import lock
from jdiff.train import checkpoint, parallel
from jdiff.train.step import TrainState, init_state

UNFIT = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError)  # what wrong sizes raise
DATA_PATH = "data.args.path"  # where data are that are known by their fingerprint
DATA_PLACE = (DATA_PATH, "data.args.data_dir", "data.args.cache", "data.args.threads")  # and how they are read
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
    facts: DataFacts
    """What is known of its data, which a trained run keeps."""
    model: Any
    """Its network: a module with `init` and `apply`."""
    regression: Regression
    """What its loss regresses, and at which noise levels."""
    loss: Any
    """Its loss, one of `jdiff.losses`; `make_loss` adds what training does to data and labels."""
    open_data: Callable[[], Any]
    """Opens its data, for `dataset`."""

    @functools.cached_property
    def dataset(self) -> Any:
        """Its data, opened when they are first asked for. Sampling does not ask for them.

        Raises:
            ConfigError: they cannot be read, or have another shape than those of the training.
        """
        return self.open_data()

    def moments(self) -> tuple[np.ndarray, np.ndarray]:
        """(mean, std) of the training samples in the model's numbers; the data are opened if they were not kept."""
        mean, std = self.facts.mean, self.facts.std
        return self.dataset.moments() if mean is None or std is None else (mean, std)

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
        *space, channels = self.facts.shape
        return (*space, channels if self.config.self_conditioning is None else 2 * channels)

    def init_params(self) -> Any:
        """Fresh parameters, a function of the config's seed."""
        x = jnp.zeros((1, *self.input_shape))
        cond = jnp.zeros(1, jnp.int32) if self.facts.classes else None
        return jax.jit(self.model.init)(jax.random.key(self.config.seed), x, jnp.zeros(1), cond)


# ---------------------------------------------------------------- the run of a config, of a directory


def build(directory, config: Config) -> Run:
    """Build a run from its config, and open its data.

    Args:
        directory: where it is kept; nothing is read or written there.
        config: what it is made of.

    Returns:
        The run.

    Raises:
        ConfigError: something in the config has no meaning, or does not fit the data.
    """
    configs.check(config)
    data = configs.build_data(config)
    if config.train.batch > data.size:
        raise ConfigError(
            f"train.batch is {config.train.batch}, but {data.name} has {data.size:,} samples to train on; "
            f"use --train.batch {data.size} or less"
        )
    if (config.train.flip or config.train.augment) and not data.is_image:
        raise ConfigError(f"train.flip and train.augment are for images, and {data.name} holds points")
    if data.classes and not getattr(configs.build_model(config, data.classes), "num_classes", 0):
        data = without_labels(data)
    return _built(directory, config, facts_of(data, config.sample.match_prior), lambda: data)


def read_config(directory) -> Config:
    """The config of an existing run directory.

    Raises:
        ConfigError: there is no run, or its config has no meaning to this version.
    """
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} is no run directory: it has no config.json; make one with jdiff train")
    return configs.from_json(path)


def open_run(directory, data: str | None = None) -> Run:
    """Build the run of an existing directory from its config.json and data.json; its data are not opened.

    A directory of an earlier version has no data.json. Its data are opened then, and a line says so.

    Args:
        directory: the run directory.
        data: another place of its data, in place of the `path` or `data_dir` of its config.

    Raises:
        ConfigError: there is no run, or its config has no meaning to this version.
    """
    directory = Path(directory)
    config = read_config(directory)
    config = config if data is None else _moved(config, data)
    try:
        facts, reason = read_facts(directory), f"{directory} has no data.json, which jdiff train writes"
    except ValueError as error:
        facts, reason = None, str(error)
    if facts is not None:
        configs.check(config)
        return _built(directory, config, facts, functools.partial(_open_again, config, facts))
    try:
        run = build(directory, config)
    except ConfigError as error:
        raise ConfigError(f"{error} (the training data are asked for because {reason})") from error
    warnings.warn(f"{reason}: the training data are read instead", DataWarning, stacklevel=2)
    return run


def _built(directory, config: Config, facts: DataFacts, open_data: Callable[[], Any]) -> Run:
    """The run of a config on data of which these facts are known."""
    model = configs.build_model(config, facts.classes)
    if facts.classes and not getattr(model, "num_classes", 0):
        raise ConfigError(f"{Path(directory) / 'data.json'} has {facts.classes} classes, and its network knows none")
    regression, loss = configs.build_regression(config), configs.build_loss(config)
    return Run(Path(directory), config, facts, model, regression, loss, open_data)


def _open_again(config: Config, facts: DataFacts) -> Any:
    """The data of a config, compared with those of the training; a line says where they differ."""
    data = configs.build_data(config)
    data = data if facts.classes else without_labels(data)
    if (tuple(data.shape), data.is_image) != (facts.shape, facts.is_image):
        raise ConfigError(f"{data.name} has samples of the shape {data.shape}, and the run makes {facts.shape}")
    if data.fingerprint() != facts.fingerprint:
        size = f"{data.size:,} samples, and there were {facts.size:,}" if data.size != facts.size else "other contents"
        classes = "" if data.class_names == facts.class_names else "; its classes are others too"
        text = f"{data.name} is not the data of the training ({size}{classes}): the numbers are about the data of now"
        warnings.warn(text, DataWarning, stacklevel=2)
    return data


def _moved(config: Config, place: str) -> Config:
    """A config whose data are elsewhere."""
    known = inspect.signature(DATASETS[config.data.name]).parameters if config.data.name in DATASETS else {}
    name = next((name for name in ("path", "data_dir") if name in known), None)
    if name is None:
        raise ConfigError(f"data set {config.data.name!r} has no place, neither path nor data_dir, that could change")
    return dataclasses.replace(config, data=dataclasses.replace(config.data, args=config.data.args | {name: place}))


def prepare_directory(run: Run) -> None:
    """Make a directory that of a run, to be trained in: all processes call this together, under the lock.

    An old directory must be of the same run. The config is written, and what a killed run has left is removed.

    Raises:
        ConfigError: the directory holds another run, or one that was trained on other data.
        OSError: it cannot be written.
    """
    path = run.directory / "config.json"
    ends = run.config.train.lr_schedule.name in ENDING
    notes = (checkpoint.read_note(run.checkpoints, step) for step in reversed(checkpoint.steps(run.checkpoints)))
    note = next(filter(None, notes), {})
    known = "fingerprint" in (note.get("samples") or {})  # data that are known may have moved
    fixed = [*(["train.steps"] if ends else []), *([] if known else [DATA_PATH])]
    free = [name for name in FREE if name not in fixed]
    if path.is_file() and (change := configs.change(configs.from_json(path), run.config, ignore=free)):
        sooner = "; to end it sooner, use --until" if change.startswith("train.steps") else ""
        raise ConfigError(f"{run.directory} holds another run: {change}; choose another --run-dir{sooner}")
    check_noted(run, ignore=free)  # the checkpoints know the config too, where config.json was lost or edited
    check_same_data(run, note)
    parallel.anywhere(False)  # all processes have read the directory before one of them writes in it
    if jax.process_index() == 0:
        lock.sweep(run.directory)
        files.write(path, lambda file: file.write(configs.to_json(run.config).encode()))
        write_facts(run.directory, run.facts)


# ---------------------------------------------------------------- what its checkpoints say


def about_data(run: Run) -> dict:
    """What a checkpoint notes of the data that it was trained on."""
    return dict(size=run.facts.size, shape=list(run.facts.shape), fingerprint=run.facts.fingerprint)


def check_same_data(run: Run, note: dict) -> None:
    """Check that a checkpoint was trained on these data, as far as its note says; else its batches were others.

    Args:
        run: the run, with the data of now.
        note: of the checkpoint; those of earlier versions say less of the data, or nothing.

    Raises:
        ConfigError: the data are others.
    """
    old, new = note.get("samples") or {}, about_data(run)
    changed = [name for name in new if name in old and old[name] != new[name]]
    if not changed:
        return
    was, now = ({name: about[name] for name in changed} for about in (old, new))
    what = "there are as many samples, of other contents"
    what = what if changed == ["fingerprint"] else f"its samples had {was}, and these have {now}"
    raise ConfigError(
        f"{run.directory} was trained on other data: {what}; bring the data back, or choose another --run-dir"
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
    """Restore the average of the parameters that is sampled; there is a `CheckpointWarning` for what was passed over.

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
    step, trees = checkpoint.restore_ema(run.checkpoints, trees, step)
    check_noted(run, step, ignore=UNSAMPLED)
    return step, trees if names is None else trees["main"]
