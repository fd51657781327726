"""What a config says: nested frozen dataclasses, and the checks of the kinds of their values.

A file `configs/NAME.py` exports `config = Config(...)`. No floor below `config/` sees a config.
"""

import dataclasses
import inspect
import math
import re
import types
import typing
from typing import Any

import numpy as np


class ConfigError(ValueError):
    """A setting is wrong; the message is one line: what was wrong, what was expected."""


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or the name of its class where it has no text."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def as_tuples(value):
    """A value with every list in it, which JSON knows in place of tuples, turned into a tuple."""
    if isinstance(value, dict):
        return {k: as_tuples(v) for k, v in value.items()}
    return tuple(map(as_tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Named:
    """Something chosen by name, with its arguments."""

    name: str
    """Its name."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its arguments. Another name drops those of the old name."""

    def __post_init__(self):
        words = isinstance(self.args, dict) and all(isinstance(word, str) for word in self.args)
        if not isinstance(self.name, str) or not words:
            raise ConfigError(f"Named takes a name and a dict of arguments, got {self.name!r} and {self.args!r}")
        object.__setattr__(self, "args", as_tuples(self.args))  # so that an equal config comes back from JSON


@dataclasses.dataclass(frozen=True)
class Train:
    """How to train."""

    steps: int = 10_000
    """Optimiser steps of the whole run."""
    batch: int = 128
    """Samples in a step."""
    accumulate: int = 1
    """Slices into which a batch is cut, to be computed one after the other: the same step with less memory."""
    devices: int | None = None
    """How many devices to use; None for all. JAX_NUM_CPU_DEVICES=N in the environment makes N devices of a CPU."""
    fsdp: int = 1
    """Devices over which one copy of the state is divided. Batches are always divided over all devices."""
    optimizer: Named = Named("adam")
    """The optimiser: see jdiff info optimizers."""
    lr: float = 1e-3
    """Learning rate, after warm-up."""
    lr_schedule: Named = Named("constant")
    """What the learning rate does after the warm-up: see jdiff info lr_schedules."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None for no clipping."""
    skip_nonfinite: int = 0
    """How many steps in a row may be left out where loss or gradient is not finite; 0 stops at the first one."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    augment: float = 0.0
    """Probability of each of EDM's augmentations, of which the network is told (augment_dim 9); EDM's own is 0.12."""
    ema: Named = Named("half_life", {"images": 50_000.0})
    """The average of the parameters that is sampled: see jdiff info averages."""
    posthoc: tuple[float, ...] = ()
    """Relative widths of further averages; jdiff average makes any other of them. EDM2 has 0.05 and 0.1."""
    snapshot_every: int = 5_000
    """Steps between snapshots of those averages, kept in snapshots/."""
    label_dropout: float = 0.1
    """Share of the labels that training hides, for classifier-free guidance. It has no effect without classes."""
    visit: int = 100
    """Steps that run in one program between two looks of the host, which logs, saves and listens to Ctrl-C."""
    save_every: int = 5_000
    """Steps between checkpoints."""
    keep: int = 3
    """How many of the newest checkpoints are kept."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are kept too; None for none."""
    sample_every: int = 0
    """Steps between pictures of samples in samples/; 0 for the last picture alone."""
    peer_timeout: float = 60.0
    """Seconds, at least 5, after which a silent process counts as lost, and the other processes of the run end."""
    threads: int | None = None
    """Threads of XLA on a CPU; None for one for each core. Networks of some microseconds a layer are faster with 1."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """How to sample, at the end of training and by default in jdiff sample."""

    solver: Named = Named("heun")
    """The update rule: see jdiff info solvers."""
    grid: Named = Named("log_snr")
    """Where the times lie: see jdiff info grids."""
    steps: int = 20
    """Times of the grid: network calls of a one-evaluation solver; heun makes 2 steps - 1."""
    guidance: float = 1.0
    """Weight of the guidance, within plus and minus 10,000; 1 is none."""
    guide: Named = Named("cfg")
    """The method of guidance: see jdiff info guides."""
    rescale: float = 0.0
    """Share, in [0, 1], by which guided estimates are brought back to the spread of the conditional ones."""
    interval: tuple[float, ...] = ()
    """Two noise levels sigma/alpha, low and high, between which guidance acts; at all levels when left out."""
    cache: int = 1
    """Steps for which the estimate that guidance leads away from is kept: 2 saves a quarter of the evaluations."""
    clip: float | None = None
    """Keep estimates of x_0 within plus and minus this, as DDPM and ADM do with 1; None for no limit."""
    num: int = 100
    """Samples drawn at the end of training."""
    match_prior: bool = False
    """Start from the data's own moments instead of N(0, sigma^2): needed where the terminal SNR is not small."""


@dataclasses.dataclass(frozen=True)
class Config:
    """A run."""

    name: str
    """Names the run directory, runs/NAME, unless --run-dir is given."""
    data: Named
    """The data set: see jdiff info datasets."""
    model: Named
    """The network and its fields: see jdiff info models."""
    schedule: Named
    """The noise schedule: see jdiff info schedules."""
    target: Named = Named("eps")
    """What the network regresses: see jdiff info targets."""
    conditioning: Named = Named("log_snr")
    """What the network is shown of the noise level: see jdiff info conditionings."""
    levels: Named = Named("uniform")
    """How training draws t: see jdiff info levels."""
    weight: Named = Named("flat")
    """How much each noise level counts: see jdiff info weights."""
    loss: Named = Named("denoising")
    """What is minimised: see jdiff info losses."""
    coupling: Named = Named("independent")
    """Which noise meets which data: see jdiff info couplings."""
    self_conditioning: float | None = None
    """Share of samples that are shown the network's own estimate of x_0, 0.5 in its paper; None for no such input."""
    train: Train = Train()
    """How to train."""
    sample: Sample = Sample()
    """How to sample."""
    seed: int = 0
    """Seed of parameters, noise, data order and samples."""

    def __post_init__(self):
        _check_fields(self)
        t, s = self.train, self.sample
        positive = {
            "train.steps": t.steps, "train.batch": t.batch, "train.lr": t.lr, "train.visit": t.visit,
            "train.save_every": t.save_every, "train.keep": t.keep, "sample.steps": s.steps, "sample.num": s.num,
            "train.threads": 1 if t.threads is None else t.threads, "train.accumulate": t.accumulate,
            "train.fsdp": t.fsdp, "train.snapshot_every": t.snapshot_every,
            "train.devices": 1 if t.devices is None else t.devices,
            "train.keep_every": 1 if t.keep_every is None else t.keep_every,
        }  # fmt: skip
        for name, value in positive.items():
            if not value > 0:
                raise ConfigError(f"{name} must be positive, got {value}")
        if abs(s.guidance) > LARGEST_GUIDANCE:
            raise ConfigError(f"sample.guidance must be within +-{LARGEST_GUIDANCE:,}, got {s.guidance:g}; 1 is none")
        if not 0 <= s.rescale <= 1:
            raise ConfigError(f"sample.rescale is a share, in [0, 1]; got {s.rescale:g}")
        if s.interval and not (len(s.interval) == 2 and 0 <= s.interval[0] < s.interval[1]):
            raise ConfigError(
                f"sample.interval is two noise levels, 0 <= low < high; got {' '.join(map(str, s.interval))}"
            )
        if not 1 <= s.cache <= MOST_TIMES:
            raise ConfigError(f"sample.cache is a number of steps, 1 or more; got {s.cache}")
        if s.steps > MOST_TIMES:
            raise ConfigError(f"sample.steps must be at most {MOST_TIMES:,}, got {s.steps:,}")
        if not -(2**63) <= self.seed < 2**63 - 2:  # jdiff.commands.train also uses seed + 1 and seed + 2
            raise ConfigError(f"seed must be a whole number of 64 bits, got {self.seed}")
        if s.clip is not None and not s.clip > 0:
            raise ConfigError(f"sample.clip is the largest value of the data, positive, or None; got {s.clip}")
        if not 5 <= t.peer_timeout < math.inf:
            raise ConfigError(f"train.peer_timeout is a number of seconds, at least 5; got {t.peer_timeout}")
        if not 0 <= t.label_dropout < 1:
            raise ConfigError(f"train.label_dropout is a share, in [0, 1); got {t.label_dropout}")
        if t.sample_every < 0 or t.warmup_steps < 0 or t.skip_nonfinite < 0:
            raise ConfigError("train.sample_every, train.warmup_steps and train.skip_nonfinite must be 0 or more")
        if self.self_conditioning is not None and not 0 <= self.self_conditioning <= 1:
            raise ConfigError(f"self_conditioning is a share, in [0, 1], or None; got {self.self_conditioning}")
        if len({f"{width:g}" for width in t.posthoc}) < len(t.posthoc):
            raise ConfigError(f"train.posthoc names a width twice: {' '.join(map(str, t.posthoc))}")
        if not 0 <= t.augment <= 1:
            raise ConfigError(f"train.augment is a probability, in [0, 1]; got {t.augment}")
        if t.batch % t.accumulate:
            raise ConfigError(f"train.batch {t.batch} does not divide into train.accumulate {t.accumulate} slices")
        if not re.fullmatch(r"[\w.-]+", self.name):
            raise ConfigError(f"name {self.name!r} names a directory: use letters, digits, '.', '_' and '-'")


# ---------------------------------------------------------------- the kinds of values

LARGEST_GUIDANCE = 10_000  # beyond, the rounding of float32 grows to 1e-3 of the samples
MOST_TIMES = 1_000_000  # of a grid, which lies in memory with the plan of every step
MOST_WHOLE, LARGEST_FLOAT = 2**63 - 1, float(np.finfo(np.float32).max)
KINDS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a list", type(None): "None",
}  # fmt: skip
ENDLESS = {"s_max"}  # the arguments that may be infinite


def _check_fields(settings, prefix: str = "") -> None:
    """Raise ConfigError unless every field of a config holds what its annotation says, and finite numbers."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if isinstance(field.type, type) and dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):
                raise ConfigError(f"{name} must be a {field.type.__name__}(...), got {value!r}")
            if not isinstance(value, Named):
                _check_fields(value, f"{name}.")
            continue
        _check_value(name, value, field.type)
        if field.name != "seed":
            _check_numbers(name, value)


def _check_value(what: str, value, annotation, default=inspect.Parameter.empty) -> None:
    """Raise ConfigError if `value` is of another kind than its annotation names.

    The kind of the default is allowed too. Where neither says anything, every value is.
    """
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in UNIONS else (annotation,)
    kinds = [kind for kind in (typing.get_origin(part) or part for part in parts) if kind in KINDS]
    if default is not inspect.Parameter.empty and type(default) in KINDS and type(default) not in kinds:
        kinds.append(type(default))
    if not [kind for kind in kinds if kind is not type(None)]:
        return  # neither says anything
    kind = tuple if isinstance(value, list) else type(value)
    if kind not in kinds and not (float in kinds and isinstance(value, (int, float)) and kind is not bool):
        expected = " or ".join(KINDS[kind] for kind in kinds)
        raise ConfigError(f"{what} must be {expected}, got {value!r}")


UNIONS = (typing.Union, types.UnionType)


def _check_numbers(what: str, value, endless: bool = False) -> None:
    """Raise ConfigError if a number in `value` is not finite in float32, or a whole one has more than 64 bits."""
    if isinstance(value, dict):
        value = tuple(value.values())
    if isinstance(value, (tuple, list)):
        for one in value:
            _check_numbers(what, one)
    elif isinstance(value, int) and not -MOST_WHOLE <= value <= MOST_WHOLE:
        raise ConfigError(f"{what} must be a whole number of 64 bits, got {value}")
    elif isinstance(value, float) and not (abs(value) <= LARGEST_FLOAT or (endless and value == math.inf)):
        raise ConfigError(f"{what} must be a finite number of float32, got {value}")


def check_kinds(what: str, args: dict, parameters: dict) -> None:
    """Check the kinds of arguments, and that their numbers are finite.

    Args:
        what: what takes the arguments, for the message, as "solver 'ddim'".
        args: {name: value} of the arguments.
        parameters: {name: (annotation, default)} of what is known of them; other arguments may be of any kind.

    Raises:
        ConfigError: an argument is of another kind than its parameter, or one of its numbers is not finite.
    """
    for name, value in args.items():
        if name in parameters:
            _check_value(f"{what}: {name}", value, *parameters[name])
        _check_numbers(f"{what}: {name}", value, name in ENDLESS)


def check_seed(seed: int) -> None:
    """Check a seed of a script's command line.

    Raises:
        ConfigError: JAX or NumPy refuses it, or takes it for another one.
    """
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed must be a whole number from 0 to {2**32 - 1:,}, got {seed}")
