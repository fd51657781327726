"""Speed of networks beside the same architecture in PyTorch, on the CPU: `python benchmarks/models.py WHAT`.

dit: 6 layers of 256 with 8 heads on the 64 patches of 32x32x3 images. unet: diffusers' UNet2DModel of 64, 128 and 128
channels with attention at 16x16, two blocks a level, and the same network of ours with its weights. Batch 32, float32.
Three rows: forward; loss and gradients; five training steps with Adam, which are one call for us, as in
scripts/train.py (PyTorch's Adam is the fused one). Ours divides the batch over one device for each of PyTorch's
threads, as scripts/train.py does under JAX_NUM_CPU_DEVICES=N (--devices 1: one device whose threads share every layer).
Both sides run in turn in one process on the same cores; ratios above 1 mean that jdiff is faster. Needs
`pip install torch==2.13.0 diffusers`.
"""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np
import optax
from jax import lax

import jdiff
from jdiff import config as configs
from jdiff import parallel

STEPS = 5


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure a network against PyTorch."""

    what: Literal["dit", "unet"]
    """Which network."""
    batch: int = 32
    """Images at once."""
    devices: int | None = None
    """Devices of ours, of one CPU each; one for each of PyTorch's threads if not given."""
    repeats: int = 15
    """Measurements of each side, in turn."""


def compare(name: str, ours: Callable, theirs: Callable, repeats: int) -> None:
    """Time both in turn and print medians, the fastest, and their ratios."""
    seconds = [[], []]
    for i in range(-2, repeats):  # two to compile and warm up
        for side, run in zip(seconds, (ours, theirs), strict=True):
            time.sleep(0.5)  # the other side's threads may go on looking for work for a while
            start = time.perf_counter()
            jax.block_until_ready(run())
            if i >= 0:
                side.append(time.perf_counter() - start)
    (a, b), (best_a, best_b) = np.median(seconds, 1), np.min(seconds, 1)
    print(
        f"{name:10s} jdiff {a * 1e3:7.1f} ms, torch {b * 1e3:7.1f} ms, ratio {b / a:.2f}; "
        f"fastest {best_a * 1e3:7.1f}, {best_b * 1e3:7.1f}, ratio {best_b / best_a:.2f}",
        flush=True,
    )


