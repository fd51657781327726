"""Fashion-MNIST by DDPM, as configs/mnist.py: 28x28 pictures of clothes of ten classes.

python scripts/train.py configs/fashion_mnist.py

Not run to the end yet.
"""

from jdiff.config import Config, Named, Sample, Train

T = 1000

config = Config(
    name="fashion_mnist",
    data=Named("fashion_mnist"),
    model=Named("unet", {"channels": 32, "multipliers": (0.5, 1, 2), "blocks": 1, "attention": (2,), "dropout": 0.1}),
    schedule=Named("discrete", {"table": "cosine", "T": T}),
    target=Named("eps"),
    levels=Named("knots", {"T": T}),
    train=Train(
        steps=1200,
        batch=64,
        lr=2e-3,
        lr_schedule=Named("cosine"),
        warmup_steps=100,
        ema=Named("half_life", {"images": 20_000.0}),
        label_dropout=0.1,
        visit=40,
        save_every=400,
        sample_every=400,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("log_snr"), steps=20, guidance=2.0, clip=1.0, num=100),
)
