"""Optimisers and learning-rate schedules by name, over optax."""

import jax
import jax.numpy as jnp
import optax

LR_SCHEDULES = {
    "constant": lambda lr, steps: optax.constant_schedule(lr),
    "cosine": lambda lr, steps: optax.cosine_decay_schedule(lr, steps),
}
OPTIMIZERS = {"adam": optax.adam, "adamw": optax.adamw, "sgd": optax.sgd}


def lr_schedule(name: str, lr: float, steps: int, warmup_steps: int = 0) -> optax.Schedule:
    """The learning rate of each step: linear from 0 over `warmup_steps`, then the named decay until `steps`."""
    if name not in LR_SCHEDULES:
        raise ValueError(f"unknown learning-rate schedule {name!r}; one of {', '.join(LR_SCHEDULES)}")
    if lr <= 0 or warmup_steps < 0:
        raise ValueError(f"the learning rate must be positive and the warm-up 0 or more, got {lr} and {warmup_steps}")
    main = LR_SCHEDULES[name](lr, max(steps - warmup_steps, 1))
    if not warmup_steps:
        return main
    return optax.join_schedules([optax.linear_schedule(0.0, lr, warmup_steps), main], [warmup_steps])


def optimizer(name: str, learning_rate, clip: float | None = None, **args) -> optax.GradientTransformation:
    """The named optimiser, after clipping gradients to a global norm of `clip` if given; `args` go to optax."""
    if name not in OPTIMIZERS:
        raise ValueError(f"unknown optimizer {name!r}; one of {', '.join(OPTIMIZERS)}")
    if clip is not None and clip <= 0:
        raise ValueError(f"clip is the largest gradient norm, positive; got {clip}")
    tx = OPTIMIZERS[name](learning_rate, **args)
    return tx if clip is None else optax.chain(_clip(clip), tx)


def _clip(most: float) -> optax.GradientTransformation:
    """g min(1, most / |g|): optax's clipping as one factor, which XLA folds into the moments instead of a pass."""

    def update(grads, state, params=None):
        del params
        scale = jnp.minimum(1.0, most / optax.tree.norm(grads))
        return jax.tree.map(lambda g: g * scale.astype(g.dtype), grads), state

    return optax.GradientTransformation(optax.init_empty_state, update)
