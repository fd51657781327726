"""The UNets of the field from one core: residual blocks at falling and rising resolution, joined by skips.

DDPM: Ho et al. 2020, arXiv:2006.11239, appendix B. DDPM++ and NCSN++: Song et al. 2021, arXiv:2011.13456, appendix H.
ADM: Dhariwal & Nichol 2021, arXiv:2105.05233, section 3. A network is a list of `Part`s, which `UNet.encoder`,
`middle` and `decoder` write down from its settings; `__call__` runs them, and conversions of weights read them.
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
from jdiff.models.registry import register_model, register_tag
from jdiff.models.resample import downsample, upsample


class Part(NamedTuple):
    """One stage: its name among the variables, the level it works on, its output channels, and what belongs to it."""

    name: str
    level: int
    features: int
    attention: bool = False
    resample: str = ""  # "down" or "up": from this level to the next


class ResBlock(nn.Module):
    """skip_scale (x + conv(silu(norm(conv(silu(norm(x))) given the embedding)))), resampled after the first norm.

    `adaptive`: the embedding scales and shifts the second norm (ADM), else it is added before it (DDPM). `resample`:
    "", "down" or "up", by `filter`, of both branches; `project`: a 1x1 convolution of x also where only the size
    changes. The last convolution starts at `out_scale` times its usual variance.
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
            shift = nn.Dense(self.features, kernel_init=scaled_init(1.0, self.kernel_init), name="shift")
            shift = shift(nn.silu(embedding)).reshape(len(x), *(1,) * (x.ndim - 2), -1)
            y = GroupNorm(*self.norm, activation=nn.silu, name="norm_1")(y + shift.astype(y.dtype))
        y = nn.Dropout(self.dropout, deterministic=not train)(y)
        y = Conv(self.features, scale=self.out_scale, dtype=self.dtype, kernel_init=self.kernel_init, name="conv_1")(y)
        if x.shape[-1] != self.features or (self.resample and self.project):
            x = Conv(self.features, kernel=1, dtype=self.dtype, kernel_init=self.kernel_init, name="skip")(x)
        return self.skip_scale * (x + y) if self.skip_scale != 1 else x + y


