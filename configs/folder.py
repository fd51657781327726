"""Your own images at 32x32: a folder of png, jpg or webp files, of which each first sub-folder is a class.

jdiff inspect folder --data.args.path DIR
jdiff train folder --data.args.path DIR
jdiff evaluate runs/folder
"""

from jdiff.config import Config, Named, Sample, Train

config = Config(
    name="folder",
    data=Named("folder", {"path": "data/images", "size": 16, "held_out": 0.1}),
    model=Named("unet", {"channels": 24, "multipliers": (1, 2, 2), "blocks": 1, "attention": (2,)}),
    schedule=Named("edm"),
    target=Named("edm"),
    conditioning=Named("edm"),
    levels=Named("log_normal", {"mean": -1.2, "std": 1.2}),
    train=Train(
        steps=800,
        batch=32,
        lr=2e-3,
        lr_schedule=Named("cosine"),
        warmup_steps=50,
        flip=True,
        ema=Named("half_life", {"images": 2_000.0}),
        label_dropout=0.1,
        visit=50,
        save_every=400,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("karras"), steps=12, num=40),
)
