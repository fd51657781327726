"""A folder of pictures at 64x64, unconditional: the tutorial run on 4,000 landscapes.

python scripts/train.py configs/landscape64.py --data.args.path PICTURES

Any folder of .png, .jpg or .webp will do; the tutorials use Kaggle's "Landscape Pictures". They train 500 epochs of
batch 12 with AdamW, 1,000 linear betas, on one GPU. Not run here.
"""

from jdiff.config import Config, Named, Sample, Train

T = 1000

config = Config(
    name="landscape64",
    data=Named("folder", {"path": "data/landscapes", "size": 64, "labels": False, "corrupt": "skip"}),
    model=Named("unet", {"channels": 64, "multipliers": (1, 2, 4, 4), "blocks": 2, "attention": (1, 2, 3)}),
    schedule=Named("discrete", {"table": "linear", "T": T}),
    target=Named("eps"),
    levels=Named("knots", {"T": T}),
    train=Train(
        steps=180_000,
        batch=12,
        optimizer=Named("adamw", {"weight_decay": 0.01}),
        lr=3e-4,
        ema=Named("constant", {"decay": 0.995}),
        flip=True,
        save_every=5000,
        sample_every=5000,
    ),
    sample=Sample(solver=Named("ddpm"), grid=Named("discrete"), steps=T, num=16),
)