class UNet(nn.Module):
    """A UNet for signals (B, *sizes, C) of 1, 2 or 3 dimensions and any channels; sizes: multiples of 2^(levels - 1).

    Shape: `multipliers` are the channels of each level over `channels`, the resolution halving from one to the next,
    each with `blocks` residual blocks (one more on the way up), after a convolution to `first_channels` (0:
    `channels`); `attention` lists the levels (0 is full resolution) with self-attention, on the way up after
    `decoder_attention` "each" block or the "last", and in the middle if `middle_attention` (None: if the last level
    has it), with `heads`, or `head_channels` a head.
    Classes: `num_classes` of 0 is unconditional; else `cond` holds labels in 0..num_classes, num_classes (or None)
    being "no class", unless `null_class` is False. `class_at`: their vectors are added to the "embedding" of the noise
    level or to its "waves". `augment_dim` > 0 takes augmentation labels (B, augment_dim) beside.
    Resampling: "mean" (mean of 2x2, and nearest with a convolution), "conv" (strided convolutions of `conv_padding`,
    and the same) or "block" (inside residual blocks, by `filter`, with `project`). `pyramid_in`: "", "skip" or
    "residual", `pyramid_out`: "" or "skip": image pyramids beside the main path.
    Numbers: `adaptive`, `skip_scale`, `groups`, `min_group_width` and `epsilon` are the blocks'; `label_scale`,
    `wave_multiplier`, `endpoint`, `fourier` those of the noise embedding; `kernel_init` is the law of initial values,
    the last convolutions starting at `out_scale` of its variance and queries, keys and values at `qkv_scale`.
    `out_multiplier` 2 gives a network with learned variance, 1/2 one that sees an earlier estimate beside x.
    Parameters, norms and output are float32, convolutions in `dtype`; `remat` computes each block again in the backward
    pass instead of keeping its inside; `fused`: see `transformer.attend`.
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

    @property
    def depth(self) -> int:
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
        """x: (B, *sizes, C); label: (B,); cond: (B,) or None; returns F, (B, *sizes, C out_multiplier)."""
        self._check(x, label, augment)
        out_channels = int(x.shape[-1] * self.out_multiplier)
        embedding = self._embedding(len(x), label, cond, augment)
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
        """What all blocks are told: (B,), labels and augmentations -> (B, 4 channels)."""
        width = 4 * self.channels
        waves = self.channels * self.wave_multiplier
        beside, after = None, 0.0
        if self.num_classes:
            size = waves if self.class_at == "waves" else width
            # beside the waves: xavier's layer of one-hot labels times sqrt(num_classes), as EDM has it
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
        if part.resample and self.resample != "block":
            if part.resample == "up":
                return self._conv(part.name, part.features)(upsample(h))
            if self.resample == "mean":
                return downsample(h)
            return self._conv(part.name, part.features, stride=2, padding=self.conv_padding)(h)
        block, attend = ResBlock, SelfAttention
        if self.remat:
            block, attend = nn.remat(ResBlock, static_argnums=(3,)), nn.remat(SelfAttention)
        shared = dict(dtype=self.dtype, norm=self._norm, skip_scale=self.skip_scale)
        shared |= dict(kernel_init=self.kernel_init, out_scale=self.out_scale)
        resampling = dict(resample=part.resample, filter=self.filter, project=self.project)
        kind = dict(adaptive=self.adaptive, dropout=self.dropout)
        h = block(part.features, name=part.name, **kind, **resampling, **shared)(h, embedding, train)
        if part.attention:
            if self.head_channels and part.features % self.head_channels:
                raise ValueError(f"UNet: {part.features} channels do not divide into heads of {self.head_channels}")
            heads = part.features // self.head_channels if self.head_channels else self.heads
            attention = dict(qkv_scale=self.qkv_scale, fused=self.fused, name=f"{part.name}_attention")
            h = attend(heads, **attention, **shared)(h)
        return h

    def _join(self, part: Part, h, image):
        """(h, image) with the input's pyramid, brought down to the size of h, added to it."""
        name = f"pyramid_in_{part.level}"
        if self.pyramid_in == "skip":
            image = downsample(image, self.filter)
            return h + self._conv(name, part.features, kernel=1)(image), image
        pad = 1 + (len(self.filter) - 1) // 2  # the convolution's and the filter's: zeros are put around once
        image = downsample(self._conv(name, part.features, padding=(pad, pad))(image), self.filter, pad=0)
        h = self.skip_scale * (h + image)
        return h, h

    def _emit(self, name: str, h, image, channels: int):
        """What a level adds to the output, and the output of the levels below it, doubled, if there is one."""
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
        check_label(label, len(x))
        if augment is not None and jnp.shape(augment) != (len(x), self.augment_dim):
            raise ValueError(
                f"augmentation labels are ({len(x)}, augment_dim={self.augment_dim}), got {jnp.shape(augment)}; "
                "a network trained with augmentation needs the augment_dim of its labels"
            )
        unit = 2 ** (self.depth - 1)
        if any(size % unit for size in x.shape[1:-1]):
            raise ValueError(
                f"a UNet of {self.depth} levels needs sizes that are multiples of {unit}, got "
                f"{'x'.join(map(str, x.shape[1:-1]))}; pad the signal or use fewer multipliers"
            )


class InSigma(nn.Module):
    """A network whose noise label is sigma and whose output is in units of 1/sigma: net(x, log sigma) / sigma.

    With `levels` the label is an index into a table of so many sigmas: net(x, k) / sigmas[k], sigmas[0] the largest.
    With `centered` False the network sees 2x - 1, for data in [0, 1]. The NCSN++ of arXiv:2011.13456, appendix H:
    the output is the score of the variance-exploding process.
    """

    net: nn.Module
    centered: bool = True
    levels: int = 0

    @nn.compact
    def __call__(self, x, label, cond=None, train: bool = False, augment=None):
        sigma, shown = label, x if self.centered else 2 * x - 1
        if self.levels:
            # a parameter that no gradient reaches, as in FourierFeatures; it starts as CIFAR-10's
            sigmas = self.param("sigmas", lambda key: jnp.geomspace(50, 0.01, self.levels, dtype=jnp.float32))
            k = as_float(label)
            check_inside("noise labels", k, self.levels)
            sigma = nan_outside(k, self.levels, jax.lax.stop_gradient(sigmas)[k.astype(int)])
        y = self.net(shown, label if self.levels else jnp.log(sigma), cond, train, augment)
        return y / sigma.reshape(-1, *(1,) * (x.ndim - 1)).astype(y.dtype)


@register_model
def unet(**overrides):
    """The UNet with its defaults: 64 channels, three levels, attention at the second."""
    return UNet(**overrides)


