"""Networks, in Flax Linen: `init(key, x, label, cond)` and `apply(variables, x, label, cond) -> F`.

They know jax, flax and `jdiff.core`, and nothing about diffusion.
"""

from jdiff.models import unet_presets  # noqa: F401  (importing the presets registers them)
from jdiff.models.attention import SelfAttention
from jdiff.models.conv import Conv, conv
from jdiff.models.dit import DiT
from jdiff.models.edm2 import EDM2UNet, normalize_weights
from jdiff.models.inception import InceptionV3
from jdiff.models.int8 import Int8, quantize
from jdiff.models.mlp import MLP, StepMLP
from jdiff.models.receptive import receptive_field, receptive_field_of
from jdiff.models.registry import (
    MODELS,
    Tag,
    Training,
    create_model,
    list_models,
    model_arguments,
    register_model,
    register_tag,
    tag_of,
)
from jdiff.models.resnet import ResNet
from jdiff.models.summary import summary
from jdiff.models.text import TextEncoder, tokenize
from jdiff.models.unet import UNet
from jdiff.models.vit import ViT

__all__ = [
    "Conv", "DiT", "EDM2UNet", "InceptionV3", "Int8", "MLP", "MODELS", "ResNet", "SelfAttention", "StepMLP", "Tag",
    "TextEncoder", "Training", "UNet", "ViT", "conv", "create_model", "list_models", "model_arguments",
    "normalize_weights", "quantize", "receptive_field", "receptive_field_of", "register_model", "register_tag",
    "summary", "tag_of", "tokenize",
]  # fmt: skip


def __dir__() -> list[str]:
    return sorted(__all__)
