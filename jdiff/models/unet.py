"""The UNets of the field from one core: residual blocks at falling and rising resolution, joined by skips.

A network is a list of stages, each a `Part`. `UNet.encoder`, `UNet.middle` and `UNet.decoder` write them down from the
fields; `UNet.__call__` runs them, and the converters of published weights read them.
"""

import math
from typing import Any, NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp

from jdiff.models.attention import SelfAttention, check_levels
from jdiff.models.conv import Conv
from jdiff.models.embed import (
    ClassEmbedding,
    NoiseEmbedding,
    as_float,
    check_inside,
    check_label,
    check_unconditional,
    nan_outside,
)
from jdiff.models.inits import scaled_init
from jdiff.models.norms import AdaptiveGroupNorm, GroupNorm
from jdiff.models.resample import downsample, upsample
from jdiff.models.transformer import check_known


class Part(NamedTuple):
    """One stage.

    Args:
        name: among the variables.
        level: the level on which it works.
        features: its output channels.
        attention: whether self-attention follows its block.
        resample: "down" or "up" where it changes the resolution, else "".
    """

    name: str
    level: int
    features: int
    attention: bool = False
    resample: str = ""


class ResBlock(nn.Module):
    """skip_scale (x + conv(silu(norm(conv(silu(norm(x))))))), where the second norm is told the embedding.

    Args:
        features: the output channels.
        dropout: the rate of dropout before the last convolution, in training.
        dtype: of convolutions; None for that of x.
        adaptive: whether the embedding scales and shifts the second norm (ADM) or is added before it (DDPM).
        skip_scale: what the sum is multiplied by.
        norm: `groups`, `min_width` and `epsilon` of the norms.
        resample: "down" or "up": both branches change the resolution, after the first norm; "" for neither.
        filter: by which they do.
        project: whether x goes through a 1x1 convolution also where only the resolution changes.
        kernel_init: the law of initial kernels, see `inits.scaled_init`.
        out_scale: times the initial variance of the last convolution.
    """

    features: int
    dropout: float = 0.0
    dtype: Any = None
    adaptive: bool = True
    skip_scale: float = 1.0
    norm: tuple[int, int, float] = (32, 4, 1e-5)
    resample: str = ""
    filter: tuple[float, ...] = (1, 1)
    project: bool = False
    kernel_init: str = "xavier"
    out_scale: float = 0.0

    @nn.compact
    def __call__(self, x, embedding, train: bool):
        """x: (B, *sizes, C), embedding: (B, E) -> (B, *sizes', features)."""
        y = GroupNorm(*self.norm, activation=nn.silu, name="norm_0")(x)
        if self.resample:
            change = downsample if self.resample == "down" else upsample
            x, y = change(x, self.filter), change(y, self.filter)
        y = Conv(self.features, dtype=self.dtype, kernel_init=self.kernel_init, name="conv_0")(y)
        if self.adaptive:
            norm = AdaptiveGroupNorm(*self.norm, kernel_init=self.kernel_init, activation=nn.silu, name="norm_1")
            y = norm(y, embedding)
        else:
            dense = nn.Dense(self.features, kernel_init=scaled_init(1.0, self.kernel_init), name="shift")
            shift = dense(nn.silu(embedding)).reshape(x.shape[0], *(1,) * (x.ndim - 2), -1)
            y = GroupNorm(*self.norm, activation=nn.silu, name="norm_1")(y + shift.astype(y.dtype))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = Conv(self.features, scale=self.out_scale, dtype=self.dtype, kernel_init=self.kernel_init, name="conv_1")(y)
        if x.shape[-1] != self.features or (self.resample and self.project):
            x = Conv(self.features, kernel=1, dtype=self.dtype, kernel_init=self.kernel_init, name="skip")(x)
        return self.skip_scale * (x + y) if self.skip_scale != 1 else x + y


