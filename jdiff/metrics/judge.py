"""A classifier that judges samples: it tells their class, and gives features in which sets can be compared."""

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
    """A ResNet with its variables, for images (N, H, W, C) in the model's numbers."""

    model: ResNet
    variables: Any

    def look(self, x: np.ndarray, batch: int = 250) -> tuple[np.ndarray, np.ndarray]:
        """The likeliest class of each image, and its features.

        Args:
            x: images (N, H, W, C) in the model's numbers.
            batch: how many images the network gets at once.

        Returns:
            (labels (N,), features (N, D)); features are the input of the last layer.
        """

        @jax.jit
        def run(variables, x):
            logits, features = self.model.apply(variables, x), self.model.apply(variables, x, method="features")
            return logits.argmax(-1), features

        labels: list[np.ndarray] = []
        features: list[np.ndarray] = []
        for first in range(0, len(x), batch):
            part = np.asarray(x[first : first + batch], np.float32)
            whole = np.concatenate([part, np.zeros((batch - len(part), *part.shape[1:]), part.dtype)])
            for out, kept in zip(run(self.variables, whole), (labels, features), strict=True):
                kept.append(np.asarray(out)[: len(part)])
        return np.concatenate(labels), np.concatenate(features)


def fit_judge(data, steps: int = 1500, batch: int = 128, seed: int = 0, width: int = 16) -> Judge:
    """Train a ResNet-18 on the training split of a labelled data set, by AdamW with a cosine learning rate.

    Args:
        data: the data set, images with classes.
        steps: the number of training steps.
        batch: the images of a step.
        seed: the seed of parameters and order.
        width: the channels of the network's first stage.

    Raises:
        ValueError: the data set has no images, or no classes.
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
    """Write the variables of a judge as a .npz file.

    Raises:
        ValueError: the path does not end in .npz.
        OSError: the file could not be written; the message names it.
    """
    if Path(path).suffix != ".npz":
        raise ValueError(f"a judge is kept in a file NAME.npz, got {path}")
    params_file.write_params(path, judge.variables)


def load_judge(path, data, width: int = 16) -> Judge:
    """The judge that `save_judge` wrote.

    Args:
        path: the file.
        data: the data set whose images it judges.
        width: the width that it was trained with.

    Raises:
        CheckpointError: the file is missing, damaged, or of another width or data set.
    """
    model = _model(data, width)
    like = jax.eval_shape(model.init, jax.random.key(0), jnp.zeros((1, *data.shape)))
    return Judge(model, params_file.load_params(path, like))


def _model(data, width: int) -> ResNet:
    if not data.classes or not data.is_image:
        raise ValueError(f"{data.name} has no images with classes, of which a judge could learn")
    return ResNet(width=width, num_classes=data.classes)
