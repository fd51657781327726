"""A run directory, and what its config makes of it: data, network, denoiser, samples.

`DIR/{config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/}`.
"""

import dataclasses
import functools
import json
import math
import os
import warnings
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff import guidance
from jdiff.config.schema import Config, ConfigError, Sample, first_line
from jdiff.data import Dataset, without_labels
from jdiff.denoisers import denoiser
from jdiff.losses.levels import LossAware
from jdiff.models.summary import summary
from jdiff.process.forward import prior
from jdiff.process.schedules import log_snr
from jdiff.sampling import sample
from jdiff.solvers import Remember
from jdiff.train import checkpoint
from jdiff.train.step import TrainState, init_state

UNFIT = (ValueError, TypeError, ArithmeticError, LookupError, AttributeError, MemoryError)  # what wrong sizes raise
# the settings that samples of a trained average do not depend on, or only as asked for when they are drawn
UNSAMPLED = (
    "name", "seed", "levels", "weight", "coupling", "loss.args", "train", "sample",
    "data.args.data_dir", "data.args.cache", "data.args.threads",
)  # fmt: skip
EXPLODED = 1e6  # of a sample in the model's numbers, which are about 1
SNR_LIMIT = 1e-3  # alpha^2 / sigma^2 above which N(0, sigma^2) is visibly not where the process ends


@dataclasses.dataclass(frozen=True)
class Run:
    """Everything a config names, built."""

    directory: Path
    config: Config
    dataset: Dataset
    model: Any
    objective: dict  # the keywords of the loss
    loss: Any

    @property
    def schedule(self):
        """The noise schedule."""
        return self.objective["schedule"]

    @property
    def checkpoints(self) -> Path:
        """Where the checkpoints are."""
        return self.directory / "checkpoints"

    @property
    def input_shape(self) -> tuple[int, ...]:
        """Of one sample as the network sees it: with an earlier estimate beside it where it is self-conditioned."""
        *space, channels = self.dataset.shape
        return (*space, channels if self.config.self_conditioning is None else 2 * channels)

    def init_params(self) -> Any:
        """Fresh parameters, a function of the seed."""
        x = jnp.zeros((1, *self.input_shape))
        cond = jnp.zeros(1, jnp.int32) if self.dataset.classes else None
        return jax.jit(self.model.init)(jax.random.key(self.config.seed), x, jnp.zeros(1), cond)


def build(directory, config: Config) -> Run:
    """Build a run from its config. Raises ConfigError for whatever in it has no meaning."""
    configs.check(config)
    dataset = configs.build_data(config)
    if config.train.batch > dataset.size:
        raise ConfigError(f"train.batch is {config.train.batch}, but {dataset.name} has {dataset.size:,} samples")
    if (config.train.flip or config.train.augment) and not dataset.is_image:
        raise ConfigError(f"train.flip and train.augment are for images, and {dataset.name} holds points")
    model = configs.build_model(config, dataset.classes)
    if dataset.classes and not getattr(model, "num_classes", 0):
        dataset = without_labels(dataset)
    return Run(Path(directory), config, dataset, model, configs.build_objective(config), configs.build_loss(config))


def open_run(directory) -> Run:
    """The run of an existing directory. Raises ConfigError if there is none."""
    path = Path(directory) / "config.json"
    if not path.is_file():
        raise ConfigError(f"{directory} is no run directory: it has no config.json; make one with scripts/train.py")
    return build(directory, configs.from_json(path))


def like(run: Run) -> Any:
    """Zeros in the structure of the run's parameters, for restoring into."""
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), param_shapes(run))


def param_shapes(run: Run) -> Any:
    """The shapes of the run's parameters. Raises ConfigError if the network cannot be made or held in memory."""
    try:
        shapes = jax.eval_shape(run.init_params)
    except UNFIT as error:
        raise ConfigError(f"the parts of this config do not fit: {first_line(error)}") from error
    _check_memory(run, shapes, "its parameters")
    return shapes


