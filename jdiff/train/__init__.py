"""Training: the pure step, averages, optimisers, placement on devices, checkpoints."""

from jdiff.train.step import TrainState, init_state, make_train_loop, make_train_step

__all__ = ["TrainState", "init_state", "make_train_loop", "make_train_step"]
