"""Optimisers and learning-rate schedules by name, over optax.

The states of optimisers hold arrays only, so they can be donated, sharded and checkpointed.
"""

import functools
import inspect
import math
import re
from collections.abc import Callable
from typing import Any, TypeGuard

import jax
import jax.numpy as jnp
import optax

from jdiff.core.arrays import wide
from jdiff.core.names import check_arguments, choose
from jdiff.core.trees import path_names

# ---------------------------------------------------------------- learning rates


def _constant(lr, steps):
    """The learning rate stays as it is."""
    return optax.constant_schedule(lr)


def _cosine(lr, steps, end=0.0):
    """It falls along half a cosine to the share `end` of itself at the last step."""
    return optax.cosine_decay_schedule(lr, steps, _share("end", end))


def _linear(lr, steps, end=0.0):
    """It falls evenly to the share `end` of itself at the last step."""
    return optax.linear_schedule(lr, lr * _share("end", end), steps)


def _inverse_sqrt(lr, steps, reference):
    """It falls as 1 / sqrt(step / reference) from step `reference` on."""
    if not (_is_number(reference) and 0 < reference < math.inf):
        raise ValueError(f"reference is the step at which the decay begins, positive; got {reference}")
    return lambda step: lr / jnp.sqrt(jnp.maximum(jnp.asarray(step, jnp.float32) / reference, 1.0))


LR_SCHEDULES: dict[str, Callable[..., optax.Schedule]] = {
    "constant": _constant,
    "cosine": _cosine,
    "linear": _linear,
    "inverse_sqrt": _inverse_sqrt,
}


def lr_schedule(name: str, lr: float, steps: int, warmup_steps: int = 0, **args) -> optax.Schedule:
    """The learning rate of each step k = 0, 1, ...: a linear warm-up from 0, then the named schedule.

    With w = warmup_steps and u = (k - w) / (steps - w), capped at 1, it is after the warm-up:

        constant        lr
        cosine          lr (end + (1 - end) (1 + cos(pi u)) / 2)       end=0.0: the share of lr that is left
        linear          lr (1 - u + end u)                             end=0.0
        inverse_sqrt    lr min(k / w, 1) / sqrt(max(k / reference, 1)) reference: the step at which the decay begins

    Args:
        name: the schedule's name, as above.
        lr: the learning rate at the end of the warm-up.
        steps: the step at which the schedule ends.
        warmup_steps: the length of the warm-up, 0 or more.
        **args: the arguments of the named schedule, as above.

    Returns:
        A function of the step.

    Raises:
        ValueError: an unknown name or argument, or a number out of its range.

    Reference:
        inverse_sqrt is arXiv:2312.02696 eq. 67, whose k counts the warm-up too.
    """
    make = _named("learning-rate schedule", LR_SCHEDULES, name, args, given=("lr", "steps"))
    if lr <= 0 or warmup_steps < 0:
        raise ValueError(f"the learning rate must be positive and the warm-up 0 or more, got {lr} and {warmup_steps}")
    main = make(lr, max(steps - warmup_steps, 1), **args)
    if not warmup_steps:
        return main
    if name == "inverse_sqrt":
        return lambda step: main(step) * jnp.minimum(jnp.asarray(step, jnp.float32) / warmup_steps, 1.0)
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup_steps), main], [warmup_steps])


# ---------------------------------------------------------------- where weight decay acts

NOT_DECAYED = {
    "bias", "biases", "scale", "gain", "norm", "embedding", "embeddings", "pos", "position", "positions", "nothing",
}  # fmt: skip
FIXED = {"frequencies", "phases", "sigmas"}  # vectors of our networks that no gradient reaches


def kernels(params: Any) -> Any:
    """True for each matrix and convolution kernel, False for biases, scales of norms, gains and embeddings.

    A leaf named `kernel` is one if it has two axes or more. A leaf of another name is one if two of its axes are longer
    than 1, and no name on its path contains a word of `NOT_DECAYED`.
    """

    def leaf(path, a):
        names = _lower_names(path)
        if names and names[-1] == "kernel":
            return jnp.ndim(a) >= 2
        words = {word for name in names for word in re.split("[^a-z]+", name)}
        return sum(n > 1 for n in jnp.shape(a)) >= 2 and not words & NOT_DECAYED

    return jax.tree_util.tree_map_with_path(leaf, params)


def fixed(params: Any) -> Any:
    """True for each vector whose name is one of `FIXED`: random frequencies and the like, which nothing may decay."""

    def leaf(path, a):
        return jnp.ndim(a) == 1 and bool(path) and _lower_names(path)[-1] in FIXED

    return jax.tree_util.tree_map_with_path(leaf, params)


def _lower_names(path) -> list[str]:
    return [name.lower() for name in path_names(path)]


MASKS = {"kernels": kernels, "all": None}


# ---------------------------------------------------------------- optimisers


def _sgd(learning_rate, momentum=None, nesterov=False, accumulator_dtype=None, weight_decay=0.0, mask=None):
    """Stochastic gradient descent with momentum; weight_decay is added to the gradient."""
    tx = optax.sgd(learning_rate, momentum, nesterov, accumulator_dtype)
    return optax.chain(optax.add_decayed_weights(weight_decay, mask), tx) if weight_decay else tx


def _matrices(params):
    """A kernel as the matrix from all axes but the last to the last, as a convolution multiplies; None for the rest."""

    def leaf(is_kernel, a):
        return optax.contrib.MuonDimensionNumbers(tuple(range(a.ndim - 1)), (a.ndim - 1,)) if is_kernel else None

    return jax.tree.map(leaf, kernels(params), params)


