"""A run directory, and what its config makes of it: data, network, denoiser, samples.

`DIR/{config.json, checkpoints/, metrics.jsonl, tensorboard/, samples/}`.
"""

import dataclasses
import functools
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import checkpoint
from jdiff import config as configs
from jdiff.config import Config, ConfigError, Sample
from jdiff.data import Dataset, without_labels
from jdiff.levels import LossAware
from jdiff.models.summary import summary
from jdiff.train import TrainState, init_state

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
    return build(directory, configs.from_json(path.read_text()))


def like(run: Run) -> Any:
    """Zeros in the structure of the run's parameters, for restoring into."""
    return jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), jax.eval_shape(run.init_params))


def restore_ema(run: Run, step: int | None = None) -> tuple[int, Any]:
    """(step, averaged parameters) of the newest checkpoint, or of `step`.

    Raises CheckpointError as `checkpoint.restore_ema` does.
    """
    names = averages(run.config)
    if names is None:
        return checkpoint.restore_ema(run.checkpoints, like(run), step)
    step, trees = checkpoint.restore_ema(run.checkpoints, {name: like(run) for name in names}, step)
    return step, trees["main"]


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
    return float(jnp.exp(jdiff.log_snr(run.schedule, t)))


def make_denoiser(run: Run, params, labels, how: Sample):
    """The run's denoiser for labels (B,) or None, with the guidance and the clipping of `how`."""
    o = run.objective

    def given(cond):
        return jdiff.denoiser(
            run.model.apply, params, o["schedule"], o["target"], cond, conditioning=o["conditioning"],
            learned_variance=run.config.loss.name == "hybrid", self_conditioning=o["self_conditioning"] is not None,
        )  # fmt: skip

    denoise = given(labels)
    if labels is not None and how.guidance != 1:
        null = jnp.full_like(labels, run.dataset.classes)
        denoise = jdiff.guidance.cfg(denoise, given(null), how.guidance)
    return denoise if how.clip is None else jdiff.guidance.threshold(denoise, run.schedule, how.clip)


def draw(run: Run, params, key, num: int, how: Sample, labels=None, *, batch: int = 500, path: bool = False):
    """num samples in the model's numbers, (num, ...), and their labels (num,) or None; labels cycle.

    Sample i depends on (key, i) and its label alone. With `path`, also the states at times[1:], (N - 1, num, ...).
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
    return (samples, cycle, np.concatenate(paths, axis=1)) if path else (samples, cycle)


def _sampler(run: Run, how: Sample, size: int):
    """(params, key, rows (size,), labels, path) -> samples of these rows of the endless stream of `key`."""
    if how.guidance != 1 and not run.dataset.classes:
        raise ConfigError(f"guidance {how.guidance} needs classes, and {run.dataset.name} has none; use guidance 1")
    solver, times = configs.build_sampler(how, run.schedule)
    if run.config.self_conditioning is not None:
        solver = jdiff.solvers.Remember(solver)
    mean, std = run.dataset.moments() if how.match_prior else (0.0, 0.0)

    def one_batch(params, key, rows, cond, path):
        k_prior, k_steps = jax.random.split(key)
        keys = [jax.vmap(lambda i, k=k: jax.random.fold_in(k, i))(rows) for k in (k_prior, k_steps)]
        x = jdiff.prior(run.schedule, keys[0], (size, *run.dataset.shape), times[0], mean=mean, std=std)
        denoise = make_denoiser(run, params, cond, how)
        return jdiff.sample(solver, denoise, run.schedule, x, times, keys[1], path=path)

    return one_batch


def new_state(run: Run) -> TrainState:
    """The run's training state at step 0."""
    tx, _ = configs.build_optimizer(run.config)
    law = run.objective["levels"]
    extra = {"levels": law.init()} if isinstance(law, LossAware) else None
    return init_state(run.init_params(), tx, extra, averages=averages(run.config))


def rehearse(run: Run, loss) -> None:
    """Trace a step of `loss(params, key, x0, labels)` and the sampling, so that what does not fit shows at once.

    Raises ConfigError with what the network or the solver said.
    """
    key, labels = jax.random.key(0), jnp.zeros(2, jnp.int32) if run.dataset.classes else None
    x = jax.ShapeDtypeStruct((2, *run.dataset.shape), jnp.float32)
    try:
        params = jax.eval_shape(run.init_params)
        jax.eval_shape(loss, params, key, x, labels)
        how = dataclasses.replace(run.config.sample, match_prior=False)  # its moments would read the data
        jax.eval_shape(functools.partial(_sampler(run, how, 2), path=False), params, key, np.arange(2), labels)
    except ConfigError:
        raise
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the parts of this config do not fit: {str(error).splitlines()[0]}") from error


def _check_labels(labels, classes: int) -> None:
    if not classes:
        raise ConfigError("labels were given, but this run has no classes")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise ConfigError(f"label {wrong[0]} is none of the classes 0 to {classes - 1}")
