"""Configurations: nested frozen dataclasses, their command line, and the objects their names stand for.

A file `configs/NAME.py` exports `config = Config(...)`. No module below this one sees a config.
"""

import contextlib
import dataclasses
import errno
import functools
import importlib.util
import inspect
import io
import itertools
import json
import math
import os
import re
import sys
import tempfile
import types
import typing
from pathlib import Path
from typing import Any

import numpy as np

from jdiff import losses, solvers
from jdiff.core import foreign
from jdiff.core.checks import LARGEST
from jdiff.core.names import did_you_mean
from jdiff.data import DATASETS, DataError
from jdiff.denoisers import conditioning, targets
from jdiff.losses import coupling, levels, weights
from jdiff.models import create_model, list_models
from jdiff.process import betas, grid, schedules
from jdiff.train import ema, optim


class ConfigError(ValueError):
    """A setting is wrong; the message is one line: what was wrong, what was expected."""


def _tuples(value):
    """JSON's lists as the tuples they were."""
    if isinstance(value, dict):
        return {k: _tuples(v) for k, v in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


@dataclasses.dataclass(frozen=True)
class Named:
    """Something chosen by name, with its arguments."""

    name: str
    """Which one; a wrong name lists the valid ones."""
    args: dict[str, Any] = dataclasses.field(default_factory=dict)
    """Its arguments; --FIELD.args.NAME overrides one, or adds it. Another name drops those of the old name."""

    def __post_init__(self):
        words = isinstance(self.args, dict) and all(isinstance(word, str) for word in self.args)
        if not isinstance(self.name, str) or not words:
            raise ConfigError(f"Named takes a name and a dict of arguments, got {self.name!r} and {self.args!r}")
        object.__setattr__(self, "args", _tuples(self.args))  # as they come back from JSON


@dataclasses.dataclass(frozen=True)
class Train:
    """How to train."""

    steps: int = 10_000
    """Optimiser steps of the whole run."""
    batch: int = 128
    """Samples in a step."""
    accumulate: int = 1
    """Slices of the batch, one after the other: less memory for the same step."""
    devices: int | None = None
    """How many to use; None for all, of all processes. In the environment JAX_NUM_CPU_DEVICES=N makes N on CPUs."""
    fsdp: int = 1
    """Devices over which one copy of the state is divided; batches are divided over all devices in any case."""
    optimizer: Named = Named("adam")
    """adam, adamw(weight_decay), adamax, nadam, rmsprop, adagrad, sgd(momentum), lion, adafactor, muon."""
    lr: float = 1e-3
    """Learning rate, after warm-up."""
    lr_schedule: Named = Named("constant")
    """What follows the warm-up: constant, linear or cosine (to 0 at the last step), inverse_sqrt(reference)."""
    warmup_steps: int = 0
    """Steps over which the learning rate rises from 0."""
    clip: float | None = 1.0
    """Largest norm of the gradient; None for no clipping."""
    skip_nonfinite: int = 0
    """Steps of not finite loss or gradient to leave out, in one go, before stopping; 0 stops at the first."""
    flip: bool = False
    """Mirror each image left to right with probability 1/2."""
    augment: float = 0.0
    """Probability of each of EDM's non-leaking augmentations, told to the network (its augment_dim is 9); EDM: 0.12."""
    ema: Named = Named("half_life", {"images": 50_000.0})
    """The average of the parameters that is sampled: constant(decay), half_life(images), warmup(max_decay), power."""
    posthoc: tuple[float, ...] = ()
    """Relative widths of further averages, of which scripts/posthoc_ema.py makes any other; EDM2: 0.05 0.1."""
    snapshot_every: int = 5_000
    """Steps between snapshots of those averages, kept in snapshots/."""
    label_dropout: float = 0.1
    """Share of labels hidden in training, for classifier-free guidance; no effect without classes."""
    visit: int = 100
    """Steps run in one jitted loop between visits to the host: logging, progress, Ctrl-C."""
    save_every: int = 5_000
    """Steps between checkpoints."""
    keep: int = 3
    """Checkpoints kept."""
    keep_every: int | None = None
    """Checkpoints of steps that are multiples of this are kept beside."""
    sample_every: int = 0
    """Steps between pictures of samples in samples/; 0 for none but the last."""
    peer_timeout: float = 60.0
    """Seconds after which a process that says nothing counts as lost, and the others of the run end; at least 5."""
    threads: int | None = None
    """Threads of XLA on the CPU; None for one a core. Networks of a few microseconds a layer are faster on 1."""


@dataclasses.dataclass(frozen=True)
class Sample:
    """How to sample, at the end of training and by default in scripts/sample.py."""

    solver: Named = Named("heun")
    """ddpm(variance), ddim(eta), heun, dpmpp_2m, unipc(order), edm_stochastic(churn), ...: a wrong name lists all."""
    grid: Named = Named("log_snr")
    """uniform, log_snr(lowest), karras(rho), polyexponential(rho), beta(alpha, beta), discrete(spacing), ..."""
    steps: int = 20
    """Times of the grid: network calls of a one-evaluation solver; heun makes 2 steps - 1."""
    guidance: float = 1.0
    """Weight of classifier-free guidance, within plus and minus 10,000; 1 is none."""
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
    """The data set: digits, scurve, mnist, cifar10, tfds(name, size), folder(path, size), arrays(path), ..."""
    model: Named
    """The network and its fields, see jdiff.list_models()."""
    schedule: Named
    """vp, subvp, ve, edm, cosine, flow, or discrete(betas, T, ...)."""
    target: Named = Named("eps")
    """What the network regresses: x0, eps, score, v, velocity or edm."""
    conditioning: Named = Named("log_snr")
    """What the network is shown of the noise level: log_snr, edm, index(T), continuous(scale) or sigma."""
    levels: Named = Named("uniform")
    """The law of t in training: uniform, independent, knots(T), antithetic(T), log_normal, logit_normal, loss_aware."""
    weight: Named = Named("flat")
    """What each noise level counts: flat, simple, edm, min_snr(gamma), p2, sigmoid(bias), likelihood."""
    loss: Named = Named("denoising")
    """denoising; hybrid(vlb), which learns the variance too; uncertain, for a network with an uncertainty head."""
    coupling: Named = Named("independent")
    """Which noise meets which data: independent, nearest(candidates) or assignment (exact, within the batch)."""
    self_conditioning: float | None = None
    """Share of samples that are shown the network's own estimate of x_0, 0.5 in its paper; None for no such input."""
    train: Train = Train()
    sample: Sample = Sample()
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
        if s.steps > MOST_TIMES:
            raise ConfigError(f"sample.steps must be at most {MOST_TIMES:,}, got {s.steps:,}")
        if not -(2**63) <= self.seed < 2**63 - 2:  # scripts/train.py also uses seed + 1 and seed + 2
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
LARGEST_SIZE = 1_000_000  # of anything in a network: its layers, channels, classes
KINDS = {
    bool: "True or False", int: "a whole number", float: "a number", str: "a text", tuple: "a list", type(None): "None",
}  # fmt: skip
ENDLESS = {"s_max"}  # the arguments that may be infinite


def _check_fields(settings, prefix: str = "") -> None:
    """Raise ConfigError unless every field of a config holds what its annotation says, and finite numbers."""
    for field in dataclasses.fields(settings):
        name, value = f"{prefix}{field.name}", getattr(settings, field.name)
        if dataclasses.is_dataclass(field.type):
            if not isinstance(value, field.type):
                raise ConfigError(f"{name} must be a {field.type.__name__}(...), got {value!r}")
            if not isinstance(value, Named):
                _check_fields(value, f"{name}.")
            continue
        _check_value(name, value, field.type)
        if field.name != "seed":
            _check_numbers(name, value)


def _check_value(what: str, value, annotation, default=inspect.Parameter.empty) -> None:
    """Raise ConfigError if `value` is of another kind than an annotation names, or where it names none, the default."""
    parts = typing.get_args(annotation) if typing.get_origin(annotation) in UNIONS else (annotation,)
    parts = [typing.get_origin(part) or part for part in parts]
    kinds = [kind for kind in parts if kind in KINDS]
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


def _check_arguments(what: str, args: dict, parameters: dict) -> None:
    """Raise ConfigError for arguments of another kind than the parameters take, and for numbers that are not finite.

    parameters: {name: (annotation, default)}.
    """
    for name, value in args.items():
        if name in parameters:
            _check_value(f"{what}: {name}", value, *parameters[name])
        _check_numbers(f"{what}: {name}", value, name in ENDLESS)


def check_seed(seed: int) -> None:
    """Raise ConfigError for a --seed that JAX and NumPy do not both take, or take for another one."""
    if not 0 <= seed < 2**32:
        raise ConfigError(f"--seed must be a whole number from 0 to {2**32 - 1:,}, got {seed}")


# ---------------------------------------------------------------- names and what they stand for


def _discrete(table: str = "linear", T: int = 1000, **args):
    return betas.discrete(_make("beta table", BETAS, Named(table, dict(args, T=T))))


BETAS = {
    "linear": betas.linear, "scaled_linear": betas.scaled_linear, "cosine": betas.cosine, "sigmoid": betas.sigmoid,
}  # fmt: skip
SCHEDULES = {
    "vp": schedules.VP, "subvp": schedules.SubVP, "ve": schedules.VE, "edm": schedules.EDM,
    "cosine": schedules.Cosine, "flow": schedules.Flow, "discrete": _discrete,
}  # fmt: skip
TARGETS = {
    "x0": targets.X0, "eps": targets.Eps, "score": targets.Score, "v": targets.V, "velocity": targets.Velocity,
    "edm": targets.EDM,
}  # fmt: skip
CONDITIONINGS = {
    "log_snr": conditioning.LogSNR, "edm": conditioning.EDM, "index": conditioning.Index,
    "continuous": conditioning.Continuous, "sigma": conditioning.Sigma,
}  # fmt: skip
LEVELS = {
    "uniform": levels.Uniform, "knots": levels.Knots, "antithetic": levels.Antithetic,
    "log_normal": levels.LogNormal, "logit_normal": levels.LogitNormal, "independent": levels.Independent,
    "loss_aware": levels.LossAware,
}  # fmt: skip
WEIGHTS = {
    "flat": weights.Flat, "simple": weights.Simple, "edm": weights.EDM, "min_snr": weights.MinSNR, "p2": weights.P2,
    "sigmoid": weights.Sigmoid, "likelihood": weights.Likelihood,
}  # fmt: skip
ON_KNOTS = ("knots", "antithetic", "loss_aware")
COUPLINGS = {"independent": coupling.Independent, "nearest": coupling.Nearest, "assignment": coupling.Assignment}


def _hybrid(vlb: float = 1e-3, bins: int | None = 256):
    if not 0 <= vlb <= LARGEST or (bins is not None and bins < 2):
        raise ValueError(f"vlb must be 0 or more, at most {LARGEST:g}, and bins 2 or more; got {vlb} and {bins}")
    return functools.partial(losses.hybrid, vlb=vlb, bins=bins)


LOSSES = {
    "denoising": lambda: losses.denoising,
    "hybrid": _hybrid,
    "uncertain": lambda: losses.uncertain,
}
SOLVERS = {
    "ddpm": solvers.DDPM, "ddim": solvers.DDIM, "euler": solvers.Euler, "euler_ancestral": solvers.EulerAncestral,
    "heun": solvers.Heun, "rk4": solvers.RK4, "edm_stochastic": solvers.EDMStochastic, "dpm2": solvers.DPM2,
    "dpm2_ancestral": solvers.DPM2Ancestral, "lms": solvers.LMS, "pndm": solvers.PNDM, "ipndm": solvers.IPNDM,
    "deis": solvers.DEIS, "exponential_ab": solvers.ExponentialAB, "dpm_solver": solvers.DPMSolver,
    "dpm_solver_m": solvers.DPMSolverM, "dpmpp_2s": solvers.DPMpp2S, "dpmpp_2s_ancestral": solvers.DPMpp2SAncestral,
    "dpmpp_2m": solvers.DPMpp2M, "dpmpp_3m": solvers.DPMpp3M, "dpmpp_sde": solvers.DPMppSDE,
    "dpmpp_2m_sde": solvers.DPMpp2MSDE, "dpmpp_3m_sde": solvers.DPMpp3MSDE, "unipc": solvers.UniPC,
    "sa_solver": solvers.SASolver, "euler_maruyama": solvers.EulerMaruyama,
    "predictor_corrector": lambda eta=1.0, snr=0.16, steps=1: solvers.PredictorCorrector(
        solvers.EulerMaruyama(eta), solvers.Langevin(snr, steps)
    ),
    "annealed_langevin": solvers.AnnealedLangevin, "gradient_estimation": solvers.GradientEstimation,
    "restart": lambda low=0.06, high=0.3, rounds=2, steps=4: solvers.Restart(solvers.Heun(), low, high, rounds, steps),
}  # fmt: skip
EMAS = {"constant": ema.constant, "half_life": ema.half_life, "warmup": ema.warmup, "power": ema.power}


def _sigmas(schedule, n, sigmas: tuple):
    if not all(type(sigma) in (int, float) for sigma in sigmas):
        raise ValueError(f"sigmas must be a list of numbers, got {sigmas}")
    return grid.of_sigmas(schedule, sigmas, n)


GRIDS = {
    "uniform": lambda schedule, n: grid.uniform(n, schedule.t_min, schedule.t_max),
    "log_snr": lambda schedule, n, lowest=grid.LOWEST_LOG_SNR: grid.log_snr(schedule, n, lowest=lowest),
    "karras": lambda schedule, n, rho=7.0: grid.karras(schedule, n, _rho(rho)),
    "exponential": lambda schedule, n, lowest=grid.LOWEST_LOG_SNR: grid.exponential(schedule, n, lowest=lowest),
    "polyexponential": lambda schedule, n, rho=1.0: grid.polyexponential(schedule, n, _rho(rho)),
    "beta": lambda schedule, n, alpha=0.6, beta=0.6: grid.beta(schedule, n, alpha, beta),
    "shifted": lambda schedule, n, shift=3.0: grid.shift(grid.uniform(n, schedule.t_min, schedule.t_max), shift),
    "sigmas": _sigmas,
    "discrete": lambda schedule, n, spacing="leading": grid.discrete(_table_length(schedule), n, spacing),
}


def _rho(rho: float) -> float:
    if not 0.1 <= rho <= 100:
        raise ValueError(f"rho must be from 0.1 to 100, got {rho}")
    return rho


def _table_length(schedule) -> int:
    if not isinstance(schedule, schedules.Discrete):
        raise ConfigError("grid 'discrete' picks knots of a table, and needs schedule 'discrete'; use 'log_snr'")
    return schedule.log_nsr.shape[0]


def setting(text: str) -> tuple[str, object]:
    """("order", 3) of "order=3": the value as JSON where it is that, or None, True, False, else as it stands."""
    name, equals, value = text.partition("=")
    if not equals or not name.isidentifier():
        raise ConfigError(f"{text!r} is no setting; expected name=value, as order=3")
    return name, _value(value)


def _value(text: str):
    """The value that a word of the command line stands for."""
    if text in WORDS:
        return WORDS[text]
    for read in (json.loads, float):  # which reads nan and .5
        try:
            return _tuples(read(text))
        except (ValueError, RecursionError):
            continue
    return text


WORDS = {"None": None, "True": True, "False": False}


def _make(kind: str, table: dict, choice: Named, *given, **fixed):
    """table[choice.name](*given, **choice.args, **fixed), with one clear line for what is wrong."""
    if choice.name not in table:
        hint = did_you_mean(choice.name, table)
        raise ConfigError(f"unknown {kind} {choice.name!r}{hint}; one of {', '.join(table)}")
    make = table[choice.name]
    parameters = inspect.signature(make).parameters
    if not any(p.kind is p.VAR_KEYWORD for p in parameters.values()):
        valid = [name for name in list(parameters)[len(given) :] if name not in fixed]
        for name in choice.args:
            if name not in valid:
                hint, known = did_you_mean(name, valid), ", ".join(valid) or "none"
                raise ConfigError(f"{kind} {choice.name!r} has no argument {name!r}{hint}; valid: {known}")
    for p in list(parameters.values())[len(given) :]:
        named = p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)
        if named and p.default is p.empty and p.name not in choice.args and p.name not in fixed:
            raise ConfigError(f"{kind} {choice.name!r} needs the argument {p.name!r}")
    _check_arguments(f"{kind} {choice.name!r}", choice.args, _annotated(parameters))
    try:
        return make(*given, **choice.args, **fixed)
    except ConfigError:
        raise
    except DataError as error:  # which names the set itself
        raise ConfigError(str(error)) from error
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise ConfigError(f"{kind} {choice.name!r}: {first_line(error)}") from error


