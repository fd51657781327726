"""ImageNet at 64x64 by ADM: Dhariwal & Nichol 2021, arXiv:2105.05233, table 11. 295.9M parameters, learned variance.

python scripts/train.py configs/imagenet64_adm.py --train.fsdp 8

Published: FID 2.07 with 250 steps (table 5). Not run here.
"""

from jdiff.config import Config, Named, Sample, Train

T = 1000

config = Config(
    name="imagenet64_adm",
    data=Named("imagenet64"),
    model=Named("adm_imagenet64", {"dropout": 0.1, "dtype": "bfloat16", "remat": False}),
    schedule=Named("discrete", {"table": "cosine", "T": T}),
    target=Named("eps"),
    conditioning=Named("index", {"T": T}),
    levels=Named("knots", {"T": T}),
    loss=Named("hybrid", {"vlb": 1e-3}),
    train=Train(
        steps=540_000,
        batch=2048,
        lr=3e-4,
        clip=None,
        flip=True,
        visit=8,
        ema=Named("constant", {"decay": 0.9999}),
        label_dropout=0.0,
        save_every=5000,
        keep_every=50_000,
        sample_every=10_000,
    ),
    sample=Sample(solver=Named("ddpm", {"variance": "learned"}), grid=Named("discrete"), steps=250, clip=1.0, num=100),
)