OPTIMIZERS: dict[str, Callable[..., optax.GradientTransformation]] = {
    "adam": optax.adam,
    "adamw": optax.adamw,
    "adamax": optax.adamax,
    "adamaxw": optax.adamaxw,
    "nadam": optax.nadam,
    "nadamw": optax.nadamw,
    "rmsprop": optax.rmsprop,
    "adagrad": optax.adagrad,
    "sgd": _sgd,
    "lion": optax.lion,
    "adafactor": optax.adafactor,
    # consistent_rms: one learning rate, of AdamW's size, for kernels and the rest. Liu et al. 2025, 2502.16982, eq. 4
    "muon": functools.partial(
        optax.contrib.muon, muon_weight_dimension_numbers=_matrices, consistent_rms=0.2, weight_decay=0.0
    ),
}
_SHARES = ("b1", "b2", "beta", "decay", "decay_rate", "momentum", "adam_b1", "adam_b2")
_SIZES = (
    "eps", "eps_root", "weight_decay", "weight_decay_rate", "adam_weight_decay", "initial_accumulator_value",
    "initial_scale", "adam_eps_root", "adam_learning_rate", "clipping_threshold", "consistent_rms", "decay_offset",
)  # fmt: skip
GIVEN = ("learning_rate", "mask", "weight_decay_mask", "muon_weight_dimension_numbers")


def optimizer(
    name: str,
    learning_rate,
    clip: float | None = None,
    weight_decay_mask: str | Callable | Any = "kernels",
    **args,
) -> optax.GradientTransformation:
    """The named optimiser, with clipping of gradients before it and a mask for weight decay.

    Moments are kept and steps are made in float32 at least, also for parameters in half precision;
    `optax.apply_updates` rounds once, to the dtype of the parameters.

        adam, adamax, nadam         Kingma & Ba 2014, arXiv:1412.6980; Dozat 2016
        adamw, adamaxw, nadamw      the same with decoupled decay, Loshchilov & Hutter 2017, arXiv:1711.05101
        rmsprop, adagrad            Hinton 2012; Duchi, Hazan & Singer 2011
        sgd                         momentum, nesterov, and weight_decay, which is added to the gradient
        lion                        Chen et al. 2023, arXiv:2302.06675
        adafactor                   arXiv:1804.04235; weight_decay_rate is not multiplied by the learning rate
        muon                        Jordan 2024: orthogonal steps and weight_decay for kernels, NAdam and
                                    adam_weight_decay for all else

    Args:
        name: the optimiser's name, as above.
        learning_rate: a number, or a function of the step.
        clip: the largest global norm of the gradients, positive; None for no clipping.
        weight_decay_mask: "kernels" (see `kernels`), "all", a tree of bools like the parameters, or a function that
            makes one of them. Fixed arrays (see `fixed`) are never decayed.
        **args: the optimiser's own arguments, as in optax.

    Raises:
        ValueError: an unknown name, argument or mask, or a number out of its range.
    """
    make = _named("optimizer", OPTIMIZERS, name, args, given=GIVEN)
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is the largest gradient norm, positive; got {clip}")
    if isinstance(weight_decay_mask, str):
        weight_decay_mask = choose("weight_decay_mask", weight_decay_mask, MASKS)
    for argument, value in args.items():
        if not isinstance(value, (str, bool, int, float)):
            continue  # None, or what JAX traces
        if argument in _SHARES:
            _share(argument, value, below=True)
        elif argument in _SIZES and not (_is_number(value) and 0 <= value < math.inf):
            raise ValueError(f"{argument} must be a number, 0 or more; got {value!r}")
    takes = inspect.signature(make).parameters
    masks = {key: weight_decay_mask for key in ("mask", "weight_decay_mask") if key in takes}
    tx = make(learning_rate, **args, **masks)
    return _wide_and_without_fixed(tx if clip is None else optax.chain(_clip(clip), tx))


def _wide_and_without_fixed(tx: optax.GradientTransformation) -> optax.GradientTransformation:
    """`tx` computing in float32 at least, and given zeros in place of fixed arrays; its state is the same tree.

    In bfloat16 a moment with b2 = 0.999 never falls. A parameter that is 0 does not decay, whatever the masks are.
    """
    tx = optax.with_extra_args_support(tx)

    def update(grads, state, params=None, **extra):
        if params is not None:
            params = jax.tree.map(lambda skip, a: jnp.zeros_like(a) if skip else a, fixed(params), wide(params))
        return tx.update(wide(grads), state, params, **extra)

    return optax.GradientTransformationExtraArgs(lambda params: tx.init(wide(params)), update)


def _clip(most: float) -> optax.GradientTransformation:
    """g min(1, most / |g|): optax's clipping as one factor, which XLA folds into the moments instead of a pass."""

    def update(grads, state, params=None):
        del params
        scale = jnp.minimum(1.0, most / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)


# ---------------------------------------------------------------- arguments


def _named(kind: str, table: dict, name: str, args: dict, given: tuple):
    """`table[name]`, if that is there and takes `args` beside what is `given`."""
    make = choose(kind, name, table)
    check_arguments(f"{kind} {name!r}", make, args, given)
    return make


def _is_number(value) -> TypeGuard[int | float]:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _share(name: str, value, below: bool = False) -> float:
    if not _is_number(value) or not (0 <= value < 1 if below else 0 <= value <= 1):
        raise ValueError(f"{name} must be in [0, 1{')' if below else ']'}, got {value!r}")
    return value
