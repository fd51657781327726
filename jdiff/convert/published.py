"""A published network as a denoiser, by its tag: network, weights, schedule, target and conditioning."""

from pathlib import Path
from typing import Any

import jax

from jdiff.convert.table import Mismatch
from jdiff.convert.weights import load
from jdiff.core.names import choose
from jdiff.denoisers import Denoiser, conditioning, targets
from jdiff.denoisers import denoiser as make_denoiser
from jdiff.models.registry import Tag, Training, tag_of
from jdiff.process import betas
from jdiff.process.betas import discrete
from jdiff.process.schedules import EDM, VE, VP

# what the names in `Training` stand for
SCHEDULES = {
    "EDM": lambda training: EDM(),
    "VP": lambda training: VP(),
    "VE": lambda training: VE(),
    "linear": lambda training: discrete(betas.linear(training.steps)),
    "cosine": lambda training: discrete(betas.cosine(training.steps)),
}
TARGETS = {
    "Eps": lambda training: targets.Eps(),
    "Score": lambda training: targets.Score(),
    "EDM": lambda training: targets.EDM(training.sigma_data),
}
CONDITIONINGS = {
    "EDM": lambda training: conditioning.EDM(training.sigma_data),
    "Index": lambda training: conditioning.Index(training.steps),
    "Continuous": lambda training: conditioning.Continuous(),
    "Sigma": lambda training: conditioning.Sigma(),
}
FIXED = ("frequencies", "phases", "sigmas")  # parameters of ours that are constants in published code


def denoiser(path: str | Path, tag: str, cond: Any = None, **overrides) -> Denoiser:
    """The denoiser of published weights, which lie in a local file or folder.

    It is `jdiff.denoiser` of the module and variables that `load` reads, with the schedule, target, conditioning and
    learned variance that the tag says the network was trained with.

    Args:
        path: the file or folder. Nothing is downloaded; `jdiff.models.tag_of(tag).url` says where the weights are.
        tag: `model.tag`, one of `jdiff.list_models(tags=True)`.
        cond: class labels (B,) of networks that have classes.
        overrides: fields of the module, and settings that `load` takes.

    Returns:
        The denoiser, (x, t) -> E[x_0 | x_t]. Its `schedule` is that of the training.

    Raises:
        ValueError: for an unknown tag, and for one that is no network of diffusion.
        Mismatch: for a file of another network.
        OSError: for a file that is not there.
        ImportError: for a library that is missing.
    """
    known = tag_of(tag)
    if known.training is None:
        raise ValueError(f"the weights {tag!r} are no denoiser; read them by jdiff.convert.load")
    module, variables = load(path, known.architecture, **overrides)
    _check_size(path, known, variables)
    schedule, target, label = parts(known.training)
    return make_denoiser(
        module.apply, variables, schedule, target, cond, conditioning=label,
        learned_variance=known.training.learned_variance,
    )  # fmt: skip


def parts(training: Training):
    """(schedule, target, conditioning) of a training."""
    return (
        choose("schedule", training.schedule, SCHEDULES)(training),
        choose("target", training.target, TARGETS)(training),
        choose("conditioning", training.conditioning, CONDITIONINGS)(training),
    )


def _check_size(path: str | Path, tag: Tag, variables: dict) -> None:
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    count = sum(leaf.size for names, leaf in leaves if names[-1].key not in FIXED)
    if tag.parameters not in (None, count):
        raise Mismatch(f"{path} holds a network of {count:,} parameters; {tag.name} has {tag.parameters:,}")
