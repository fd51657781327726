"""Handwritten digits, 8x8, ten classes: a class-conditional UNet with self-attention and classifier-free guidance.

python scripts/train.py configs/digits.py      # 4 min 20 s on 2 CPU cores
python scripts/evaluate.py runs/digits

step 2,400; classifier on real held-out images: 99.4%
guidance 1: as asked 97.6%, Frechet ratio 1.63, nearest-neighbour ratio 1.12
guidance 2: as asked 100.0%, Frechet ratio 3.13, nearest-neighbour ratio 0.98
"""

from jdiff.config import Config, Named, Sample, Train

config = Config(
    name="digits",
    data=Named("digits", {"held_out": 0.2}),
    model=Named("unet_digits", {"channels": 32, "dropout": 0.1}),
    schedule=Named("discrete", {"table": "linear", "T": 1000}),
    target=Named("eps"),
    levels=Named("knots", {"T": 1000}),
    train=Train(
        steps=2400,
        batch=64,
        lr=2e-3,
        warmup_steps=100,
        ema=Named("half_life", {"images": 10_000.0}),
        label_dropout=0.1,
        visit=40,
        save_every=800,
        sample_every=800,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("log_snr"), steps=20, guidance=2.0, num=100),
)
