"""CIFAR-10 enlarged to 64x64 with classes: the conditional tutorial run.

python scripts/train.py configs/cifar64_cond.py

AdamW 3e-4, EMA 0.995, label dropout 0.1, guidance 3 (that is w; the tutorials write it so too), 300 epochs of batch 14
on one GPU. Not run here.
"""

from jdiff.config import Config, Named, Sample, Train

T = 1000

config = Config(
    name="cifar64_cond",
    data=Named("tfds", {"name": "cifar10", "size": 64}),
    model=Named("unet", {"channels": 64, "multipliers": (1, 2, 4, 4), "blocks": 2, "attention": (1, 2, 3)}),
    schedule=Named("discrete", {"table": "linear", "T": T}),
    target=Named("eps"),
    levels=Named("knots", {"T": T}),
    train=Train(
        steps=1_070_000,
        batch=14,
        optimizer=Named("adamw", {"weight_decay": 0.01}),
        lr=3e-4,
        ema=Named("constant", {"decay": 0.995}),
        label_dropout=0.1,
        save_every=5000,
        sample_every=5000,
    ),
    sample=Sample(solver=Named("ddpm"), grid=Named("discrete"), steps=T, guidance=3.0, num=100),
)