def _annotated(parameters) -> dict:
    """{name: (annotation, default)} of a signature's parameters."""
    return {p.name: (p.annotation, p.default) for p in parameters.values()}


def first_line(error: BaseException) -> str:
    """The first line of an exception's text, or its kind where it has none."""
    return next((line.strip() for line in str(error).splitlines() if line.strip()), type(error).__name__)


def build_data(config: Config):
    """The data set of a config."""
    return _make("data set", DATASETS, config.data)


def build_model(config: Config, classes: int):
    """The network of a config; `num_classes`, and channels for a variance or an earlier estimate, follow the rest."""
    fields = dict(num_classes=classes)
    # the output's channels over the input's
    channels = (2 if config.loss.name == "hybrid" else 1) / (1 if config.self_conditioning is None else 2)
    if channels != 1:
        fields["out_multiplier"] = channels
    args, what = config.model.args, f"model {config.model.name!r}"
    _check_arguments(what, args, {})
    for name, value in args.items():
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and not 0 <= size <= LARGEST_SIZE:
                raise ConfigError(f"{what}: {name} must be from 0 to {LARGEST_SIZE:,}, got {value}")
    try:
        model = create_model(config.model.name, **fields | args)
    except (ValueError, TypeError) as error:
        raise ConfigError(first_line(error)) from error
    known = {field.name: (field.type, field.default) for field in dataclasses.fields(model)}
    _check_arguments(what, args, known)
    dropout = args.get("dropout", 0.0)
    if not 0 <= dropout < 1:
        raise ConfigError(f"{what}: dropout is a share, in [0, 1); got {dropout}")
    if config.loss.name == "uncertain" and not getattr(model, "logvar_channels", 0):
        raise ConfigError(f"loss 'uncertain' needs an uncertainty head, and model {config.model.name!r} has none")
    if config.train.augment and getattr(model, "augment_dim", 0) != 9:
        raise ConfigError(f"train.augment tells the network 9 numbers: model {config.model.name!r} needs augment_dim 9")
    return model


