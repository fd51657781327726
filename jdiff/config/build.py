"""The objects that a config is built into."""

import dataclasses
import os
from typing import Any

import numpy as np

from jdiff import guidance
from jdiff.config.schema import Config, ConfigError, Named, Sample, check_kinds, first_line
from jdiff.config.tables import (
    CONDITIONINGS,
    COUPLINGS,
    EMAS,
    GRIDS,
    GUIDES,
    LEVELS,
    LOSSES,
    ON_KNOTS,
    SCHEDULES,
    SOLVERS,
    TARGETS,
    WEIGHTS,
    make,
    parameters_of,
    table_length,
)
from jdiff.data import DATASETS
from jdiff.losses import Regression
from jdiff.models import create_model, list_models
from jdiff.process.table import Discrete
from jdiff.process.times import check_times
from jdiff.train import ema, optim

LARGEST_SIZE = 1_000_000  # of anything in a network: its layers, channels, classes


def build_data(config: Config):
    """Read the data set of a config.

    Raises:
        ConfigError: there is no such data set, or it cannot be read.
    """
    return make("data set", DATASETS, config.data)


def build_model(config: Config, classes: int):
    """Make the network of a config.

    Args:
        config: the whole config: its loss and its self-conditioning decide how many channels the network returns.
        classes: the number of classes of the data, 0 for none. A number in the config comes before it.

    Returns:
        A module with `init` and `apply`.

    Raises:
        ConfigError: there is no such network, a field is unknown or out of range, or the network does not fit the loss.
    """
    fields: dict[str, Any] = dict(num_classes=classes)
    # the channels of the output over those of the input
    channels = (2 if config.loss.name == "hybrid" else 1) / (1 if config.self_conditioning is None else 2)
    if channels != 1:
        fields["out_multiplier"] = channels
    args, what = config.model.args, f"model {config.model.name!r}"
    check_kinds(what, args, {})
    for name, value in args.items():
        for size in value if isinstance(value, tuple) else (value,):
            if type(size) is int and not 0 <= size <= LARGEST_SIZE:
                raise ConfigError(f"{what}: {name} must be from 0 to {LARGEST_SIZE:,}, got {value}")
    try:
        model = create_model(config.model.name, **fields | args)
    except (ValueError, TypeError) as error:
        raise ConfigError(first_line(error)) from error
    known = {field.name: (field.type, field.default) for field in dataclasses.fields(model)}
    check_kinds(what, args, known)
    dropout = args.get("dropout", 0.0)
    if not 0 <= dropout < 1:
        raise ConfigError(f"{what}: dropout is a share, in [0, 1); got {dropout}")
    if config.loss.name == "uncertain" and not getattr(model, "logvar_channels", 0):
        raise ConfigError(f"loss 'uncertain' needs an uncertainty head, and model {config.model.name!r} has none")
    if config.train.augment and getattr(model, "augment_dim", 0) != 9:
        raise ConfigError(f"train.augment tells the network 9 numbers: model {config.model.name!r} needs augment_dim 9")
    return model


def build_schedule(config: Config):
    """The noise schedule of a config. Raises ConfigError where it is unknown or out of range."""
    return make("schedule", SCHEDULES, config.schedule)


def build_regression(config: Config) -> Regression:
    """What the losses of a config share: schedule, target, conditioning, levels, weight, coupling, self-conditioning.

    Raises:
        ConfigError: one of them is unknown or out of range.
    """
    return Regression(
        schedule=build_schedule(config),
        target=make("target", TARGETS, config.target),
        conditioning=make("conditioning", CONDITIONINGS, config.conditioning),
        levels=make("levels", LEVELS, config.levels),
        weight=make("weight", WEIGHTS, config.weight),
        coupling=make("coupling", COUPLINGS, config.coupling),
        self_conditioning=config.self_conditioning,
    )


