"""CIFAR-10 by the VE SDE: NCSN++ cont. of Song et al. 2021, arXiv:2011.13456. 56.4M parameters.

python scripts/train.py configs/cifar10_ve.py

Published: FID 2.38 (table 3), with sigma from 0.01 to 50 on images in [0, 1]: twice that on [-1, 1]. Here the network
is shown its input at unit variance, and the widths are those of Karras et al. 2022, table 7. Not run here to the end.
"""

from jdiff.config import Config, Named, Sample, Train

config = Config(
    name="cifar10_ve",
    data=Named("cifar10"),
    model=Named("ncsnpp_cifar10", {"num_classes": 0, "dropout": 0.1}),
    schedule=Named("ve", {"sigma_min": 0.02, "sigma_max": 100.0}),
    target=Named("eps"),
    conditioning=Named("edm"),
    levels=Named("independent", {"t_min": 1e-5}),
    train=Train(
        steps=1_300_000,
        batch=128,
        lr=2e-4,
        warmup_steps=5000,
        clip=1.0,
        flip=True,
        ema=Named("constant", {"decay": 0.999}),
        save_every=10_000,
        keep_every=50_000,
        sample_every=50_000,
    ),
    sample=Sample(solver=Named("predictor_corrector"), grid=Named("uniform"), steps=1000, num=100),
)