def build_schedule(config: Config):
    """The noise schedule of a config."""
    return _make("schedule", SCHEDULES, config.schedule)


def build_objective(config: Config) -> dict:
    """The keywords of the losses: schedule, target, conditioning, levels, weight, coupling, self_conditioning."""
    return dict(
        schedule=build_schedule(config),
        target=_make("target", TARGETS, config.target),
        conditioning=_make("conditioning", CONDITIONINGS, config.conditioning),
        levels=_make("levels", LEVELS, config.levels),
        weight=_make("weight", WEIGHTS, config.weight),
        coupling=_make("coupling", COUPLINGS, config.coupling),
        self_conditioning=config.self_conditioning,
    )


def build_loss(config: Config):
    """The loss of a config, `loss(apply, params, key, data, cond, **objective)`."""
    if config.loss.name == "hybrid" and config.schedule.name != "discrete":
        raise ConfigError(
            "loss 'hybrid' learns the variance between the knots of a table: it needs schedule 'discrete'"
        )
    if config.loss.name == "hybrid" and (config.levels.name not in ON_KNOTS or "T" not in config.levels.args):
        raise ConfigError(
            f"loss 'hybrid' is stated on the knots of a table: it needs levels {' or '.join(ON_KNOTS)}, with T"
        )
    return _make("loss", LOSSES, config.loss)


