"""Residual networks for classification: ResNet-18, 34 and 50, with a noise level where the images are noisy.

As in torchvision, the stride of a bottleneck sits in its 3x3 convolution, and padding is symmetric: its weights fit
(`jdiff.convert`). With `noise=True` the network is told the noise level: the classifier of classifier guidance
(Dhariwal & Nichol 2021, arXiv:2105.05233, section 4).
"""

from typing import Any

import flax.linen as nn
import jax.numpy as jnp

from jdiff.core.names import choose
from jdiff.models.conv import Conv
from jdiff.models.embed import NoiseEmbedding, check_label
from jdiff.models.norms import BatchNorm
from jdiff.models.registry import Tag, register_model, register_tag

# name -> (kernel, stride, whether a 3x3 maximum at stride 2 follows)
STEMS = {"imagenet": (7, 2, True), "small": (3, 1, False)}


class ResNet(nn.Module):
    """Class logits of images (B, H, W, C) of any size, or of noisy ones.

    Args:
        depths: the blocks of each stage; each stage has twice the channels of the one before, at half the resolution.
        bottleneck: whether blocks have 1x1, 3x3 and 1x1 convolutions with four times the channels out.
        width: the channels of the first stage.
        num_classes: the number of logits.
        in_channels: C, or None for any.
        stem: "imagenet", 7x7 at stride 2 and a 3x3 maximum at stride 2, or "small", 3x3, for images of about 32x32.
        noise: whether the noise label is embedded and added in each block.
        label_scale: see `embed.NoiseEmbedding`.
        axis_name: of the devices whose batch statistics are joined in training, under pmap and shard_map.
        remat: whether each block is computed again in the backward pass.
        dtype: of convolutions and norms; None for float32. Parameters and logits are float32.

    Reference: He et al. 2015, arXiv:1512.03385.
    """

    depths: tuple[int, ...] = (2, 2, 2, 2)
    bottleneck: bool = False
    width: int = 64
    num_classes: int = 1000
    in_channels: int | None = None
    stem: str = "imagenet"
    noise: bool = False
    label_scale: float = 200.0
    axis_name: str | None = None
    remat: bool = False
    dtype: Any = None

    @nn.compact
    def __call__(self, x, label=None, cond=None, train: bool = False, return_features: bool = False):
        """Classify images.

        Args:
            x: (B, H, W, C).
            label: noise labels (B,), ignored unless `noise`.
            cond: None; classes are what this network predicts.
            train: whether to use the statistics of the batch, with `mutable=["batch_stats"]`.
            return_features: whether to return what the last layer takes, the mean over positions.

        Returns:
            Logits (B, num_classes), or features (B, width of the last stage).

        Raises:
            ValueError: for images of another rank, a missing label, and class labels.
        """
        self._check(x, label, cond)
        kernel, stride, pooled = choose("stem", self.stem, STEMS)
        embedding = None
        if self.noise:
            embedding = nn.silu(NoiseEmbedding(4 * self.width, self.label_scale, name="noise")(label))
        x = _conv(self.width, kernel, stride, self.dtype, "conv_in")(x)
        x = nn.relu(BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name="norm_in")(x, train))
        if pooled:
            x = nn.max_pool(x, (3, 3), (2, 2), ((1, 1), (1, 1)))
        make = nn.remat(Block, static_argnums=(3,)) if self.remat else Block
        for stage, depth in enumerate(self.depths):
            for i in range(depth):
                settings = (2 if stage and not i else 1, self.bottleneck, self.axis_name, self.dtype)
                block = make(self.width * 2**stage, *settings, name=f"stage_{stage}_{i}")
                x = block(x, embedding, train)
        features = x.astype(jnp.promote_types(x.dtype, jnp.float32)).mean((1, 2))
        return features if return_features else nn.Dense(self.num_classes, name="out")(features)

    def features(self, x, label=None, train: bool = False):
        """The mean over positions after the last stage: `model.apply(variables, x, label, method="features")`."""
        return self(x, label, None, train, return_features=True)

    def _check(self, x, label, cond) -> None:
        if x.ndim != 4:
            raise ValueError(f"a ResNet takes images (B, H, W, C), got {x.shape}")
        if self.in_channels not in (None, x.shape[-1]):
            raise ValueError(f"this ResNet takes images of {self.in_channels} channels, got {x.shape}")
        if self.noise:
            check_label(label, x.shape[0])
        if cond is not None:
            raise ValueError("a ResNet predicts classes and takes none; pass cond=None")