@register_model
def unet_digits(**overrides):
    """A UNet for 8x8 images of ten classes: 0.75M parameters, attention at 4x4."""
    defaults = dict(channels=32, multipliers=(1, 2), blocks=1, attention=(1,), heads=4, num_classes=10)
    return UNet(**defaults | overrides)


@register_model
def ddpm_cifar10(**overrides):
    """DDPM for 32x32 images, 35.7M parameters: Ho et al. 2020, arXiv:2006.11239, appendix B. Labels are 0 to 999."""
    defaults = dict(channels=128, multipliers=(1, 2, 2, 2), blocks=2, attention=(1,), dropout=0.1)
    return UNet(**DDPM | defaults | overrides)


@register_model
def ddpm_256(**overrides):
    """DDPM for 256x256 images, 113.7M parameters: Ho et al. 2020, arXiv:2006.11239, appendix B. Labels are 0 to 999."""
    defaults = dict(channels=128, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(4,), conv_padding=(0, 1))
    return UNet(**DDPM | defaults | overrides)


@register_model
def ddpmpp_cifar10(**overrides):
    """DDPM++ for 32x32 images, 55.7M parameters: Song et al. 2021 with the settings of Karras et al. 2022, table 7."""
    defaults = dict(channels=128, multipliers=(2, 2, 2), blocks=4, attention=(1,), dropout=0.13)
    return UNet(**SONG | defaults | overrides)


@register_model
def ncsnpp_cifar10(**overrides):
    """NCSN++ for 32x32 images, 56.4M parameters: Song et al. 2021 with the settings of Karras et al. 2022, table 7."""
    return ddpmpp_cifar10(**NCSNPP | overrides)


@register_model
def adm_imagenet64(**overrides):
    """ADM for 64x64 images of 1,000 classes, 295.9M parameters: Dhariwal & Nichol 2021, arXiv:2105.05233, table 4."""
    defaults = dict(channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(1, 2, 3), num_classes=1000)
    return UNet(**ADM | dict(dropout=0.1) | defaults | overrides)


@register_model
def adm_imagenet128(**overrides):
    """ADM for 128x128 images of 1,000 classes, 421.5M parameters: arXiv:2105.05233, table 4. It has four heads."""
    defaults = dict(channels=256, multipliers=(1, 1, 2, 3, 4), blocks=2, attention=(2, 3, 4), num_classes=1000)
    return UNet(**ADM | dict(head_channels=0, heads=4) | defaults | overrides)


@register_model
def adm_imagenet256(**overrides):
    """ADM for 256x256 images of 1,000 classes, 553.8M parameters: arXiv:2105.05233, table 4."""
    defaults = dict(channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(3, 4, 5), num_classes=1000)
    return UNet(**ADM | defaults | overrides)


@register_model
def adm_imagenet512(**overrides):
    """ADM for 512x512 images of 1,000 classes, 559.0M parameters: arXiv:2105.05233, table 4."""
    levels = dict(multipliers=(0.5, 1, 1, 2, 2, 4, 4), attention=(4, 5, 6), first_channels=128)
    return UNet(**ADM | levels | dict(channels=256, blocks=2, num_classes=1000) | overrides)


DDPM = dict(
    adaptive=False, heads=1, resample="conv", conv_padding=(0, 1), middle_attention=True, min_group_width=1,
    epsilon=1e-6, label_scale=1.0, wave_multiplier=1, endpoint=True,
    qkv_scale=2.0,  # queries, keys and values have a law each, of C to C channels: twice the variance of C to 3 C
)  # fmt: skip
SONG = dict(
    adaptive=False, heads=1, resample="block", project=True, middle_attention=True, decoder_attention="last",
    skip_scale=0.5**0.5, epsilon=1e-6, label_scale=1.0, wave_multiplier=1, endpoint=True, class_at="waves",
    out_scale=1e-10, qkv_scale=0.2,
)  # fmt: skip
NCSNPP = dict(wave_multiplier=2, fourier=16.0, pyramid_in="residual", filter=(1, 3, 3, 1))
ADM = dict(
    head_channels=64, resample="block", middle_attention=True, min_group_width=1, label_scale=1.0, wave_multiplier=1,
    kernel_init="torch",
)  # fmt: skip


@register_model
def edm_cifar10(**overrides):
    """EDM's networks for CIFAR-10: DDPM++ with augmentation labels, 55.7M parameters; its tags are NVIDIA's weights."""
    return ddpmpp_cifar10(**dict(augment_dim=9) | overrides)