def build_optimizer(config: Config):
    """(optimiser, EMA law) of a config; with train.posthoc, a dict of laws: "main", and one for each width."""
    t = config.train
    fixed = dict(batch=t.batch) if t.ema.name == "half_life" else {}
    for kind, choice, table in (
        ("optimizer", t.optimizer, optim.OPTIMIZERS), ("learning-rate schedule", t.lr_schedule, optim.LR_SCHEDULES),
    ):  # fmt: skip
        parameters = _annotated(inspect.signature(table[choice.name]).parameters) if choice.name in table else {}
        _check_arguments(f"{kind} {choice.name!r}", choice.args, parameters)
    try:
        rates = optim.lr_schedule(t.lr_schedule.name, t.lr, t.steps, t.warmup_steps, **t.lr_schedule.args)
        tx = optim.optimizer(t.optimizer.name, rates, t.clip, **t.optimizer.args)
        widths = {f"{width:g}": ema.power(width) for width in t.posthoc}
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error
    main = _make("ema", EMAS, t.ema, **fixed)
    return tx, {"main": main, **widths} if widths else main


def devices(config: Config) -> list:
    """The devices that a run uses. Raises ConfigError where batch, slices, processes and groups do not divide."""
    import jax

    t, found, processes = config.train, jax.devices(), jax.process_count()
    if t.devices is not None and t.devices > len(found):
        more = "; JAX_NUM_CPU_DEVICES makes more" if jax.default_backend() == "cpu" else ""
        raise ConfigError(f"train.devices is {t.devices}, but there are {len(found)}{more}")
    if t.devices is not None and processes > 1 and t.devices != len(found):
        raise ConfigError(f"several processes use all their devices: leave train.devices out (there are {len(found)})")
    # by process: each reads the rows of its own devices
    found = sorted(found, key=lambda device: (device.process_index, device.id))[: t.devices]
    if len(found) % t.fsdp:
        raise ConfigError(f"train.fsdp {t.fsdp} does not divide the {len(found)} devices")
    if t.batch % (len(found) * t.accumulate):
        slices = f" in {t.accumulate} slices" if t.accumulate > 1 else ""
        raise ConfigError(f"train.batch {t.batch} does not divide over {len(found)} devices{slices}")
    return found