class Block(nn.Module):
    """relu(x + f(x)), where f is two 3x3 convolutions, or a bottleneck of 1x1, 3x3 and 1x1, each with a batch norm."""

    features: int
    stride: int = 1
    bottleneck: bool = False
    axis_name: str | None = None
    dtype: Any = None

    @nn.compact
    def __call__(self, x, embedding=None, train: bool = False):
        """x: (B, H, W, C), embedding: (B, E) or None, added after the first norm."""

        def layer(x, features, kernel, stride, name):
            x = _conv(features, kernel, stride, self.dtype, f"conv_{name}")(x)
            return BatchNorm(axis_name=self.axis_name, dtype=self.dtype, name=f"norm_{name}")(x, train)

        plan: tuple[tuple[int, int, int], ...]  # (features, kernel, stride) of each convolution
        if self.bottleneck:
            plan = ((self.features, 1, 1), (self.features, 3, self.stride), (4 * self.features, 1, 1))
        else:
            plan = ((self.features, 3, self.stride), (self.features, 3, 1))
        y = x
        for i, (features, kernel, stride) in enumerate(plan):
            y = layer(y, features, kernel, stride, str(i))
            if i == 0 and embedding is not None:
                y = y + nn.Dense(features, dtype=self.dtype, name="embed")(embedding)[:, None, None]
            if i < len(plan) - 1:
                y = nn.relu(y)
        if self.stride != 1 or x.shape[-1] != plan[-1][0]:
            x = layer(x, plan[-1][0], 1, self.stride, "skip")
        return nn.relu(x + y)


def _conv(features: int, kernel: int, stride: int, dtype: Any, name: str) -> Conv:
    """A convolution without bias, initialised as in He et al. 2015, arXiv:1502.01852, by the fan out."""
    return Conv(
        features, kernel, stride, dtype=dtype, padding=(kernel // 2, kernel // 2), use_bias=False,
        kernel_init="kaiming_out", name=name,
    )  # fmt: skip


@register_model
def resnet18(**overrides):
    """ResNet-18 for ImageNet, 11.7M parameters."""
    return ResNet(**overrides)


@register_model
def resnet34(**overrides):
    """ResNet-34 for ImageNet, 21.8M parameters."""
    return ResNet(**dict(depths=(3, 4, 6, 3)) | overrides)


@register_model
def resnet50(**overrides):
    """ResNet-50 for ImageNet, 25.6M parameters."""
    return ResNet(**dict(depths=(3, 4, 6, 3), bottleneck=True) | overrides)


@register_model
def resnet_small(**overrides):
    """A ResNet-18 of half the width for noisy images of about 28x28 or 32x32: 2.9M parameters, ten classes."""
    return ResNet(**dict(width=32, num_classes=10, stem="small", noise=True) | overrides)


_PUBLISHED = {
    "resnet18": ("f37072fd", 11_689_512), "resnet34": ("b627a593", 21_797_672), "resnet50": ("0676ba61", 25_557_032),
}  # fmt: skip
for _name, (_hash, _count) in _PUBLISHED.items():
    register_tag(Tag(
        _name, "imagenet1k_v1", dict(in_channels=3), url=f"https://download.pytorch.org/models/{_name}-{_hash}.pth",
        license="BSD-3-Clause (torchvision)", parameters=_count, shape=(224, 224, 3), architecture="resnet",
        mean=(0.485, 0.456, 0.406), std=(0.229, 0.224, 0.225),
    ))  # fmt: skip