def measure(model, variables, network, x: np.ndarray, label: np.ndarray, a: Arguments, torch) -> None:
    """The rows of one network: `network(x, label)` is PyTorch's, with x (B, C, H, W)."""
    target = np.random.default_rng(1).normal(size=x.shape).astype(np.float32)
    mesh, tx = parallel.mesh(), optax.adam(1e-4)
    ours = parallel.shard_batch(mesh, (x, label, target))
    theirs = [torch.tensor(z) for z in (x.transpose(0, 3, 1, 2).copy(), label, target.transpose(0, 3, 1, 2).copy())]
    everywhere = functools.partial(jax.jit, out_shardings=parallel.replicated(mesh))

    def loss(variables, x, label, target):
        return jnp.mean((model.apply(variables, x, label, None) - target) ** 2)

    def visit(held, *batch):  # as scripts/train.py does: many steps between visits to the host
        def step(held, _):
            variables, state = held
            value, grads = jax.value_and_grad(loss)(variables, *batch)
            updates, state = tx.update(grads, state)
            return (optax.apply_updates(variables, updates), state), value

        return lax.scan(step, held, length=STEPS)

    forward = jax.jit(lambda variables, x, label: model.apply(variables, x, label, None))
    gradient, visit = everywhere(jax.value_and_grad(loss)), everywhere(visit, donate_argnums=0)
    variables = parallel.replicate(mesh, variables)
    held = [parallel.replicate(mesh, (variables, tx.init(variables)))]
    optimizer = torch.optim.Adam(network.parameters(), lr=1e-4, fused=True)

    def train():
        held[0], values = jax.block_until_ready(visit(held[0], *ours))
        return values

    @torch.no_grad()
    def their_forward():
        network(*theirs[:2])

    def their_gradient():
        optimizer.zero_grad()
        ((network(*theirs[:2]) - theirs[2]) ** 2).mean().backward()

    def their_train():
        for _ in range(STEPS):
            their_gradient()
            optimizer.step()

    compare("forward", lambda: forward(variables, *ours[:2]), their_forward, a.repeats)
    compare("gradients", lambda: gradient(variables, *ours), their_gradient, a.repeats)
    compare(f"{STEPS} steps", train, their_train, max(a.repeats // 3, 1))


def dit(a: Arguments, torch) -> None:
    from torch import nn
    from torch.nn import functional as F

    width, depth, heads, patch, side = 256, 6, 8, 4, 32

    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)
            self.up, self.down = nn.Linear(width, 4 * width), nn.Linear(4 * width, width)
            self.modulation = nn.Linear(width, 6 * width)

        def forward(self, x, c):
            shift_0, scale_0, gate_0, shift_1, scale_1, gate_1 = self.modulation(F.silu(c))[:, None].chunk(6, -1)
            y = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale_0) + shift_0
            q, k, v = self.qkv(y).reshape(*y.shape[:2], 3, heads, width // heads).permute(2, 0, 3, 1, 4)
            y = F.scaled_dot_product_attention(q, k, v).transpose(1, 2).reshape(x.shape)
            x = x + gate_0 * self.out(y)
            y = F.layer_norm(x, (width,), eps=1e-6) * (1 + scale_1) + shift_1
            return x + gate_1 * self.down(F.gelu(self.up(y), approximate="tanh"))

    class Network(nn.Module):
        def __init__(self):
            super().__init__()
            self.patches = nn.Conv2d(3, width, patch, patch)
            self.label = nn.Sequential(nn.Linear(256, width), nn.SiLU(), nn.Linear(width, width))
            self.blocks = nn.ModuleList([Block() for _ in range(depth)])
            self.modulation, self.out = nn.Linear(width, 2 * width), nn.Linear(width, patch * patch * 3)
            self.register_buffer("positions", torch.randn(1, (side // patch) ** 2, width))
            self.register_buffer("rates", torch.exp(-torch.arange(128) * (np.log(1e4) / 128)))

        def forward(self, x, label):
            angles = label[:, None] * self.rates
            c = self.label(torch.cat([angles.cos(), angles.sin()], -1))
            x = self.patches(x).flatten(2).transpose(1, 2) + self.positions
            for block in self.blocks:
                x = block(x, c)
            shift, scale = self.modulation(F.silu(c))[:, None].chunk(2, -1)
            x = self.out(F.layer_norm(x, (width,), eps=1e-6) * (1 + scale) + shift)
            n = side // patch
            return x.reshape(-1, n, n, patch, patch, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, side, side)

    model = jdiff.create_model("dit_small")
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(a.batch, side, side, 3)).astype(np.float32), rng.normal(size=a.batch).astype(np.float32)
    shapes = jax.eval_shape(model.init, jax.random.key(0), x, label, None)
    variables = jax.tree.map(lambda s: jnp.asarray(0.05 * rng.normal(size=s.shape), s.dtype), shapes)
    network = Network()
    with torch.no_grad():
        for weight in network.parameters():
            weight.normal_(0, 0.05)
    ours, theirs = sum(w.size for w in jax.tree.leaves(variables)), sum(w.numel() for w in network.parameters())
    assert ours == theirs, (ours, theirs)
    measure(model, variables, network, x, label, a, torch)


def unet(a: Arguments, torch) -> None:
    try:
        import diffusers
    except ImportError:
        configs.fail("the UNet compares with diffusers: pip install diffusers")
    from jdiff import convert
    from jdiff.convert import diffusers as converter

    settings = dict(
        sample_size=32, block_out_channels=(64, 128, 128), layers_per_block=2, attention_head_dim=32,
        down_block_types=("DownBlock2D", "AttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    )  # fmt: skip

    class Network(torch.nn.Module):
        def __init__(self):
            super().__init__()
            self.net = diffusers.UNet2DModel(**settings)

        def forward(self, x, label):
            return self.net(x, label).sample

    torch.manual_seed(0)
    network = Network()
    tensors = converter.select({name: w.numpy() for name, w in network.net.state_dict().items()}, settings)
    model = converter.build(tensors, settings)
    variables = jax.tree.map(jnp.asarray, convert.variables_of(model, "diffusers", tensors))
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(a.batch, 32, 32, 3)), rng.uniform(0, 999, a.batch)
    measure(model, variables, network, x.astype(np.float32), label.astype(np.float32), a, torch)


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="benchmarks/models.py")
    if a.batch < 1 or a.repeats < 1:
        raise configs.ConfigError("--batch and --repeats must be at least 1")
    try:
        import torch
    except ImportError:
        configs.fail("this compares with PyTorch: pip install torch==2.13.0")
    devices = torch.get_num_threads() if a.devices is None else a.devices
    if devices < 1 or a.batch % devices:
        raise configs.ConfigError(f"--devices {devices} does not divide the batch of {a.batch}; choose a divisor")
    jax.config.update("jax_platforms", "cpu")
    jax.config.update("jax_num_cpu_devices", devices)
    {"dit": dit, "unet": unet}[a.what](a, torch)
    return 0


if __name__ == "__main__":
    configs.run_script(main)