def limit_threads(config: Config) -> None:
    """Give XLA:CPU `config.train.threads` threads: to be called before the first array is made, without effect after.

    Handing layers of some microseconds from core to core costs more than it gains. A value of NPROC that is already in
    the environment, where XLA looks, is left alone.
    """
    if config.train.threads is not None:
        os.environ.setdefault("NPROC", str(config.train.threads))


def build_sampler(sample: Sample, schedule):
    """(solver, times) of the sampling part of a config. Raises ConfigError for times that do not descend."""
    solver, times = _make("solver", SOLVERS, sample.solver), _make("grid", GRIDS, sample.grid, schedule, sample.steps)
    try:
        return solver, grid.check_times(schedule, times)
    except ValueError as error:
        raise ConfigError(f"grid {sample.grid.name!r}: {error}") from error


def check(config: Config) -> None:
    """Build everything that a config names but the data and the network's parameters, so that a typo shows at once."""
    schedule = build_objective(config)["schedule"]
    if isinstance(schedule, schedules.Discrete):
        for what, choice in (("levels", config.levels), ("conditioning", config.conditioning)):
            T = choice.args.get("T")
            if T is not None and T != _table_length(schedule):
                raise ConfigError(f"{what} {choice.name!r} has T = {T}, the schedule's table {_table_length(schedule)}")
    build_loss(config)
    tx, _ = build_optimizer(config)
    try:
        _try_optimizer(tx)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"optimizer {config.train.optimizer.name!r}: {first_line(error)}") from error
    build_sampler(config.sample, schedule)
    if config.model.name not in list_models():
        build_model(config, 0)
    if config.data.name not in DATASETS:
        build_data(config)