def build_loss(config: Config):
    """The loss of a config: one of `jdiff.losses`.

    Returns:
        `loss(apply, params, key, data, cond, **regression) -> (scalar, aux)`, with the fields of a `Regression`.

    Raises:
        ConfigError: it is unknown, or it needs another schedule or another law of the levels.
    """
    if config.loss.name == "hybrid" and config.schedule.name != "discrete":
        raise ConfigError(
            "loss 'hybrid' learns the variance between the knots of a table: it needs schedule 'discrete'"
        )
    if config.loss.name == "hybrid" and (config.levels.name not in ON_KNOTS or "T" not in config.levels.args):
        raise ConfigError(
            f"loss 'hybrid' is stated on the knots of a table: it needs levels {' or '.join(ON_KNOTS)}, with T"
        )
    return make("loss", LOSSES, config.loss)


def build_optimizer(config: Config):
    """The optimiser of a config, with its learning rates and its clipping: an `optax.GradientTransformation`.

    Raises:
        ConfigError: a name or an argument is unknown or out of range.
    """
    t = config.train
    for kind, choice, table in (
        ("optimizer", t.optimizer, optim.OPTIMIZERS), ("learning-rate schedule", t.lr_schedule, optim.LR_SCHEDULES),
    ):  # fmt: skip
        parameters = parameters_of(table[choice.name]) if choice.name in table else {}
        check_kinds(f"{kind} {choice.name!r}", choice.args, parameters)
    try:
        rates = optim.lr_schedule(t.lr_schedule.name, t.lr, t.steps, t.warmup_steps, **t.lr_schedule.args)
        return optim.optimizer(t.optimizer.name, rates, t.clip, **t.optimizer.args)
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def average_names(config: Config) -> list[str] | None:
    """The names of the averages of the parameters that training keeps; None where it keeps one, which has no name."""
    widths = [f"{width:g}" for width in config.train.posthoc]
    return ["main", *widths] if widths else None


def build_averages(config: Config):
    """The law of the average of the parameters, `law(step) -> decay`.

    Returns:
        The law; or {name: law} where `average_names` has names.

    Raises:
        ConfigError: the law is unknown, or a number is out of range.
    """
    t = config.train
    main = make("ema", EMAS, t.ema, **(dict(batch=t.batch) if t.ema.name == "half_life" else {}))
    names_of_all = average_names(config)
    if names_of_all is None:
        return main
    try:
        return dict(zip(names_of_all, [main, *map(ema.power, t.posthoc)], strict=True))
    except (ValueError, TypeError) as error:
        raise ConfigError(str(error)) from error


def devices(config: Config) -> list:
    """The devices that a run uses, in the order of the processes.

    Raises:
        ConfigError: there are too few, or the batch, its slices or the groups of devices do not divide.
    """
    import jax

    t, found, processes = config.train, jax.devices(), jax.process_count()
    if t.devices is not None and t.devices > len(found):
        more = "; JAX_NUM_CPU_DEVICES makes more" if jax.default_backend() == "cpu" else ""
        raise ConfigError(f"train.devices is {t.devices}, but there are {len(found)}{more}")
    if t.devices is not None and processes > 1 and t.devices != len(found):
        raise ConfigError(f"several processes use all their devices: leave train.devices out (there are {len(found)})")
    # in the order of the processes, because each process reads the rows of its own devices
    found = sorted(found, key=lambda device: (device.process_index, device.id))[: t.devices]
    if len(found) % t.fsdp:
        raise ConfigError(f"train.fsdp {t.fsdp} does not divide the {len(found)} devices")
    if t.batch % (len(found) * t.accumulate):
        slices = f" in {t.accumulate} slices" if t.accumulate > 1 else ""
        raise ConfigError(f"train.batch {t.batch} does not divide over {len(found)} devices{slices}")
    return found


