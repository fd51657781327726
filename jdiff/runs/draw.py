"""Samples of a run: its denoiser, and the endless stream of samples of a key."""

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff.config import ConfigError, Sample
from jdiff.process.forward import prior
from jdiff.runs.progress import SILENT, Progress
from jdiff.runs.run import Run, open_run, restore_ema
from jdiff.sampling import sample
from jdiff.solvers import Remember

BATCH = 500  # samples that are drawn at once, where nothing else is asked for
EXPLODED = 1e6  # of a sample in the model's numbers, which are about 1


@dataclasses.dataclass(frozen=True)
class Worse:
    """A worse model of the same data, which autoguidance leads away from."""

    run: Run
    """Its run."""
    params: Any
    """The parameters of its network."""


def worse_model(run: Run, sampling: Sample) -> Worse | None:
    """The model of the run directory that a sampling by autoguidance names; None for other methods.

    Raises:
        ConfigError: there is no such run, or its samples are not those of `run`.
    """
    if sampling.guide.name != "autoguidance":
        return None
    configs.check_guide(sampling)
    other = open_run(sampling.guide.args["run"])
    ours, theirs = ((r.facts.shape, r.facts.classes, r.schedule) for r in (run, other))
    if ours != theirs:
        raise ConfigError(
            f"autoguidance: {other.directory} has another shape, classes or schedule than {run.directory}"
        )
    return Worse(other, restore_ema(other, sampling.guide.args.get("step"))[1])


def make_denoiser(run: Run, params: Any, labels, sampling: Sample, worse: Worse | None = None):
    """The denoiser of a run, with the guidance and the limits that a sampling asks for.

    Args:
        run: the run.
        params: the parameters of its network.
        labels: the classes of the samples (B,), or None where the run has no classes.
        sampling: the guidance, and the limit of the estimates of x_0.
        worse: of `worse_model`.

    Returns:
        A `Denoise`.

    Raises:
        ConfigError: the guidance needs classes, or parts of the network that it has not.
    """
    conditional = _model(run, params, labels)
    if not is_guided(sampling):
        return configs.build_guidance(sampling, conditional, None)
    if worse is not None:
        other = _model(worse.run, worse.params, labels)
    elif sampling.guide.name in WORSE:
        other = conditional.replace(apply=_changed(run, sampling).apply)
    else:
        other = _model(run, params, jnp.full_like(labels, run.facts.classes))
    return configs.build_guidance(sampling, conditional, other)


def is_guided(sampling: Sample) -> bool:
    """Whether a sampling has any guidance: with w = 1 these methods are the conditional model itself."""
    return sampling.guidance != 1 or sampling.guide.name not in ("cfg", "apg", "tcfg", *WORSE)


WORSE = ("autoguidance", "perturbed", "skipped")  # the methods that need no classes


def _model(run: Run, params: Any, cond):
    """The denoiser of a run's network."""
    learned_variance = run.config.loss.name == "hybrid"
    return run.regression.denoiser(run.model.apply, params, cond, learned_variance=learned_variance)


def _changed(run: Run, sampling: Sample) -> Any:
    """The network of a run with parts of it perturbed or skipped."""
    name, at = sampling.guide.name, sampling.guide.args["at"]
    if name not in {field.name for field in dataclasses.fields(run.model)}:
        raise ConfigError(f"guide {name!r} is for UNets and DiTs; model {run.config.model.name!r} has no such parts")
    return run.model.clone(**{name: at if isinstance(at, tuple) else (at,)})


def draw(
    run: Run,
    params: Any,
    key,
    num: int,
    sampling: Sample,
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    batch: int = BATCH,
    path: bool = False,
    progress: Progress = SILENT,
    program: "Program | None" = None,
):
    """Draw samples of a run. Sample i depends on (key, i) and its label alone.

    Args:
        run: the run.
        params: the parameters of its network.
        key: a typed key; it names an endless stream of samples.
        num: how many of them to draw.
        sampling: solver, times, guidance and limits.
        labels: classes to cycle through; None for all classes.
        batch: the most samples to draw at once.
        path: whether to return the states on the way too.
        progress: tells what is done; nothing is told by default.
        program: what draws a batch of this run, sampling and size, to use one that was compiled before.

    Returns:
        (samples (num, ...) in the model's numbers, labels (num,) or None where the run has no classes); with `path`
        also the states at the times of the grid, (N, num, ...), of which the first is where the samples began.

    Raises:
        ConfigError: a label is no class, guidance is asked for without classes, or a sample is not finite or explodes.
    """
    classes = run.facts.classes
    if labels is not None:
        _check_labels(labels, classes)
    cycle = np.resize(np.arange(classes) if labels is None else np.asarray(labels), num) if classes else None
    size = min(batch, num)
    program = program or Program(run, sampling, size)
    drawn: list[np.ndarray] = []
    paths: list[np.ndarray] = []

    def arguments(first):
        rows = np.minimum(np.arange(first, first + size), num - 1)  # the last batch is filled up, then cut
        return params, key, rows, None if cycle is None else jnp.asarray(cycle[rows], jnp.int32), path

    program.compile(*arguments(0), progress=progress)
    with progress.count(f"drawing {num:,} samples, {sampling.steps:,} steps each", num, "sample") as advance:
        for first in range(0, num, size):
            x, states = program(*arguments(first))
            kept = min(size, num - first)
            drawn.append(np.asarray(x)[:kept])
            if path:
                paths.append(np.asarray(states)[:, :kept])
            advance(kept)
    samples = np.concatenate(drawn)
    check_samples(samples, params)
    return (samples, cycle, np.concatenate(paths, axis=1)) if path else (samples, cycle)