def _try_optimizer(tx) -> None:
    """Trace a step on a small kernel and bias: what optax finds wrong in its arguments shows here, or in training."""
    import jax

    params = {"kernel": jax.ShapeDtypeStruct((4, 4), np.float32), "bias": jax.ShapeDtypeStruct((4,), np.float32)}
    jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)


# ---------------------------------------------------------------- files


def load_config(path) -> Config:
    """The `config` that a Python file exports. Raises ConfigError for a missing file, a failing one, or none in it."""
    path = Path(path)
    if path.is_dir():
        raise ConfigError(f"{path} is a directory; expected a Python file that exports `config = Config(...)`")
    if not path.is_file():
        nearby = sorted(p.stem for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = did_you_mean(path.stem, nearby)
        raise ConfigError(f"no config file {path}{hint}; expected a Python file that exports `config = Config(...)`")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None:
        raise ConfigError(f"{path} is not a Python file; expected one that exports `config = Config(...)`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except SystemExit as stop:
        raise ConfigError(f"{path} called sys.exit({stop.code!r}); expected it to export a config and go on") from stop
    except Exception as error:
        kind, text = type(error).__name__, first_line(error)
        raise ConfigError(f"{path} failed: {kind}" + (f": {text}" if text != kind else "")) from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        found = "" if config is None else f", but {config!r:.60}"
        raise ConfigError(f"{path} exports no config{found}; expected `config = Config(...)` from jdiff.config")
    return config


def to_dict(config: Config) -> dict:
    """The config as JSON can hold it."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """The config as JSON, read back by `from_json` to an equal one."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(source: str | Path) -> Config:
    """The config that `to_json` wrote.

    Args:
        source: the text, or the path of a file that holds it.

    Raises:
        ConfigError: the JSON is broken or says a name twice, or settings are unknown, missing or mistyped; the message
            names the file.
    """
    import dacite

    def integer(digits):
        if len(digits) > 20 or abs(int(digits)) >= 2**63:
            raise ValueError(f"the whole number {digits[:20]}... has {len(digits):,} digits")
        return int(digits)

    where = f"{source} is" if isinstance(source, Path) else "this is"
    try:
        read = foreign.read_json if isinstance(source, Path) else foreign.parse_json
        return dacite.from_dict(Config, _tuples(read(source, integer)), dacite.Config(strict=True))
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, dacite.DaciteError) as error:
        raise ConfigError(f"{where} not a config of this version: {foreign.one_line(error)}") from error


def flat(config) -> dict[str, Any]:
    """{dotted name: value} of every setting."""
    out = {}

    def walk(prefix, value):
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            for k, v in value.items():
                walk(f"{prefix}.{k}" if prefix else k, v)
        else:
            out[prefix] = value

    walk("", config)
    return out


def differences(a: Config, b: Config, ignore=()) -> list[str]:
    """Dotted names whose values differ; a name in `ignore` covers everything below it."""
    x, y = flat(a), flat(b)
    names = [k for k in {**x, **y} if x.get(k) != y.get(k)]
    return [k for k in names if not any(k == i or k.startswith(i + ".") for i in ignore)]


def change(a: Config, b: Config, ignore=()) -> str | None:
    """What has changed from `a` to `b`, in a few words, or None if nothing has; `ignore` as in `differences`."""
    names = differences(a, b, ignore)
    if not names:
        return None
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]} was {flat(a).get(names[0])!r} and is now {flat(b).get(names[0])!r}{more}"


