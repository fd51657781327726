"""MNIST by flow matching: the network and budget of configs/mnist.py, straight paths, logit-normal times.

python scripts/train.py configs/mnist_flow.py
python scripts/evaluate.py runs/mnist_flow
"""

from jdiff.config import Config, Named, Sample, Train

config = Config(
    name="mnist_flow",
    data=Named("mnist", {"data_dir": None}),
    model=Named("unet", {"channels": 32, "multipliers": (1, 2, 2), "blocks": 1, "attention": (2,), "dropout": 0.1}),
    schedule=Named("flow"),
    target=Named("velocity"),
    levels=Named("logit_normal"),
    train=Train(
        steps=6000,
        batch=64,
        lr=1e-3,
        lr_schedule=Named("cosine"),
        warmup_steps=200,
        ema=Named("half_life", {"images": 20_000.0}),
        label_dropout=0.1,
        visit=50,
        save_every=1000,
        sample_every=1000,
    ),
    sample=Sample(solver=Named("heun"), grid=Named("uniform"), steps=20, guidance=2.0, num=100),
)
