"""Your own images at 16x16: a folder of png, jpg or webp files, of which each first sub-folder is a class.

jdiff inspect folder --data.args.path DIR
jdiff train folder --data.args.path DIR
jdiff evaluate runs/folder

These settings are for some hundred small images and a few minutes on 2 CPU cores: 200 images took 2 min 13 s with
nothing beside it, compiling and the picture included. With 180 photographs of CIFAR-10's cats and automobiles, and with
--num 200:
guidance 1: as asked 82.5% (real ones 65.0%), Frechet ratio 1.00, nearest-neighbour ratio 1.07

For an evening there, add
--data.args.size 32 --train.steps 6000 --train.ema.args.images 20000. For thousands of images and a day on a GPU, add

  --data.args.size 64 --train.steps 100000 --train.batch 128 --train.lr 3e-4 --train.ema.args.images 500000
  --model.args.channels 128 --model.args.multipliers 1 2 2 2 --model.args.blocks 2 --model.args.attention 2 3
  --train.save-every 5000 --train.sample-every 5000 --sample.steps 18

These two were not run here to the end. From few images, a long training learns the images themselves by heart: the
nearest-neighbour ratio of jdiff evaluate is then well below 1.
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
        steps=1200,
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
