"""Your own images at 32x32: a folder of png, jpg or webp files, of which each first sub-folder is a class.

jdiff inspect folder --data.args.path DIR
jdiff train folder --data.args.path DIR
jdiff evaluate runs/folder
"""

from jdiff.config import Config, Named, Sample, Train

config = Config(
    name="folder",
    data=Named("folder", {"path": "data/images", "size": 32, "held_out": 0.1}),
    model=Named("uvit_s_2", {"width": 128, "depth": 5, "heads": 4, "patch": 4}),
    schedule=Named("flow"),
    target=Named("velocity"),
    levels=Named("logit_normal"),
    train=Train(
        steps=1000,
        batch=32,
        lr=1e-3,
        lr_schedule=Named("cosine"),
        warmup_steps=50,
        flip=True,
        ema=Named("half_life", {"images": 2_000.0}),
        label_dropout=0.1,
        visit=50,
        save_every=500,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("uniform"), steps=20, num=40),
)
