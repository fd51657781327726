"""Speed, as ratios against a peer measured side by side in one run: `python scripts/benchmark.py scurve|unet`.

scurve: training steps per second of the S-curve recipe in one jitted loop, against the same recipe in eager PyTorch
(`pip install torch==2.13.0`, the parity extra). unet: the digits UNet's training step inside one jitted loop, against
one jitted call per step.
"""

import dataclasses
import sys
import time
from typing import Annotated, Literal

import jax
import jax.numpy as jnp
import numpy as np
import tyro

import jdiff
from jdiff import config as configs
from jdiff import runs
from jdiff.data import batch_indices
from jdiff.train import init_state, make_train_loop, make_train_step


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure speed against a peer."""

    what: Annotated[Literal["scurve", "unet"], tyro.conf.Positional]
    """Which comparison."""
    steps: int = 5000
    """Steps of each measurement (the UNet takes a hundredth)."""
    repeats: int = 3
    """Alternating measurements of each side; the fastest counts."""


def training(path: str, visit: int):
    """(step, loop, state maker, data, config) of a config, the loop running `visit` steps a call."""
    run = runs.build("unused", configs.load_config(path))
    tx, decay = configs.build_optimizer(run.config)

    def loss(params, key, x0, labels):
        return jdiff.losses.denoising(run.model.apply, params, key, x0, labels, **run.objective)

    def take(arrays, rows):
        x, labels = arrays
        return run.dataset.to_model(x[rows]), None if labels is None else labels[rows]

    step = make_train_step(loss, tx, decay)
    loop = jax.jit(make_train_loop(step, take), donate_argnums=0)
    arrays = jax.device_put((run.dataset.x, run.dataset.labels))
    index = batch_indices(len(run.dataset.x), run.config.train.batch, 0, 0, visit)
    return step, loop, lambda: init_state(run.init_params(), tx), arrays, index, take


def scurve(steps: int, repeats: int) -> None:
    try:
        import torch
    except ImportError:
        configs.fail("benchmark scurve compares with PyTorch: pip install torch==2.13.0")
    visit = 500
    _, loop, make_state, arrays, index, _ = training("configs/scurve.py", visit)
    state, key = make_state(), jax.random.key(0)

    def ours(state):
        for _ in range(max(steps // visit, 1)):
            state, _ = loop(state, key, arrays, index, visit)
        return jax.block_until_ready(state)

    T = 100
    betas = torch.tensor(jdiff.betas.sigmoid(T), dtype=torch.float32)
    bar = torch.cumprod(1 - betas, 0)

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.dense = torch.nn.ModuleList([torch.nn.Linear(a, 128) for a in (2, 128, 128)])
            self.step = torch.nn.ModuleList([torch.nn.Embedding(T, 128) for _ in range(3)])
            self.out = torch.nn.Linear(128, 2)

        def forward(self, x, k):
            for dense, step in zip(self.dense, self.step, strict=True):
                x = torch.relu(dense(x) + step(k))
            return self.out(x)

    network = Network()
    average = {name: p.detach().clone() for name, p in network.named_parameters()}
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-3)
    data = torch.tensor(np.array(arrays[0]))

    def theirs():
        order = torch.randperm(len(data))
        per_epoch = len(data) // 128
        for i in range(steps // 5):  # a fifth of the steps: it is the slower side
            x0 = data[order[i % per_epoch * 128 :][:128]]
            k = torch.randint(0, T, (64,))
            k = torch.cat([k, T - 1 - k])
            eps = torch.randn_like(x0)
            x = bar[k].sqrt()[:, None] * x0 + (1 - bar[k]).sqrt()[:, None] * eps
            loss = ((network(x, k) - eps) ** 2).mean()
            optimizer.zero_grad()
            loss.backward()
            torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
            optimizer.step()
            with torch.no_grad():
                for name, p in network.named_parameters():
                    average[name].lerp_(p, 0.001)

    state = ours(state)  # compiles
    best = [np.inf, np.inf]
    for _ in range(repeats):
        start = time.perf_counter()
        state = ours(state)
        middle = time.perf_counter()
        theirs()
        end = time.perf_counter()
        best = [
            min(best[0], (middle - start) / (max(steps // visit, 1) * visit)),
            min(best[1], (end - middle) / (steps // 5)),
        ]
    print(f"jdiff {1 / best[0]:,.0f} steps/s, eager PyTorch {1 / best[1]:,.0f} steps/s, ratio {best[1] / best[0]:.2f}")


def unet(steps: int, repeats: int) -> None:
    count = max(steps // 100, 2)
    step, loop, make_state, arrays, index, take = training("configs/digits.py", count)
    one = jax.jit(lambda state, key, arrays, rows: step(state, key, *take(arrays, rows)), donate_argnums=0)
    key, rows = jax.random.key(0), jnp.asarray(index)

    def inside(state):
        return jax.block_until_ready(loop(state, key, arrays, rows, count)[0])

    def outside(state):
        for i in range(count):
            state, _ = one(state, key, arrays, rows[i])
        return jax.block_until_ready(state)

    states = [inside(make_state()), outside(make_state())]  # compile
    best = [np.inf, np.inf]
    for _ in range(repeats):
        for i, run in enumerate((inside, outside)):
            start = time.perf_counter()
            states[i] = run(states[i])
            best[i] = min(best[i], (time.perf_counter() - start) / count)
    print(
        f"one jitted loop {best[0] * 1e3:.1f} ms/step, one jitted call a step {best[1] * 1e3:.1f} ms/step, "
        f"ratio {best[0] / best[1]:.3f}"
    )


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="scripts/benchmark.py")
    if a.steps < 5 or a.repeats < 1:
        raise configs.ConfigError("--steps must be at least 5 and --repeats at least 1")
    {"scurve": scurve, "unet": unet}[a.what](a.steps, a.repeats)
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except configs.ConfigError as error:
        configs.fail(error)