# ---------------------------------------------------------------- the command line


def parse(cls, argv, default=None, prog=None, description=None):
    """An instance of `cls` from the command line by tyro; a bad argument is one line on stderr and exit status 2."""
    import tyro

    argv, typed = list(argv), {}
    if default is not None:
        argv, typed, default = _typed_arguments(argv, default)
    options = dict(default=default) if default is not None else {}
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            parsed = tyro.cli(cls, args=argv, prog=prog, description=description, **options)
        return _with_arguments(parsed, typed)
    except ConfigError:
        raise
    except SystemExit as stop:
        if not stop.code:
            raise
        raise ConfigError(_one_line(captured.getvalue(), argv, default)) from None


def _typed_arguments(argv: list[str], default) -> tuple[list[str], dict, Any]:
    """What the command line says of the `Named` fields: (words left for tyro, {field: {argument: value}}, default).

    tyro knows only the arguments that the default has, so all are read here. A field whose typed name is another than
    the default's loses the default's arguments.
    """
    fields, names, left, typed = _named_fields(default), {}, [], {}
    for word, following in itertools.zip_longest(argv, argv[1:]):
        option, equals, name = word.partition("=")
        field = _underscored(option).removesuffix(".name")
        if option.endswith(".name") and field in fields and (equals or following is not None):
            names[field] = name if equals else following  # the last one counts, as for tyro
    for field, name in names.items():
        if name != fields[field].name:
            fields[field] = Named(name)
            default = _replaced(default, field, fields[field])
    i = 0
    while i < len(argv):
        option, equals, value = argv[i].partition("=")
        field, dot, name = _underscored(option).partition(".args.")
        i += 1
        if not dot or field not in fields or isinstance(fields[field].args.get(name.split(".")[0]), dict):
            left.append(argv[i - 1])
            continue
        words = [value] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            words.append(argv[i])
            i += 1
        if not name.isidentifier():
            raise ConfigError(f"{option} names no argument; expected --{field}.args.NAME")
        name, value = _argument(option, name, words, fields[field].args)
        typed.setdefault(field, {})[name] = value
    return left, typed, default