def limit_threads(config: Config) -> None:
    """Give XLA on the CPU `config.train.threads` threads.

    This must be called before the first array is made: it has no effect afterwards. To hand layers of some microseconds
    from core to core costs more than it gains. XLA reads NPROC from the environment; a value that is already there is
    left alone.
    """
    if config.train.threads is not None:
        os.environ.setdefault("NPROC", str(config.train.threads))


def build_sampler(sample: Sample, schedule):
    """The solver and the times of the sampling part of a config.

    Args:
        sample: that part.
        schedule: the noise schedule, in whose domain the times lie.

    Returns:
        (solver, times (N,)).

    Raises:
        ConfigError: a name or an argument is unknown or out of range, or the times do not descend.
    """
    solver, times = make("solver", SOLVERS, sample.solver), make("grid", GRIDS, sample.grid, schedule, sample.steps)
    try:
        return solver, check_times(schedule, times)
    except ValueError as error:
        raise ConfigError(f"grid {sample.grid.name!r}: {error}") from error


def build_guidance(sample: Sample, conditional, other):
    """The guided denoiser of the sampling part of a config: the method, then `rescale`, `interval` and `clip`.

    Args:
        sample: that part.
        conditional: the denoiser that is guided.
        other: the one that guidance leads away from; None where there is none, and nothing is guided.

    Returns:
        A `Denoise`.

    Raises:
        ConfigError: the method or an argument is unknown or out of range.
    """
    denoise = conditional
    if other is not None:
        other = guidance.cached(other, sample.cache) if sample.cache > 1 else other
        denoise = make("guide", GUIDES, sample.guide, conditional, other, sample.guidance)
        if sample.rescale:
            denoise = guidance.rescale(denoise, conditional, sample.rescale)
        if sample.interval:
            denoise = guidance.interval(denoise, conditional, *sample.interval)
    if sample.clip is None:
        return denoise
    return guidance.threshold(denoise, denoise.schedule, sample.clip)


def check(config: Config) -> None:
    """Build all that costs nothing, so that a typo shows at once: all but the data and the network's parameters.

    Raises:
        ConfigError: something in the config has no meaning.
    """
    schedule = build_regression(config).schedule
    if isinstance(schedule, Discrete):
        for what, choice in (("levels", config.levels), ("conditioning", config.conditioning)):
            T = choice.args.get("T")
            if T is not None and T != table_length(schedule):
                raise ConfigError(f"{what} {choice.name!r} has T = {T}, the schedule's table {table_length(schedule)}")
    build_loss(config)
    build_averages(config)
    tx = build_optimizer(config)
    try:
        _try_optimizer(tx)
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"optimizer {config.train.optimizer.name!r}: {first_line(error)}") from error
    build_sampler(config.sample, schedule)
    check_guide(config.sample)
    if config.model.name not in list_models():
        build_model(config, 0)
    if config.data.name not in DATASETS:
        build_data(config)


def check_guide(sample: Sample) -> None:
    """Try the method of guidance on functions that are no networks.

    Raises:
        ConfigError: the method or an argument is unknown or out of range, or two settings do not go together.
    """
    args = sample.guide.args
    # functions cannot be joined in one call
    alone = {name: value for name, value in args.items() if name != "batched" or not isinstance(value, bool)}
    make("guide", GUIDES, Named(sample.guide.name, alone), *_PLAIN, sample.guidance)
    if sample.cache > 1 and args.get("batched"):
        raise ConfigError("sample.cache keeps one branch, and batched evaluates both in one call; choose one of them")


_PLAIN = (lambda x, t: x), (lambda x, t: x)


def _try_optimizer(tx) -> None:
    """Trace a step on a small kernel and bias: what optax finds wrong in its arguments shows here, or in training."""
    import jax

    params = {"kernel": jax.ShapeDtypeStruct((4, 4), np.float32), "bias": jax.ShapeDtypeStruct((4,), np.float32)}
    jax.eval_shape(lambda params: tx.update(params, tx.init(params), params), params)
