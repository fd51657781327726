"""Initial values of kernels, as the papers have them."""

from typing import Any

import flax.linen as nn

from jdiff.core.names import choose

INITS: dict[str, tuple[float, Any, Any]] = {
    "xavier": (1.0, "fan_avg", "uniform"),  # Glorot & Bengio 2010; DDPM's and score_sde's variance scaling
    "kaiming": (2.0, "fan_in", "normal"),  # He et al. 2015, arXiv:1502.01852, eq. 10
    "kaiming_out": (2.0, "fan_out", "normal"),  # the same by the fan out: ResNets
    "lecun": (1.0, "fan_in", "truncated_normal"),  # LeCun et al. 1998; Flax's default
    "torch": (1 / 3, "fan_in", "uniform"),  # PyTorch's default for convolutions and linear layers, ADM's
}


def scaled_init(scale: float = 1.0, name: str = "xavier"):
    """An initial law of kernels, with its variance multiplied by `scale`.

    Args:
        scale: times the variance; 0 for zeros.
        name: one of `INITS`. The default, fan-average and uniform, is that of Ho et al. 2020, arXiv:2006.11239, and
            Song et al. 2021, arXiv:2011.13456.

    Returns:
        (key, shape, dtype) -> array.

    Raises:
        ValueError: for an unknown name.
    """
    base, mode, law = choose("initialisation", name, INITS)
    if scale == 0:
        return nn.initializers.zeros_init()
    return nn.initializers.variance_scaling(base * scale, mode, law)
