"""CIFAR-10 by flow matching with straight paths: Lipman et al. 2023, arXiv:2210.02747, table 3.

python scripts/train.py configs/cifar10_flow.py

Published: FID 6.35 and 2.99 bits/dim with an adaptive solver (table 1). Not run here to the end.
"""

from jdiff.config import Config, Named, Sample, Train

config = Config(
    name="cifar10_flow",
    data=Named("cifar10"),
    model=Named(
        "unet",
        {
            "channels": 256,
            "multipliers": (1, 2, 2, 2),
            "blocks": 2,
            "attention": (1,),
            "head_channels": 64,
            "num_classes": 0,
        },
    ),
    schedule=Named("flow"),
    target=Named("velocity"),
    levels=Named("uniform"),
    train=Train(
        steps=391_000,
        batch=256,
        lr=5e-4,
        lr_schedule=Named("linear"),
        warmup_steps=45_000,
        flip=True,
        ema=Named("constant", {"decay": 0.9999}),
        save_every=10_000,
        sample_every=10_000,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("uniform"), steps=50, num=100),
)
