"""CIFAR-10 by DDPM: Ho et al. 2020, arXiv:2006.11239, appendix B. 35.7M parameters, 800,000 steps.

python scripts/train.py configs/cifar10_ddpm.py

Published: FID 3.17 (table 1), sampling with all 1,000 steps; there 10.6 hours on a TPU v3-8. Not run here to the end.
"""

from jdiff.config import Config, Named, Sample, Train

T = 1000

config = Config(
    name="cifar10_ddpm",
    data=Named("cifar10"),
    model=Named("ddpm_cifar10", {"num_classes": 0, "dropout": 0.1}),
    schedule=Named("discrete", {"table": "linear", "T": T}),
    target=Named("eps"),
    conditioning=Named("index", {"T": T}),
    levels=Named("knots", {"T": T}),
    train=Train(
        steps=800_000,
        batch=128,
        lr=2e-4,
        warmup_steps=5000,
        clip=1.0,
        flip=True,
        ema=Named("constant", {"decay": 0.9999}),
        save_every=10_000,
        keep_every=100_000,
        sample_every=10_000,
    ),
    sample=Sample(solver=Named("ddpm", {"variance": "large"}), grid=Named("discrete"), steps=T, clip=1.0, num=100),
)