@register_model
def edm_64(**overrides):
    """EDM's networks for 64x64 faces: DDPM++ with augmentation labels, 61.8M parameters; its tags are NVIDIA's weights.

    Karras et al. 2022, arXiv:2206.00364, table 7.
    """
    defaults = dict(channels=128, multipliers=(1, 2, 2, 2), blocks=4, attention=(2,), dropout=0.05, augment_dim=9)
    return UNet(**SONG | defaults | overrides)


def _tags() -> None:
    """Published weights, as data: nothing here downloads."""
    edm = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-"
    trained = dict(
        license="CC BY-NC-SA 4.0", architecture="edm", target="EDM", conditioning="EDM", sigma_data=0.5
    )  # fmt: skip
    for kind, classes in {"cond": 10, "uncond": 0}.items():
        for process, (overrides, parameters) in {"vp": ({}, 55_732_739), "ve": (NCSNPP, 56_395_523)}.items():
            waves = 256 if process == "ve" else 128
            register_tag(
                "edm_cifar10", f"{kind}_{process}", overrides | dict(num_classes=classes),
                url=f"{edm}cifar10-32x32-{kind}-{process}.pkl", shape=(32, 32, 3),
                parameters=parameters + 9 * waves + bool(classes) * (classes + 1) * waves, **trained,
            )  # fmt: skip
    for data, dropout in (("ffhq", {}), ("afhqv2", dict(dropout=0.25))):
        for process, (overrides, parameters) in {"vp": ({}, 61_805_571), "ve": (NCSNPP, 62_761_091)}.items():
            register_tag(
                "edm_64", f"{data}_{process}", overrides | dropout, url=f"{edm}{data}-64x64-uncond-{process}.pkl",
                shape=(64, 64, 3), parameters=parameters, **trained,
            )  # fmt: skip
    register_tag(
        "adm_imagenet64", "edm_cond", dict(min_group_width=4), url=f"{edm}imagenet-64x64-cond-adm.pkl",
        shape=(64, 64, 3), parameters=295_900_035, **trained,
    )  # fmt: skip
    published = dict(out_multiplier=2, null_class=False)
    for size, tag, overrides, parameters in (
        (64, "openai", {}, 295_904_454),
        (128, "openai", {}, 421_529_606),
        (256, "openai", {}, 553_838_086),
        (256, "openai_uncond", dict(num_classes=0), 552_814_086),
        (512, "openai", {}, 558_997_638),
    ):
        file = f"{size}x{size}_diffusion{tag.removeprefix('openai')}.pt"
        register_tag(
            f"adm_imagenet{size}", tag, published | overrides, shape=(size, size, 3), parameters=parameters,
            url=f"https://openaipublic.blob.core.windows.net/diffusion/jul-2021/{file}", license="MIT",
            architecture="adm", target="Eps", conditioning="Index(1000)", learned_variance=True,
        )  # fmt: skip
    # continuous ones, of the folders that score_sde_pytorch's README names
    song = dict(license="Apache-2.0", architecture="score_sde", shape=(32, 32, 3))
    larger = dict(multipliers=(1, 2, 2, 2), blocks=4, dropout=0.1)
    register_tag(
        "ddpmpp_cifar10", "score_sde_vp", larger, parameters=61_804_419, target="Eps", conditioning="Continuous(999)",
        url="https://drive.google.com/drive/folders/1xYjVMx10N9ivQQBIsEoXEeu9nvSGTBrC", **song,
    )  # fmt: skip
    register_tag(
        "ncsnpp_cifar10", "score_sde_ve", larger, parameters=62_758_787, target="Score", conditioning="Sigma",
        url="https://drive.google.com/drive/folders/1b0gy_LLgO_DaQBgoWXwlVnL_rcAUgREh", within="InSigma", **song,
    )  # fmt: skip
    google = dict(license="Apache-2.0", architecture="diffusers", target="Eps", conditioning="Index(1000)")
    register_tag(
        "ddpm_cifar10", "google", url="https://huggingface.co/google/ddpm-cifar10-32", shape=(32, 32, 3),
        parameters=35_746_307, **google,
    )  # fmt: skip
    for data in ("celebahq", "bedroom", "church", "cat"):
        register_tag(
            "ddpm_256", f"google_{data}", url=f"https://huggingface.co/google/ddpm-{data}-256", shape=(256, 256, 3),
            parameters=113_673_219, **google,
        )  # fmt: skip


_tags()