class Program:
    """What draws one batch of a run, compiled once: it is called as what `make_sampler` returns.

    Args:
        run: the run.
        sampling: solver, times, guidance and limits.
        size: samples in a batch.
        compiling: what is told while it is compiled.
    """

    def __init__(self, run: Run, sampling: Sample, size: int, compiling: str = "compiling the sampler"):
        worse = worse_model(run, sampling)
        one_batch = make_sampler(run, sampling, size, None if worse is None else worse.run)
        self._worse = None if worse is None else worse.params
        self._program = jax.jit(one_batch, static_argnames="path")
        self._compiling, self._compiled = compiling, False

    def compile(self, *arguments, progress: Progress = SILENT) -> None:
        """Compile it for such arguments, unless it was before.

        Raises:
            ConfigError: solver, guidance and network do not fit.
        """
        if self._compiled:
            return
        try:
            with progress.stage(self._compiling):
                self._program.lower(*arguments, self._worse).compile()
        except ValueError as error:  # what solver, guidance and network say of each other
            raise ConfigError(configs.first_line(error)) from error
        self._compiled = True

    def __call__(self, *arguments):
        return self._program(*arguments, self._worse)


def make_sampler(run: Run, sampling: Sample, size: int, worse: Run | None = None) -> Callable:
    """What draws one batch of a run, to be jitted.

    Args:
        run: the run.
        sampling: solver, times, guidance and limits.
        size: samples in a batch, B.
        worse: the run of `worse_model`, or None.

    Returns:
        `(params, key, rows (B,), labels (B,) or None, path, worse_params=None) -> (samples, states at the times, or
        None)`. The rows are the positions of the samples in the stream of `key`; `path` is static, and asks for the
        states.

    Raises:
        ConfigError: guidance is asked for without classes, or the solver or the times have no meaning.
    """
    configs.check_guide(sampling)
    if is_guided(sampling) and sampling.guide.name not in WORSE and not run.facts.classes:
        weight, others = sampling.guidance, ", ".join(WORSE)
        raise ConfigError(
            f"guidance {weight:g} needs classes, and {run.facts.name} has none; use guidance 1, or a guide of {others}"
        )
    solver, times = configs.build_sampler(sampling, run.schedule)
    if run.config.self_conditioning is not None:
        solver = Remember(solver)
    mean, std = run.moments() if sampling.match_prior else (0.0, 0.0)

    def one_batch(params, key, rows, labels, path, worse_params=None):
        prior_key, solver_key = jax.random.split(key)
        prior_keys, solver_keys = (
            jax.vmap(lambda i, k=k: jax.random.fold_in(k, i))(rows) for k in (prior_key, solver_key)
        )
        start = prior(run.schedule, prior_keys, (size, *run.facts.shape), times[0], mean=mean, std=std)
        other = None if worse is None else Worse(worse, worse_params)
        denoise = make_denoiser(run, params, labels, sampling, other)
        if not path:
            return sample(solver, denoise, run.schedule, start, times, solver_keys), None
        x, states = sample(solver, denoise, run.schedule, start, times, solver_keys, path=True)
        return x, jnp.concatenate([start[None], states])

    return one_batch


def check_samples(samples: np.ndarray, params: Any) -> None:
    """Check that samples are finite, and not so large that the sampling has exploded all the same.

    Args:
        samples: (num, ...), in the model's numbers.
        params: the parameters they were drawn with: their size decides what the message advises.

    Raises:
        ConfigError: some are not.
    """
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


def _check_labels(labels: Sequence[int] | np.ndarray, classes: int) -> None:
    if not classes:
        raise ConfigError("labels were given, but this run has no classes")
    wrong = [label for label in labels if not 0 <= label < classes]
    if wrong:
        raise ConfigError(f"label {wrong[0]} is none of the classes 0 to {classes - 1}")
