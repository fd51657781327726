"""Compare our UNets with EDM's own: `python scripts/parity_edm.py CHECKOUT`, a checkout of github.com/NVlabs/edm.

Random weights in their module, converted; the largest difference of the outputs and of the gradients with respect to
the input, in single precision (of outputs of unit scale) and in double. PyTorch is needed (the `parity` extra).
"""

import sys
from pathlib import Path

import jax
import numpy as np

from jdiff import config as configs
from jdiff import convert
from jdiff.convert import edm

SONG = dict(model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], dropout=0.1)
NCSNPP = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
ADM = dict(model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
CASES = [
    ("DDPM++", "SongUNet", SONG, (16, 16)),
    ("DDPM++, classes, augmentation", "SongUNet", SONG | dict(label_dim=10, augment_dim=9, num_blocks=2), (16, 24)),
    ("DDPM++, three levels, odd size", "SongUNet", SONG | dict(channel_mult=[1, 2, 2], num_blocks=2), (12, 20)),
    ("NCSN++", "SongUNet", SONG | NCSNPP, (16, 16)),
    ("NCSN++, classes, not square", "SongUNet", SONG | NCSNPP | dict(label_dim=5, channel_mult=[2, 2, 2]), (8, 24)),
    ("NCSN++, skips", "SongUNet", SONG | NCSNPP | dict(encoder_type="skip", decoder_type="skip"), (16, 16)),
    ("ADM", "DhariwalUNet", ADM, (16, 16)),
    ("ADM, classes, augmentation", "DhariwalUNet", ADM | dict(label_dim=10, augment_dim=9), (8, 24)),
    ("ADM, three levels", "DhariwalUNet", ADM | dict(channel_mult=[1, 2, 3], num_blocks=2), (12, 20)),
]


def main(argv: list[str]) -> int:
    if len(argv) != 1 or not (Path(argv[0]) / "training" / "networks.py").is_file():
        raise configs.ConfigError("give one argument: the path of a checkout of github.com/NVlabs/edm")
    try:
        import torch
    except ImportError:
        raise configs.ConfigError("the comparison needs PyTorch: pip install torch==2.13.0") from None
    sys.path.insert(0, argv[0])
    from training import networks

    print(f"{'network':34s} {'float32':>9s} {'gradient':>9s} {'float64':>9s} {'gradient':>9s}")
    for title, kind, settings, size in CASES:
        torch.manual_seed(0)
        net = getattr(networks, kind)(img_resolution=16, in_channels=3, out_channels=3, **settings)
        for p in net.parameters():  # none is left at zero
            torch.nn.init.normal_(p, std=0.5 * max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else 0.1)
        net.eval()
        errors = [*compare(torch, networks, net, size, "float32"), *compare(torch, networks, net, size, "float64")]
        print(f"{title:34s} " + " ".join(f"{e:9.1e}" for e in errors), flush=True)
    return 0


def compare(torch, networks, net, size, precision: str) -> tuple[float, float]:
    """The largest differences of output and gradient, over the largest output and gradient."""
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *size, 3)).astype(precision)
    label = np.array([-1.3, 0.2, 0.9], precision)
    classes = net.map_label.in_features if net.map_label is not None else 0
    cond = np.array([0, classes, classes - 1]) if classes else None  # `classes` is no class: all zeros in theirs
    augment = rng.normal(size=(3, 9)).astype(precision) if net.map_augment is not None else None
    weight = rng.normal(size=x.shape).astype(precision)
    net = net.to(getattr(torch, precision))
    if precision == "float64":
        in_double(torch, networks)
    theirs_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    one_hot = torch.tensor(np.eye(classes + 1, dtype=precision)[cond][:, :-1]) if classes else None
    given = None if augment is None else torch.tensor(augment)
    y = net(theirs_x, torch.tensor(label), one_hot, given)
    (y * torch.tensor(weight.transpose(0, 3, 1, 2))).sum().backward()
    theirs, theirs_grad = (a.detach().numpy().transpose(0, 2, 3, 1) for a in (y, theirs_x.grad))
    with jax.enable_x64(precision == "float64"):
        tensors = edm.select({k: v.numpy() for k, v in net.state_dict().items()}, {})
        module = edm.build(tensors, {})
        variables = convert.variables_of(module, "edm", tensors, precision)

        def f(x):
            y = module.apply(variables, x, label, cond, augment=augment)
            return (y * weight).sum(), y

        (_, ours), grad = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(f, has_aux=True))(x))
    scale, grad_scale = np.abs(theirs).max(), np.abs(theirs_grad).max()
    return float(np.abs(ours - theirs).max() / scale), float(np.abs(grad - theirs_grad).max() / grad_scale)


def in_double(torch, networks) -> None:
    """Their frequencies and softmax are single precision whatever the network's: here they follow the label's."""

    def waves(self, x):
        half = self.num_channels // 2
        freqs = (1 / self.max_positions) ** (torch.arange(half, dtype=x.dtype) / (half - int(self.endpoint)))
        return torch.cat([x.ger(freqs).cos(), x.ger(freqs).sin()], dim=1)

    class Attention:
        @staticmethod
        def apply(q, k):
            return torch.einsum("ncq,nck->nqk", q, k / np.sqrt(k.shape[1])).softmax(dim=2)

    networks.PositionalEmbedding.forward = waves
    networks.AttentionOp = Attention


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except configs.ConfigError as error:
        configs.fail(error)