def _check_memory(run: Run, shapes, what: str) -> None:
    """Raise ConfigError if arrays of these shapes are larger than the memory of the machines."""
    size = sum(math.prod(s.shape) * s.dtype.itemsize for s in jax.tree.leaves(shapes))
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") * jax.process_count()
    if size > memory:
        raise ConfigError(
            f"model {run.config.model.name!r} is too large: {what} would take {size / 2**30:,.0f} GiB, and there are "
            f"{memory / 2**30:,.0f} GiB of memory"
        )


def restore_ema(run: Run, step: int | None = None) -> tuple[int, Any]:
    """(step, averaged parameters) of the newest checkpoint, or of `step`; what was passed over is told on stderr.

    Raises CheckpointError as `checkpoint.restore_ema` does, and ConfigError if it was trained with another config.
    """
    names = averages(run.config)
    trees = like(run) if names is None else {name: like(run) for name in names}
    with checkpoint.told():
        step, trees = checkpoint.restore_ema(run.checkpoints, trees, step)
        check_noted(run, step, ignore=UNSAMPLED)
    return step, trees if names is None else trees["main"]


def check_noted(run: Run, step: int | None = None, ignore=()) -> None:
    """Raise ConfigError where checkpoint `step`, or the newest with a note, was trained with another config.

    A note that this version cannot read is not compared: a `CheckpointWarning` says so.

    Args:
        run: the run, with the config that is asked for now.
        step: the checkpoint's step; None for the newest that notes a config.
        ignore: dotted names of settings that may differ, with all below them.
    """
    steps = checkpoint.steps(run.checkpoints) if step is None else [step]
    noted = [(s, checkpoint.read_note(run.checkpoints, s).get("config")) for s in reversed(steps)]
    step, noted = next(((s, config) for s, config in noted if config), (None, None))
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


def averages(config: Config) -> list[str] | None:
    """The names of the averages that training keeps; None if it is one."""
    _, decay = configs.build_optimizer(config)
    return list(decay) if isinstance(decay, dict) else None


def step_flops(run: Run) -> int:
    """FLOPs of one training step: three times those of the network's call, for the two products of each gradient."""
    batch = run.config.train.batch
    cond = jax.ShapeDtypeStruct((batch,), jnp.int32) if run.dataset.classes else None
    return 3 * summary(run.model, (batch, *run.input_shape), cond=cond).flops


def terminal_snr(run: Run) -> float:
    """alpha^2 / sigma^2 where sampling starts."""
    t = run.schedule.t_max
    return float(jnp.exp(log_snr(run.schedule, t)))


def make_denoiser(run: Run, params, labels, how: Sample):
    """The run's denoiser for labels (B,) or None, with the guidance and the clipping of `how`."""
    o = run.objective

    def given(cond):
        return denoiser(
            run.model.apply, params, o["schedule"], o["target"], cond, conditioning=o["conditioning"],
            learned_variance=run.config.loss.name == "hybrid", self_conditioning=o["self_conditioning"] is not None,
        )  # fmt: skip

    denoise = given(labels)
    if labels is not None and how.guidance != 1:
        null = jnp.full_like(labels, run.dataset.classes)
        denoise = guidance.cfg(denoise, given(null), how.guidance)
    return denoise if how.clip is None else guidance.threshold(denoise, run.schedule, how.clip)


def draw(run: Run, params, key, num: int, how: Sample, labels=None, *, batch: int = 500, path: bool = False):
    """num samples in the model's numbers, (num, ...), and their labels (num,) or None; labels cycle.

    Sample i depends on (key, i) and its label alone. With `path`, also the states at times[1:], (N - 1, num, ...).
    Raises ConfigError if a sample is not finite, or beyond 1e6.
    """
    classes = run.dataset.classes
    if labels is not None:
        _check_labels(labels, classes)
    cycle = np.resize(np.arange(classes) if labels is None else np.asarray(labels), num) if classes else None
    size = min(batch, num)
    one_batch = jax.jit(_sampler(run, how, size), static_argnames="path")
    samples, paths = [], []
    for first in range(0, num, size):
        rows = np.minimum(np.arange(first, first + size), num - 1)  # the last batch is filled up, then cut
        out = one_batch(params, key, rows, None if cycle is None else jnp.asarray(cycle[rows], jnp.int32), path)
        x, states = out if path else (out, None)
        kept = min(size, num - first)
        samples.append(np.asarray(x)[:kept])
        if path:
            paths.append(np.asarray(states)[:, :kept])
    samples = np.concatenate(samples)
    _check_finite(samples, params)
    return (samples, cycle, np.concatenate(paths, axis=1)) if path else (samples, cycle)


