"""CIFAR-10 by the VP SDE: DDPM++ cont. of Song et al. 2021, arXiv:2011.13456. 55.7M parameters.

python scripts/train.py configs/cifar10_vp.py

Published: FID 2.55 (table 3). The widths are those of Karras et al. 2022, table 7. Not run here to the end.
"""

from jdiff.config import Config, Named, Sample, Train

config = Config(
    name="cifar10_vp",
    data=Named("cifar10"),
    model=Named("ddpmpp_cifar10", {"num_classes": 0, "dropout": 0.1}),
    schedule=Named("vp"),
    target=Named("eps"),
    conditioning=Named("continuous", {"scale": 999.0}),
    levels=Named("independent", {"t_min": 1e-5}),
    train=Train(
        steps=1_300_000,
        batch=128,
        lr=2e-4,
        warmup_steps=5000,
        clip=1.0,
        flip=True,
        ema=Named("constant", {"decay": 0.9999}),
        save_every=10_000,
        keep_every=50_000,
        sample_every=50_000,
    ),
    sample=Sample(solver=Named("euler_maruyama"), grid=Named("uniform"), steps=1000, num=100),
)
