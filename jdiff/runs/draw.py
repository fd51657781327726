"""Samples of a run: its denoiser, and the endless stream of samples of a key."""

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff import guidance
from jdiff.config import ConfigError, Sample
from jdiff.denoisers import denoiser
from jdiff.process.forward import prior
from jdiff.runs.run import Run
from jdiff.sampling import sample
from jdiff.solvers import Remember

EXPLODED = 1e6  # of a sample in the model's numbers, which are about 1


def make_denoiser(run: Run, params: Any, labels, sampling: Sample):
    """The denoiser of a run, with the guidance and the limits that a sampling asks for.

    Args:
        run: the run.
        params: the parameters of its network.
        labels: the classes of the samples (B,), or None where the run has no classes.
        sampling: the weight of the guidance, and the limit of the estimates of x_0.

    Returns:
        A `Denoise`.
    """
    trained = run.regression

    def given(cond):
        return denoiser(
            run.model.apply, params, trained.schedule, trained.target, cond, conditioning=trained.conditioning,
            learned_variance=run.config.loss.name == "hybrid", self_conditioning=trained.self_conditioning is not None,
        )  # fmt: skip

    denoise = given(labels)
    if labels is not None and sampling.guidance != 1:
        no_class = jnp.full_like(labels, run.facts.classes)
        denoise = guidance.cfg(denoise, given(no_class), sampling.guidance)
    return denoise if sampling.clip is None else guidance.threshold(denoise, run.schedule, sampling.clip)


def draw(
    run: Run,
    params: Any,
    key,
    num: int,
    sampling: Sample,
    labels: Sequence[int] | np.ndarray | None = None,
    *,
    batch: int = 500,
    path: bool = False,
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
    one_batch = jax.jit(make_sampler(run, sampling, size), static_argnames="path")
    drawn: list[np.ndarray] = []
    paths: list[np.ndarray] = []
    for first in range(0, num, size):
        rows = np.minimum(np.arange(first, first + size), num - 1)  # the last batch is filled up, then cut
        cond = None if cycle is None else jnp.asarray(cycle[rows], jnp.int32)
        x, states = one_batch(params, key, rows, cond, path)
        kept = min(size, num - first)
        drawn.append(np.asarray(x)[:kept])
        if path:
            paths.append(np.asarray(states)[:, :kept])
    samples = np.concatenate(drawn)
    check_samples(samples, params)
    return (samples, cycle, np.concatenate(paths, axis=1)) if path else (samples, cycle)


def make_sampler(run: Run, sampling: Sample, size: int) -> Callable:
    """What draws one batch of a run, to be jitted.

    Args:
        run: the run.
        sampling: solver, times, guidance and limits.
        size: samples in a batch, B.

    Returns:
        `(params, key, rows (B,), labels (B,) or None, path) -> (samples, states at the times, or None)`. The rows are
        the positions of the samples in the stream of `key`; `path` is static, and asks for the states.

    Raises:
        ConfigError: guidance is asked for without classes, or the solver or the times have no meaning.
    """
    if sampling.guidance != 1 and not run.facts.classes:
        weight = sampling.guidance
        raise ConfigError(f"guidance {weight} needs classes, and {run.facts.name} has none; use guidance 1")
    solver, times = configs.build_sampler(sampling, run.schedule)
    if run.config.self_conditioning is not None:
        solver = Remember(solver)
    mean, std = run.moments() if sampling.match_prior else (0.0, 0.0)

    def one_batch(params, key, rows, labels, path):
        prior_key, solver_key = jax.random.split(key)
        prior_keys, solver_keys = (
            jax.vmap(lambda i, k=k: jax.random.fold_in(k, i))(rows) for k in (prior_key, solver_key)
        )
        start = prior(run.schedule, prior_keys, (size, *run.facts.shape), times[0], mean=mean, std=std)
        denoise = make_denoiser(run, params, labels, sampling)
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
