"""CelebA at 64x64 by DDPM: Song et al. 2021 (DDIM), arXiv:2010.02502, appendix D. 78.7M parameters.

python scripts/train.py configs/celeba64.py

Published: FID 3.51 by DDIM with 1,000 steps, 9.17 with 50 (table 1). Not run here to the end.
"""

from jdiff.config import Config, Named, Sample, Train

T = 1000

config = Config(
    name="celeba64",
    data=Named("celeba", {"size": 64}),
    model=Named("ddpm_cifar10", {"multipliers": (1, 2, 2, 2, 4), "attention": (2,), "dropout": 0.1}),
    schedule=Named("discrete", {"table": "linear", "T": T}),
    target=Named("eps"),
    conditioning=Named("index", {"T": T}),
    levels=Named("knots", {"T": T}),
    train=Train(
        steps=500_000,
        batch=128,
        lr=2e-4,
        flip=True,
        ema=Named("constant", {"decay": 0.9999}),
        save_every=10_000,
        sample_every=10_000,
    ),
    sample=Sample(solver=Named("ddim"), grid=Named("discrete"), steps=50, num=64),
)
