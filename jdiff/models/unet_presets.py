"""The published UNets by name, and the weights published in them.

`DDPM`, `SONG`, `NCSNPP` and `ADM` are the fields in which the families differ from the UNet's defaults.
"""

from typing import Any

from jdiff.models.registry import Tag, Training, register_model, register_tag
from jdiff.models.unet import UNet

# Ho et al. 2020, arXiv:2006.11239, appendix B
DDPM: dict[str, Any] = dict(
    adaptive=False, heads=1, resample="conv", conv_padding=(0, 1), middle_attention=True, min_group_width=1,
    epsilon=1e-6, label_scale=1.0, wave_multiplier=1, endpoint=True,
    # published queries, keys and values are three layers from C to C channels: twice the initial variance of one layer
    # from C to 3 C
    qkv_scale=2.0,
)  # fmt: skip
# Song et al. 2021, arXiv:2011.13456, appendix H: DDPM++, and with `NCSNPP` NCSN++
SONG: dict[str, Any] = dict(
    adaptive=False, heads=1, resample="block", project=True, middle_attention=True, decoder_attention="last",
    skip_scale=0.5**0.5, epsilon=1e-6, label_scale=1.0, wave_multiplier=1, endpoint=True, class_at="waves",
    out_scale=1e-10, qkv_scale=0.2,
)  # fmt: skip
NCSNPP: dict[str, Any] = dict(wave_multiplier=2, fourier=16.0, pyramid_in="residual", filter=(1, 3, 3, 1))
# Dhariwal & Nichol 2021, arXiv:2105.05233, section 3
ADM: dict[str, Any] = dict(
    head_channels=64, resample="block", middle_attention=True, min_group_width=1, label_scale=1.0, wave_multiplier=1,
    kernel_init="torch",
)  # fmt: skip


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


# ---------------------------------------------------------------- published weights

EDM = "https://nvlabs-fi-cdn.nvidia.com/edm/pretrained/edm-"
OPENAI = "https://openaipublic.blob.core.windows.net/diffusion/jul-2021/"
EDM_TRAINING = Training(schedule="EDM", target="EDM", conditioning="EDM", sigma_data=0.5)
DDPM_TRAINING = Training(schedule="linear", target="Eps", conditioning="Index")


def _register_edm() -> None:
    """NVIDIA's networks of EDM, of which `edm_cifar10` and `edm_64` are DDPM++ or NCSN++ (Karras et al. 2022)."""
    shared: dict[str, Any] = dict(license="CC BY-NC-SA 4.0", architecture="edm", training=EDM_TRAINING)
    for kind, classes in {"cond": 10, "uncond": 0}.items():
        for process, (fields, parameters) in {"vp": ({}, 55_732_739), "ve": (NCSNPP, 56_395_523)}.items():
            waves = 256 if process == "ve" else 128
            register_tag(Tag(
                "edm_cifar10", f"{kind}_{process}", fields | dict(num_classes=classes), shape=(32, 32, 3),
                url=f"{EDM}cifar10-32x32-{kind}-{process}.pkl", **shared,
                parameters=parameters + 9 * waves + bool(classes) * (classes + 1) * waves,
            ))  # fmt: skip
    for data, dropout in (("ffhq", {}), ("afhqv2", dict(dropout=0.25))):
        for process, (fields, parameters) in {"vp": ({}, 61_805_571), "ve": (NCSNPP, 62_761_091)}.items():
            register_tag(Tag(
                "edm_64", f"{data}_{process}", fields | dropout, shape=(64, 64, 3), parameters=parameters,
                url=f"{EDM}{data}-64x64-uncond-{process}.pkl", **shared,
            ))  # fmt: skip
    register_tag(Tag(
        "adm_imagenet64", "edm_cond", dict(min_group_width=4), shape=(64, 64, 3), parameters=295_900_035,
        url=f"{EDM}imagenet-64x64-cond-adm.pkl", **shared,
    ))  # fmt: skip


def _register_openai() -> None:
    """guided-diffusion's networks, with learned variance; that of 64x64 was trained on the cosine schedule."""
    for size, tag, fields, parameters in (
        (64, "openai", {}, 295_904_454),
        (128, "openai", {}, 421_529_606),
        (256, "openai", {}, 553_838_086),
        (256, "openai_uncond", dict(num_classes=0), 552_814_086),
        (512, "openai", {}, 558_997_638),
    ):
        schedule = "cosine" if size == 64 else "linear"
        register_tag(Tag(
            f"adm_imagenet{size}", tag, dict(out_multiplier=2, null_class=False) | fields, shape=(size, size, 3),
            url=f"{OPENAI}{size}x{size}_diffusion{tag.removeprefix('openai')}.pt", license="MIT",
            parameters=parameters, architecture="adm",
            training=Training(schedule=schedule, target="Eps", conditioning="Index", learned_variance=True),
        ))  # fmt: skip


def _register_score_sde() -> None:
    """score_sde_pytorch's networks of continuous time, from the folders that its README names."""
    for model, tag, training, parameters, folder in (
        (
            "ddpmpp_cifar10", "score_sde_vp", Training(schedule="VP", target="Eps", conditioning="Continuous"),
            61_804_419, "1xYjVMx10N9ivQQBIsEoXEeu9nvSGTBrC",
        ),
        (  # the file holds `InSigma` of this network, which sees data in [0, 1]
            "ncsnpp_cifar10", "score_sde_ve", Training(schedule="VE", target="Score", conditioning="Sigma"),
            62_758_787, "1b0gy_LLgO_DaQBgoWXwlVnL_rcAUgREh",
        ),
    ):  # fmt: skip
        register_tag(Tag(
            model, tag, dict(multipliers=(1, 2, 2, 2), blocks=4, dropout=0.1), shape=(32, 32, 3),
            url=f"https://drive.google.com/drive/folders/{folder}", license="Apache-2.0", parameters=parameters,
            architecture="score_sde", training=training,
        ))  # fmt: skip


def _register_google() -> None:
    """Google's DDPMs in diffusers' format."""
    shared: dict[str, Any] = dict(license="Apache-2.0", architecture="diffusers", training=DDPM_TRAINING)
    register_tag(Tag(
        "ddpm_cifar10", "google", url="https://huggingface.co/google/ddpm-cifar10-32", shape=(32, 32, 3),
        parameters=35_746_307, **shared,
    ))  # fmt: skip
    for data in ("celebahq", "bedroom", "church", "cat"):
        register_tag(Tag(
            "ddpm_256", f"google_{data}", url=f"https://huggingface.co/google/ddpm-{data}-256", shape=(256, 256, 3),
            parameters=113_673_219, **shared,
        ))  # fmt: skip


for _register in (_register_edm, _register_openai, _register_score_sde, _register_google):
    _register()