class UNet(nn.Module):
    """A UNet for signals (B, *sizes, C) of 1, 2 or 3 dimensions and any number of channels.

    The sizes must be multiples of 2^(levels - 1), levels being the length of `multipliers`. Parameters, norms and the
    output are float32 whatever `dtype` is.

    Args:
        channels: the width that `multipliers` multiply; the embedding of the noise level has four times as many.
        multipliers: the channels of each level over `channels`; the resolution halves from one level to the next.
        blocks: residual blocks of each level on the way down; there is one more on the way up.
        attention: the levels with self-attention, 0 being full resolution.
        heads: attention heads, where `head_channels` is 0.
        num_classes: 0 for an unconditional network; else `cond` holds labels in 0..num_classes.
        dropout: the rate of dropout inside residual blocks, in training.
        label_scale: what the noise label is multiplied by, to bring it to hundreds of radians.
        out_multiplier: output over input channels: 2 with learned variance, 1/2 where an earlier estimate stands
            beside x.
        dtype: of convolutions, dense layers and attention; None for that of the input.
        head_channels: the channels of each attention head; 0 leaves their number to `heads`.
        decoder_attention: on the way up attention follows "each" block of its level, or the "last".
        middle_attention: whether the middle has attention; None: if the last level has it.
        adaptive: whether the embedding scales and shifts the second norm of a block (ADM) or is added before it (DDPM).
        skip_scale: what the sum of a block and its input is multiplied by.
        groups: the largest number of groups of a norm.
        min_group_width: the smallest number of channels of a group.
        epsilon: what is added to the variance in a norm.
        resample: "mean" (means of pairs; nearest with a convolution), "conv" (strided convolutions; nearest with a
            convolution) or "block" (inside residual blocks, by `filter`).
        conv_padding: the zeros before and after each dimension in the strided convolutions of "conv".
        filter: the filter along each dimension by which "block" and the pyramids resample.
        project: whether a block that resamples has a 1x1 convolution beside it though its channels stay.
        pyramid_in: "", "skip" or "residual": how the input, brought down to each level, is joined to the way down.
        pyramid_out: "" or "skip": whether each level adds to the output itself.
        wave_multiplier: the sinusoids of the noise label over `channels`.
        endpoint: whether the lowest frequency of the sinusoids is 1/10,000 itself, see `embed.sinusoidal`.
        fourier: the standard deviation of random frequencies; 0 for the fixed sinusoids.
        class_at: class vectors are added to the "embedding" of the noise level, or to its "waves".
        null_class: whether the label num_classes (or None) is "no class"; if not, every sample has a class.
        augment_dim: the length of augmentation labels (B, augment_dim); 0 for none.
        kernel_init: the law of initial kernels, see `inits.scaled_init`.
        out_scale: times the initial variance of the last convolution of each block, and of the network.
        qkv_scale: times the initial variance of queries, keys and values.
        remat: whether each block is computed again in the backward pass instead of keeping its inside.
        first_channels: the channels of the first convolution; 0 for `channels`.
        fused: whether half precision may run in cuDNN's attention, see `transformer.attend`.
        perturbed: the stages in whose attention each position attends to itself alone, as ("middle_0",).
        skipped: the stages that are left out, as ("down_2_1",), of those that keep size and width. Both make a
            worse network of the same parameters, for guidance.

    Reference: DDPM, Ho et al. 2020, arXiv:2006.11239, appendix B; DDPM++ and NCSN++, Song et al. 2021,
    arXiv:2011.13456, appendix H; ADM, Dhariwal & Nichol 2021, arXiv:2105.05233, section 3.
    """

    channels: int = 64
    multipliers: tuple[float, ...] = (1, 2, 2)
    blocks: int = 2
    attention: tuple[int, ...] = (1,)
    heads: int = 4
    num_classes: int = 0
    dropout: float = 0.0
    label_scale: float = 200.0
    out_multiplier: float = 1
    dtype: Any = None
    head_channels: int = 0
    decoder_attention: str = "each"
    middle_attention: bool | None = None
    adaptive: bool = True
    skip_scale: float = 1.0
    groups: int = 32
    min_group_width: int = 4
    epsilon: float = 1e-5
    resample: str = "mean"
    conv_padding: tuple[int, int] = (1, 1)
    filter: tuple[float, ...] = (1, 1)
    project: bool = False
    pyramid_in: str = ""
    pyramid_out: str = ""
    wave_multiplier: int = 2
    endpoint: bool = False
    fourier: float = 0.0
    class_at: str = "embedding"
    null_class: bool = True
    augment_dim: int = 0
    kernel_init: str = "xavier"
    out_scale: float = 0.0
    qkv_scale: float = 1.0
    remat: bool = False
    first_channels: int = 0
    fused: bool = True
    perturbed: tuple[str, ...] = ()
    skipped: tuple[str, ...] = ()

    @property
    def depth(self) -> int:
        """The number of levels."""
        return len(self.multipliers)

    def encoder(self) -> list[Part]:
        """The stages on the way down; the output of each is kept for the way up, beside that of the first layer."""
        parts = []
        for level, times in enumerate(self.multipliers):
            width, attention = int(self.channels * times), level in self.attention
            parts += [Part(f"down_{level}_{i}", level, width, attention) for i in range(self.blocks)]
            if level < self.depth - 1:
                parts.append(Part(f"downsample_{level}", level, width, resample="down"))
        return parts

    def middle(self) -> list[Part]:
        """The two stages at the lowest resolution."""
        level = self.depth - 1
        width = int(self.channels * self.multipliers[level])
        attention = level in self.attention if self.middle_attention is None else self.middle_attention
        return [Part("middle_0", level, width, attention), Part("middle_1", level, width)]

    def decoder(self) -> list[Part]:
        """The stages on the way up; each that does not resample takes the newest kept output."""
        parts = []
        for level in reversed(range(self.depth)):
            width = int(self.channels * self.multipliers[level])
            for i in range(self.blocks + 1):
                attention = level in self.attention and (self.decoder_attention == "each" or i == self.blocks)
                parts.append(Part(f"up_{level}_{i}", level, width, attention))
            if level:
                parts.append(Part(f"upsample_{level}", level, width, resample="up"))
        return parts

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False, augment=None):
        """Run the network.

        Args:
            x: (B, *sizes, C).
            label: noise labels (B,).
            cond: class labels (B,), or None.
            train: whether dropout is active, which needs a key named "dropout".
            augment: augmentation labels (B, augment_dim), or None for zeros.

        Returns:
            F, (B, *sizes, C out_multiplier).

        Raises:
            ValueError: for fields, sizes and labels that do not fit.
        """
        self._check(x, label, augment)
        out_channels = int(x.shape[-1] * self.out_multiplier)
        embedding = self._embedding(x.shape[0], label, cond, augment)
        h = self._conv("in", self.first_channels or self.channels)(x)
        kept, image = [h], x
        for part in self.encoder():
            h = self._run(part, h, embedding, train)
            if part.resample and self.pyramid_in:
                h, image = self._join(part, h, image)
            kept.append(h)
        for part in self.middle():
            h = self._run(part, h, embedding, train)
        image = None
        for part in self.decoder():
            if part.resample and self.pyramid_out:
                image = self._emit(f"pyramid_out_{part.level}", h, image, out_channels)
            h = h if part.resample else jnp.concatenate([h, kept.pop()], axis=-1)
            h = self._run(part, h, embedding, train)
        return self._emit("out", h, image, out_channels)

    def _embedding(self, batch: int, label, cond, augment):
        """What all blocks are told about noise level, class and augmentation, (B, 4 channels)."""
        width = 4 * self.channels
        waves = self.channels * self.wave_multiplier
        beside, after = None, 0.0
        if self.num_classes:
            size = waves if self.class_at == "waves" else width
            # at the waves it is, as in EDM, xavier's law for a layer of one-hot labels times sqrt(num_classes)
            std = math.sqrt(2 * self.num_classes / (self.num_classes + waves)) if self.class_at == "waves" else 1.0
            classes = ClassEmbedding(self.num_classes, size, std, self.null_class, name="class")(cond, batch)
            beside, after = (classes, 0.0) if self.class_at == "waves" else (None, classes)
        else:
            check_unconditional(cond)
        if self.augment_dim:
            augment = jnp.zeros((batch, self.augment_dim)) if augment is None else augment
            init = scaled_init(1.0, self.kernel_init)
            augment = nn.Dense(waves, use_bias=False, kernel_init=init, name="augment")(augment)
            beside = augment if beside is None else beside + augment
        noise = (self.label_scale, waves, self.endpoint, self.fourier, self.kernel_init)
        return NoiseEmbedding(width, *noise, name="noise")(label, beside) + after

    def _run(self, part: Part, h, embedding, train: bool):
        """One stage, (B, *sizes, C) -> (B, *sizes', part.features)."""
        if part.name in self.skipped:
            if part.resample or h.shape[-1] != part.features:
                raise ValueError(f"UNet: {part.name} changes the size or the width of its input and cannot be skipped")
            return h
        if part.resample and self.resample != "block":
            if part.resample == "up":
                return self._conv(part.name, part.features)(upsample(h))
            if self.resample == "mean":
                return downsample(h)
            return self._conv(part.name, part.features, stride=2, padding=self.conv_padding)(h)
        block, attend = ResBlock, SelfAttention
        if self.remat:
            block, attend = nn.remat(ResBlock, static_argnums=(3,)), nn.remat(SelfAttention)
        shared: dict[str, Any] = dict(dtype=self.dtype, norm=self._norm, skip_scale=self.skip_scale)
        shared |= dict(kernel_init=self.kernel_init, out_scale=self.out_scale)
        resampling: dict[str, Any] = dict(resample=part.resample, filter=self.filter, project=self.project)
        kind: dict[str, Any] = dict(adaptive=self.adaptive, dropout=self.dropout)
        h = block(part.features, name=part.name, **kind, **resampling, **shared)(h, embedding, train)
        if part.attention:
            if self.head_channels and part.features % self.head_channels:
                raise ValueError(f"UNet: {part.features} channels do not divide into heads of {self.head_channels}")
            heads = part.features // self.head_channels if self.head_channels else self.heads
            name = f"{part.name}_attention"
            own: dict[str, Any] = dict(fused=self.fused, alone=part.name in self.perturbed, name=name)
            h = attend(heads, qkv_scale=self.qkv_scale, **own, **shared)(h)
        return h

    def _join(self, part: Part, h, image):
        """(h, image) with the input's pyramid, brought down to the size of h, added to it."""
        name = f"pyramid_in_{part.level}"
        if self.pyramid_in == "skip":
            image = downsample(image, self.filter)
            return h + self._conv(name, part.features, kernel=1)(image), image
        pad = 1 + (len(self.filter) - 1) // 2  # of the convolution and of the filter: zeros are added once for both
        image = downsample(self._conv(name, part.features, padding=(pad, pad))(image), self.filter, pad=0)
        h = self.skip_scale * (h + image)
        return h, h

    def _emit(self, name: str, h, image, channels: int):
        """What a level adds to the output, plus the doubled output of the levels below it if there is one."""
        y = GroupNorm(*self._norm, activation=nn.silu, name=f"norm_{name}")(h)
        y = self._conv(name, channels, scale=self.out_scale, dtype=None)(y)
        return y if image is None else upsample(image, self.filter) + y

    @property
    def _norm(self) -> tuple[int, int, float]:
        return self.groups, self.min_group_width, self.epsilon

    def _conv(self, name: str, features: int, **settings):
        return Conv(features, name=name, **dict(dtype=self.dtype, kernel_init=self.kernel_init) | settings)

    def _check(self, x, label, augment) -> None:
        choices = {
            "resample": ("mean", "conv", "block"), "decoder_attention": ("each", "last"),
            "pyramid_in": ("", "skip", "residual"), "pyramid_out": ("", "skip"), "class_at": ("embedding", "waves"),
        }  # fmt: skip
        for field, valid in choices.items():
            if getattr(self, field) not in valid:
                raise ValueError(f"UNet: {field} is one of {', '.join(map(repr, valid))}, got {getattr(self, field)!r}")
        if not 3 <= x.ndim <= 5:
            raise ValueError(f"a UNet takes signals (B, *sizes, C) of 1, 2 or 3 dimensions, got {x.shape}")
        check_levels(self.attention, self.depth)
        stages = [*self.encoder(), *self.middle(), *self.decoder()]
        check_known("UNet", [part.name for part in stages], skipped=self.skipped)
        check_known("UNet", [part.name for part in stages if part.attention], perturbed=self.perturbed)
        check_label(label, x.shape[0])
        if augment is not None and jnp.shape(augment) != (x.shape[0], self.augment_dim):
            raise ValueError(
                f"augmentation labels are ({x.shape[0]}, augment_dim={self.augment_dim}), got {jnp.shape(augment)}; "
                "a network trained with augmentation needs the augment_dim of its labels"
            )
        unit = 2 ** (self.depth - 1)
        if any(size % unit for size in x.shape[1:-1]):
            raise ValueError(
                f"a UNet of {self.depth} levels needs sizes that are multiples of {unit}, got "
                f"{'x'.join(map(str, x.shape[1:-1]))}; pad the signal or use fewer multipliers"
            )