def _underscored(option: str) -> str:
    """ "train.lr_schedule" of "--train.lr-schedule", and "" of what is no option."""
    return option[2:].replace("-", "_") if option.startswith("--") else ""


def _argument(option: str, name: str, words: list[str], known: dict) -> tuple[str, Any]:
    """(name, value) of an argument of the command line: a text or a list where it was `known` as one."""
    positive = name.removeprefix("no_")
    if not words and isinstance(known.get(positive), bool):
        return positive, name == positive
    if not words:
        raise ConfigError(f"{option} needs a value")
    old = known.get(name)
    values = tuple(word if isinstance(old, str) and word not in WORDS else _value(word) for word in words)
    one = len(values) == 1 and (isinstance(values[0], tuple) or not isinstance(old, tuple))
    return name, values[0] if one else values


def _named_fields(settings, prefix: str = "") -> dict[str, Named]:
    """{dotted name: value} of the fields that are `Named`."""
    out = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Named):
            out[prefix + field.name] = value
        elif dataclasses.is_dataclass(value):
            out |= _named_fields(value, f"{prefix}{field.name}.")
    return out


def is_argument(config: Config, name: str) -> bool:
    """Whether a dotted name is that of an argument of a `Named` field, one that the config has or lacks."""
    field, dot, argument = name.partition(".args.")
    return bool(dot) and field in _named_fields(config) and argument.isidentifier()


def _replaced(settings, field: str, value):
    """`settings` with the field of that dotted name replaced."""
    first, dot, rest = field.partition(".")
    return dataclasses.replace(settings, **{first: _replaced(getattr(settings, first), rest, value) if dot else value})


def _with_arguments(settings, typed: dict):
    """`settings` with arguments added to its `Named` fields."""
    for field, args in typed.items():
        old = _named_fields(settings)[field]
        settings = _replaced(settings, field, Named(old.name, old.args | args))
    return settings


def _one_line(box: str, argv, default) -> str:
    """tyro's message without its frame; for an unknown option, with the nearest valid one."""
    known = [f"--{name}".replace("_", "-") for name in flat(default)] if default is not None else []
    for word in argv:
        option = word.split("=")[0]
        if option.startswith("--") and known and option.replace("_", "-") not in known and "Unrecognized" in box:
            return f"unknown setting {option}{did_you_mean(option.replace('_', '-'), known)}; --help lists them all"
    lines = [re.sub(r"[│╭╮╰╯─]+", " ", line).strip() for line in box.splitlines()]
    lines = [line for line in lines if line and not line.startswith(("Parsing error", "For full helptext"))]
    text = re.sub(r"\s+", " ", " ".join(lines))
    text = re.sub(r"^Value error Error parsing (Config: )?", "", text)
    return re.sub(r"^Unrecognized options (?=Unr)", "", text) or "bad command line; see --help"


def check_writable(path) -> None:
    """Find out before the work whether a file can be written. Raises ConfigError if not."""
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


def fail(message) -> None:
    """Print one line on stderr and leave with status 2."""
    short = "not enough memory: " if isinstance(message, MemoryError) else ""
    print(f"error: {short}{' '.join(str(message).split()) or type(message).__name__}", file=sys.stderr)
    raise SystemExit(2)
