"""Training: the pure step, averages, optimisers, placement on devices, checkpoints."""

from jdiff.train import checkpoint, ema, optim, parallel, posthoc
from jdiff.train.checkpoint import CheckpointError, CheckpointWarning, restore, restore_ema, save
from jdiff.train.optim import lr_schedule, optimizer
from jdiff.train.params_file import load_params, write_params
from jdiff.train.step import (
    TrainState,
    accumulate,
    average,
    gradients,
    init_state,
    make_train_loop,
    make_train_step,
    mean_over_devices,
    value_and_grad,
)

__all__ = [
    "CheckpointError", "CheckpointWarning", "TrainState", "accumulate", "average", "checkpoint", "ema",
    "gradients", "init_state", "load_params", "lr_schedule", "make_train_loop", "make_train_step",
    "mean_over_devices", "optim", "optimizer", "parallel", "posthoc", "restore", "restore_ema", "save",
    "value_and_grad", "write_params",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