def _check_finite(samples: np.ndarray, params) -> None:
    """Raise ConfigError if a sample is not finite, or so large that the sampling has exploded all the same."""
    rows = samples.reshape(len(samples), -1)
    finite, small = np.isfinite(rows).all(1), (np.abs(rows) <= EXPLODED).all(1)
    if small.all():
        return
    bad, what = (~small, f"beyond {EXPLODED:g}") if finite.all() else (~finite, "not finite")
    largest = np.max([np.abs(np.asarray(leaf, np.float32)).max(initial=0) for leaf in jax.tree.leaves(params)])
    if largest < 1e4:  # those of a trained network reach some tens
        advice = "try guidance nearer to 1, a smaller eta or churn, more steps, or another solver"
    else:
        advice = f"the parameters reach {largest:.3g}; use an earlier checkpoint, or train with a lower train.lr"
    raise ConfigError(f"{bad.sum():,} of {len(samples):,} samples are {what}: {advice}")


def _sampler(run: Run, how: Sample, size: int):
    """(params, key, rows (size,), labels, path) -> samples of these rows of the endless stream of `key`."""
    if how.guidance != 1 and not run.dataset.classes:
        raise ConfigError(f"guidance {how.guidance} needs classes, and {run.dataset.name} has none; use guidance 1")
    solver, times = configs.build_sampler(how, run.schedule)
    if run.config.self_conditioning is not None:
        solver = Remember(solver)
    mean, std = run.dataset.moments() if how.match_prior else (0.0, 0.0)

    def one_batch(params, key, rows, cond, path):
        k_prior, k_steps = jax.random.split(key)
        keys = [jax.vmap(lambda i, k=k: jax.random.fold_in(k, i))(rows) for k in (k_prior, k_steps)]
        x = prior(run.schedule, keys[0], (size, *run.dataset.shape), times[0], mean=mean, std=std)
        denoise = make_denoiser(run, params, cond, how)
        return sample(solver, denoise, run.schedule, x, times, keys[1], path=path)

    return one_batch


def new_state(run: Run) -> TrainState:
    """The run's training state at step 0."""
    return _state_of(run, run.init_params())


def _state_of(run: Run, params) -> TrainState:
    tx, _ = configs.build_optimizer(run.config)
    law = run.objective["levels"]
    extra = {"levels": law.init()} if isinstance(law, LossAware) else None
    return init_state(params, tx, extra, averages=averages(run.config))


def rehearse(run: Run, loss) -> None:
    """Trace a step of `loss(params, key, x0, labels)` and the sampling, so that what does not fit shows at once.

    Raises ConfigError with what the network or the solver said.
    """
    key, labels = jax.random.key(0), jnp.zeros(2, jnp.int32) if run.dataset.classes else None
    x = jax.ShapeDtypeStruct((2, *run.dataset.shape), jnp.float32)
    try:
        params = param_shapes(run)
        _check_memory(run, jax.eval_shape(functools.partial(_state_of, run), params), "its training state")
        jax.eval_shape(loss, params, key, x, labels)
        how = dataclasses.replace(run.config.sample, match_prior=False)  # its moments would read the data
        jax.eval_shape(functools.partial(_sampler(run, how, 2), path=False), params, key, np.arange(2), labels)
    except ConfigError:
        raise
    except UNFIT as error:
        raise ConfigError(f"the parts of this config do not fit: {first_line(error)}") from error


def _check_labels(labels, classes: int) -> None:
    if not classes:
        raise ConfigError("labels were given, but this run has no classes")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise ConfigError(f"label {wrong[0]} is none of the classes 0 to {classes - 1}")
