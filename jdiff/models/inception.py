"""InceptionV3, in whose features image models are compared: as torchvision has it, and with the pooling of the weights
that were ported from TensorFlow.
"""

from typing import Any, NamedTuple

import flax.linen as nn
import jax.numpy as jnp

from jdiff.models.norms import BatchNorm
from jdiff.models.registry import register_model


class Layer(NamedTuple):
    """A convolution with a batch norm and a relu, by its published name."""

    name: str
    features: int
    kernel: tuple[int, int] = (1, 1)
    stride: int = 1
    pad: tuple[int, int] = (0, 0)


def _square(name, features, kernel, pad=0, stride=1):
    return Layer(name, features, (kernel, kernel), stride, (pad, pad))


def _row(name, features, kernel):
    return Layer(name, features, (1, kernel), 1, (0, kernel // 2))


def _column(name, features, kernel):
    return Layer(name, features, (kernel, 1), 1, (kernel // 2, 0))


def _a(pool):
    double = Layer("branch3x3dbl_1", 64), _square("branch3x3dbl_2", 96, 3, 1), _square("branch3x3dbl_3", 96, 3, 1)
    five = Layer("branch5x5_1", 48), _square("branch5x5_2", 64, 5, 2)
    return (Layer("branch1x1", 64),), five, double, ("mean", Layer("branch_pool", pool))


def _b():
    double = Layer("branch3x3dbl_1", 64), _square("branch3x3dbl_2", 96, 3, 1), _square("branch3x3dbl_3", 96, 3, 0, 2)
    return (_square("branch3x3", 384, 3, 0, 2),), double, ("halve",)


def _c(n):
    seven = Layer("branch7x7_1", n), _row("branch7x7_2", n, 7), _column("branch7x7_3", 192, 7)
    double = (
        Layer("branch7x7dbl_1", n), _column("branch7x7dbl_2", n, 7), _row("branch7x7dbl_3", n, 7),
        _column("branch7x7dbl_4", n, 7), _row("branch7x7dbl_5", 192, 7),
    )  # fmt: skip
    return (Layer("branch1x1", 192),), seven, double, ("mean", Layer("branch_pool", 192))


def _d():
    seven = (
        Layer("branch7x7x3_1", 192), _row("branch7x7x3_2", 192, 7), _column("branch7x7x3_3", 192, 7),
        _square("branch7x7x3_4", 192, 3, 0, 2),
    )  # fmt: skip
    return (Layer("branch3x3_1", 192), _square("branch3x3_2", 320, 3, 0, 2)), seven, ("halve",)


def _e(pool):
    three = Layer("branch3x3_1", 384), (_row("branch3x3_2a", 384, 3), _column("branch3x3_2b", 384, 3))
    double = (
        Layer("branch3x3dbl_1", 448), _square("branch3x3dbl_2", 384, 3, 1),
        (_row("branch3x3dbl_3a", 384, 3), _column("branch3x3dbl_3b", 384, 3)),
    )  # fmt: skip
    return (Layer("branch1x1", 320),), three, double, (pool, Layer("branch_pool", 192))


STEM = (
    _square("Conv2d_1a_3x3", 32, 3, 0, 2), _square("Conv2d_2a_3x3", 32, 3), _square("Conv2d_2b_3x3", 64, 3, 1), "halve",
    Layer("Conv2d_3b_1x1", 80), _square("Conv2d_4a_3x3", 192, 3), "halve",
)  # fmt: skip
# each block's branches, whose outputs are joined; a branch is layers, poolings, and pairs of layers beside each other
BLOCKS = {
    "Mixed_5b": _a(32), "Mixed_5c": _a(64), "Mixed_5d": _a(64),
    "Mixed_6a": _b(), "Mixed_6b": _c(128), "Mixed_6c": _c(160), "Mixed_6d": _c(160), "Mixed_6e": _c(192),
    "Mixed_7a": _d(), "Mixed_7b": _e("mean"), "Mixed_7c": _e("last"),
}  # fmt: skip


class InceptionV3(nn.Module):
    """Class logits of images (B, H, W, 3) in [-1, 1], 75 pixels or more on a side; made for 299.

    Args:
        num_classes: the number of logits: 1000 of torchvision's weights, 1008 of those from TensorFlow.
        patched: whether the means within blocks leave out what lies beyond the edge, and the last block takes a maximum
            instead: so the weights from TensorFlow were trained, and the Frechet inception distance is defined.
        dtype: of convolutions and norms; None for float32.

    Reference: Szegedy et al. 2015, arXiv:1512.00567.
    """

    num_classes: int = 1008
    patched: bool = True
    dtype: Any = None

    @nn.compact
    def __call__(self, x, label=None, cond=None, train: bool = False, return_features: bool = False):
        """Classify images.

        Args:
            x: (B, H, W, 3) in [-1, 1].
            label: None; the network is told no noise level.
            cond: None; classes are what this network predicts.
            train: whether to use the statistics of the batch, with `mutable=["batch_stats"]`.
            return_features: whether to return what the last layer takes, the mean over positions.

        Returns:
            Logits (B, num_classes), or features (B, 2048).

        Raises:
            ValueError: for images that are too small or have other channels, noise labels and class labels.
        """
        if x.ndim != 4 or x.shape[-1] != 3 or min(x.shape[1:3]) < 75:
            raise ValueError(f"InceptionV3 takes images (B, H, W, 3) of 75 pixels or more, got {x.shape}")
        if label is not None or cond is not None:
            raise ValueError("InceptionV3 takes images alone; pass label=None and cond=None")
        x = self._branch(x, STEM, None, train)
        for name, branches in BLOCKS.items():
            x = jnp.concatenate([self._branch(x, branch, name, train) for branch in branches], -1)
        features = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
        return features if return_features else nn.Dense(self.num_classes, name="fc")(features)

    def features(self, x):
        """The mean over positions after the last block: `model.apply(variables, x, method="features")`."""
        return self(x, return_features=True)

    def _branch(self, x, branch, block, train):
        for step in branch:
            if isinstance(step, Layer):
                x = Convolution(step, self.dtype, name=step.name if block is None else f"{block}_{step.name}")(x, train)
            elif isinstance(step, str):
                x = _pool(x, step, self.patched)
            else:
                x = jnp.concatenate([self._branch(x, (layer,), block, train) for layer in step], -1)
        return x


class Convolution(nn.Module):
    """relu(norm(conv(x)))."""

    layer: Layer
    dtype: Any = None

    @nn.compact
    def __call__(self, x, train: bool = False):
        """x: (B, H, W, C)."""
        _, features, kernel, stride, pad = self.layer
        padding = [(p, p) for p in pad]
        x = nn.Conv(features, kernel, stride, padding, use_bias=False, dtype=self.dtype, name="conv")(x)
        return nn.relu(BatchNorm(epsilon=1e-3, dtype=self.dtype, name="bn")(x, train))


def _pool(x, kind, patched):
    if kind == "halve":
        return nn.max_pool(x, (3, 3), (2, 2))
    edge = ((1, 1), (1, 1))
    if kind == "last" and patched:
        return nn.max_pool(x, (3, 3), (1, 1), edge)
    return nn.avg_pool(x, (3, 3), (1, 1), edge, count_include_pad=not patched)


@register_model
def inception_v3(**overrides):
    """InceptionV3 with the pooling of the Frechet inception distance, 23.9M parameters."""
    return InceptionV3(**overrides)
