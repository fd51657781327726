"""CIFAR-10 by EDM, conditional: Karras et al. 2022, arXiv:2206.00364, configuration F. 55.7M parameters.

python scripts/train.py configs/cifar10_edm.py                                         # conditional
python scripts/train.py configs/cifar10_edm.py --model.args.num-classes 0 --run-dir runs/cifar10_edm_uncond

Published: FID 1.79 conditional, 1.97 unconditional (table 2), 35 network calls. Not run here to the end.
"""

from jdiff.config import Config, Named, Sample, Train

BATCH = 512

config = Config(
    name="cifar10_edm",
    data=Named("cifar10"),
    model=Named("edm_cifar10", {"num_classes": 10, "dropout": 0.13}),
    schedule=Named("edm"),
    target=Named("edm"),
    conditioning=Named("edm"),
    levels=Named("log_normal", {"mean": -1.2, "std": 1.2}),
    train=Train(
        steps=200_000_000 // BATCH,
        batch=BATCH,
        lr=1e-3,
        warmup_steps=10_000_000 // BATCH,
        clip=None,
        augment=0.12,
        ema=Named("half_life", {"images": 500_000.0}),
        label_dropout=0.0,
        save_every=5000,
        keep_every=50_000,
        sample_every=5000,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("karras"), steps=18, num=100),
)
