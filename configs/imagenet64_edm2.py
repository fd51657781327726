"""ImageNet at 64x64 by EDM2-S: Karras et al. 2024, arXiv:2312.02696, table 6. 280M parameters, post-hoc averages.

python scripts/train.py configs/imagenet64_edm2.py --train.fsdp 8
python scripts/posthoc_ema.py runs/imagenet64_edm2 --sigma-rel 0.075

Published: FID 1.58 with the average of width 0.075 and 63 network calls (table 3). Not run here.
"""

from jdiff.config import Config, Named, Sample, Train

BATCH = 2048

config = Config(
    name="imagenet64_edm2",
    data=Named("imagenet64"),
    model=Named("edm2_img64_s", {"dropout": 0.0, "dtype": "bfloat16", "remat": False}),
    schedule=Named("edm"),
    target=Named("edm"),
    conditioning=Named("edm"),
    levels=Named("log_normal", {"mean": -0.8, "std": 1.6}),
    loss=Named("uncertain"),
    train=Train(
        steps=2**30 // BATCH,
        batch=BATCH,
        optimizer=Named("adam", {"b2": 0.99}),
        lr=1e-2,
        lr_schedule=Named("inverse_sqrt", {"reference": 35_000}),
        warmup_steps=10_000_000 // BATCH,
        clip=None,
        flip=True,
        visit=8,
        ema=Named("power", {"sigma_rel": 0.075}),
        posthoc=(0.05, 0.1),
        snapshot_every=2**23 // BATCH,
        label_dropout=0.0,
        save_every=4096,
        sample_every=4096,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("karras"), steps=32, num=100),
)