class InSigma(nn.Module):
    """A network whose noise label is sigma and whose output is a score: net(x, log sigma) / sigma.

    Args:
        net: the network inside.
        centered: whether data lie in [-1, 1]; if not, in [0, 1], and the network is shown 2x - 1.
        levels: the length of a table of sigmas, the largest first; the noise label is then an index k into it, and the
            output net(x, k) / sigmas[k]. 0 for none.

    Reference: NCSN++ and DDPM of the variance-exploding process, Song et al. 2021, arXiv:2011.13456, appendix H.
    """

    net: nn.Module
    centered: bool = True
    levels: int = 0

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False, augment=None):
        """x: (B, *sizes, C); label: (B,); the rest as the network inside takes it; returns an array like x."""
        sigma, shown = label, x if self.centered else 2 * x - 1
        if self.levels:
            # a parameter that no gradient reaches, as in FourierFeatures; its initial values are those for CIFAR-10
            sigmas = self.param("sigmas", lambda key: jnp.geomspace(50, 0.01, self.levels, dtype=jnp.float32))
            k = as_float(label)
            check_inside("noise labels", k, self.levels)
            sigma = nan_outside(k, self.levels, jax.lax.stop_gradient(sigmas)[k.astype(int)])
        y = self.net(shown, label if self.levels else jnp.log(sigma), cond, train, augment)
        return y / sigma.reshape(-1, *(1,) * (x.ndim - 1)).astype(y.dtype)
