"""What a training is expected to take, computed without running it: `python benchmarks/expected.py CONFIG ...`.

Time: steps x FLOPs of a step / (devices x peak FLOP/s x MFU). A step is three calls of the network on a batch
(`runs.step_flops`); the MFU is assumed.

Memory of a device: 20 bytes a parameter (parameter, average, two moments of Adam and a gradient, 4 bytes each; 4 more
for each average of `train.posthoc`), divided over `--fsdp` devices, and what the network keeps for its backward pass.
That is found by tracing: the residuals of the derivative of the loss, for the images that a device has at once. XLA
computes some of these again, and needs room for others.

Loss: at step 0 that of a network which is 0 everywhere, and below it that of the best linear denoiser, which knows the
mean and the covariance of the data and nothing else. Both are closed forms, averaged over the config's law of t.
A run whose loss stays above the second has learned less than a linear map. `--data-dir` has the data; without it, the
loss is left out.
"""

import argparse
import dataclasses
import functools
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff import runs
from jdiff.data import DataFacts, load
from jdiff.models import cpu
from jdiff.runs.watch import PEAK_FLOPS

SETS = {"cifar10": ((32, 32, 3), 10), "celeba": ((64, 64, 3), 0), "imagenet64": ((64, 64, 3), 1000)}
SETS |= {"folder": ((64, 64, 3), 0), "tfds": ((64, 64, 3), 10)}  # as the configs use them
MFU = 0.35, 0.5


def main():
    """Print a row of a table for each config."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", nargs="+")
    parser.add_argument("--device", default="NVIDIA H100", choices=PEAK_FLOPS)
    parser.add_argument("--devices", type=int, default=8)
    parser.add_argument("--fsdp", type=int, default=1)
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--data-dir", help="of TFDS")
    a = parser.parse_args()
    cpu.on_cpu = lambda: False  # the networks as they are on an accelerator
    titles = "config", "parameters", "TFLOPs a step", "steps", "time", "memory of a device", "loss"
    print(f"| {' | '.join(titles)} |\n|{'---|' * len(titles)}")
    for name in a.config:
        print(f"| {' | '.join(row(configs.load_config(name), a))} |", flush=True)


def row(config: configs.Config, a: argparse.Namespace) -> tuple[str, ...]:
    """A row of the table."""
    args = config.model.args | {"dtype": "bfloat16"}
    config = dataclasses.replace(config, model=dataclasses.replace(config.model, args=args))
    run = run_of(config)
    shapes = runs.param_shapes(run)
    size = sum(leaf.size for leaf in jax.tree.leaves(shapes))
    flops, steps, batch = runs.step_flops(run), config.train.steps, config.train.batch
    hours = [steps * flops / (a.devices * PEAK_FLOPS[a.device] * mfu) / 3600 for mfu in reversed(MFU)]
    state = size * (20 + 4 * len(config.train.posthoc)) / a.fsdp
    kept = residuals(run, shapes, batch // a.devices // a.accumulate)
    return (
        f"`{config.name}`",
        f"{size / 1e6:.1f}M",
        f"{flops / 1e12:,.{0 if flops > 1e14 else 1}f}",
        f"{steps:,}",
        span(hours),
        f"{state / 1e9:.1f} + {kept / 1e9:.1f} GB",
        losses(config, a.data_dir),
    )


def run_of(config: configs.Config) -> runs.Run:
    """The run of a config, with what is known of its data."""
    shape, classes = SETS[config.data.name]
    model = configs.build_model(config, classes)
    classes = classes if getattr(model, "num_classes", 0) else 0
    facts = DataFacts(config.data.name, 0, shape, True, classes, (), "")
    regression, loss = configs.build_regression(config), configs.build_loss(config)
    return runs.Run(Path("none"), config, facts, model, regression, loss, lambda: None)


def residuals(run: runs.Run, params, images: int) -> int:
    """Bytes that the loss of so many images keeps for its backward pass, the parameters left out."""
    loss, key = runs.make_loss(run), jax.random.key(0)
    x0 = jax.ShapeDtypeStruct((images, *run.facts.shape), jnp.float32)
    labels = jax.ShapeDtypeStruct((images,), jnp.int32) if run.facts.classes else None

    def kept(params, x0, labels):
        return jax.vjp(lambda p: loss(p, key, x0, labels)[0], params)[1]

    leaves = jax.tree.leaves(jax.eval_shape(kept, params, x0, labels))
    total = sum(leaf.size * leaf.dtype.itemsize for leaf in leaves)
    return total - sum(leaf.size * leaf.dtype.itemsize for leaf in jax.tree.leaves(params))


def losses(config: configs.Config, data_dir: str | None) -> str:
    """The loss at step 0, and that of the best linear denoiser."""
    if data_dir is None or config.data.name != "cifar10" or config.loss.name != "denoising":
        return "-"
    regression, (values, second) = configs.build_regression(config), spectrum(data_dir)
    schedule, target = regression.schedule, regression.target
    t = regression.levels(jax.random.key(0), 4096, schedule)
    rows = schedule.alpha(t), schedule.sigma(t), *target.row(schedule, t), regression.weight(schedule, target, t)
    alpha, sigma, a, b, weight = (np.asarray(r, np.float64)[:, None] for r in rows)
    at_zero = weight * (a**2 * second + b**2)
    linear = weight * (a * sigma - b * alpha) ** 2 * values / (alpha**2 * values + sigma**2)  # of each component
    return f"{at_zero.mean():.2f}, then below {linear.mean():.3f}"


@functools.cache
def spectrum(data_dir: str) -> tuple[np.ndarray, float]:
    """(the eigenvalues of the covariance of CIFAR-10, the mean square of its numbers), in the model's numbers."""
    data = load("cifar10", data_dir=data_dir)
    x = np.asarray(data.x, np.float64).reshape(data.size, -1) / 127.5 - 1
    return np.maximum(np.linalg.eigvalsh(np.cov(x.T)), 0), float((x**2).mean())


def span(hours: list[float]) -> str:
    """A span of hours, or of days where it is long."""
    unit, divide = ("h", 1) if hours[1] < 72 else ("days", 24)
    low, high = (f"{h / divide:.2g}" for h in hours)
    return f"{low} to {high} {unit}"


if __name__ == "__main__":
    main()
