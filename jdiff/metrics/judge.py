"""A classifier that judges samples: whether they show the class asked for, and features in which to compare them."""

import dataclasses
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
import optax

from jdiff.core.keys import as_key
from jdiff.models import ResNet
from jdiff.train import optim, params_file
from jdiff.train.step import init_state, make_train_loop, make_train_step


@dataclasses.dataclass(frozen=True)
class Judge:
    """A ResNet with its variables, for images in the model's numbers, (N, H, W, C)."""

    model: ResNet
    variables: Any

    def look(self, x: np.ndarray, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
        """(labels (N,), features (N, D)): the likeliest class, and what the last layer sees."""
        run = jax.jit(lambda v, x: (self.model.apply(v, x).argmax(-1), self.model.apply(v, x, method="features")))
        labels, features = [], []
        for first in range(0, len(x), batch):
            part = np.asarray(x[first : first + batch], np.float32)
            whole = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
            for out, kept in zip(run(self.variables, whole), (labels, features), strict=True):
                kept.append(np.asarray(out)[: len(part)])
        return np.concatenate(labels), np.concatenate(features)


def fit_judge(data, steps: int = 1500, batch: int = 128, seed: int = 0, width: int = 16) -> Judge:
    """A ResNet-18 of `width` trained on a labelled data set's training split: AdamW, the rate falling to 0.

    Raises ValueError for a data set without classes.
    """
    model = _model(data, width)
    variables = jax.jit(model.init)(jax.random.key(seed), jnp.zeros((1, *data.shape)))
    tx = optim.optimizer("adamw", optim.lr_schedule("cosine", 2e-3, steps, steps // 10), weight_decay=1e-2)

    def loss(params, key, x, labels, extra):
        del key
        logits, new = model.apply({"params": params, **extra}, x, train=True, mutable=["batch_stats"])
        each = optax.softmax_cross_entropy_with_integer_labels(logits, labels)
        return each.mean(), dict(each=each, extra=new)

    def take(arrays, j):
        return data.to_model(arrays[0][j]), arrays[1][j]

    params = variables.pop("params")
    state, loop = init_state(params, tx, variables), make_train_loop(make_train_step(loss, tx, 0.99), take)
    loop, visit, key = jax.jit(loop, donate_argnums=0), 50, as_key(jax.random.key(seed))
    visits = [(start, min(visit, steps - start)) for start in range(0, steps, visit)]
    for (_, count), chunk in zip(visits, data.read(seed, batch, visits), strict=True):
        arrays = [np.concatenate([a, np.zeros((visit - count, *a.shape[1:]), a.dtype)]) for a in chunk[:2]]
        state, _ = loop(state, key, arrays, np.arange(visit), count)
    return Judge(model, {"params": state.params, **state.extra})


def save_judge(path, judge: Judge) -> None:
    """Write a judge's variables as .npz. Raises ValueError for another name, OSError naming the path if that fails."""
    if Path(path).suffix != ".npz":
        raise ValueError(f"a judge is kept in a file NAME.npz, got {path}")
    params_file.write_params(path, judge.variables)


def load_judge(path, data, width: int = 16) -> Judge:
    """The judge that `save_judge` wrote. Raises CheckpointError if it is missing, damaged or of other data."""
    model = _model(data, width)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *data.shape)))
    return Judge(model, params_file.load_params(path, like))


def _model(data, width: int) -> ResNet:
    if not data.classes or not data.is_image:
        raise ValueError(f"{data.name} has no images with classes, of which a judge could learn")
    return ResNet(width=width, num_classes=data.classes)
