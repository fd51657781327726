"""Speed, as ratios against a peer measured side by side in one run: `python benchmarks/speed.py WHAT`.

scurve: training steps per second of the S-curve recipe in one jitted loop, against the same recipe in eager PyTorch
(`pip install torch==2.13.0`, the parity extra). unet: the digits UNet's training step inside one jitted loop, against
one jitted call per step. sampling: `jdiff.sample` of N steps of the digits UNet, batch 16, against N bare jitted calls
of the network, and the compile time of 1,000 steps against that of 10. mlp: steps per second of DDIM on a small MLP,
batch 1, against diffusers' DDIM loop with the same network in PyTorch (the parity extra). gradient: peak memory of the
gradient through 100 steps of the digits UNet, checkpointed and not, against one forward and backward pass.
"""

import dataclasses
import time
from typing import Literal

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import config as configs
from jdiff import runs
from jdiff.data import batch_indices
from jdiff.train import make_train_loop, make_train_step


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure speed against a peer."""

    what: Literal["scurve", "unet", "sampling", "mlp", "gradient"]
    """Which comparison."""
    steps: int = 5000
    """Steps of each measurement (the UNet's training takes a hundredth, sampling a fiftieth)."""
    repeats: int = 3
    """Alternating measurements of each side; the fastest counts."""


def training(path: str, visit: int):
    """(step, loop, state maker, data, rows, take) of a config, as scripts/train.py trains it; `visit` steps a call."""
    config = configs.load_config(path)
    configs.limit_threads(config)
    run = runs.build("unused", config)
    tx, decay = configs.build_optimizer(run.config), configs.build_averages(run.config)

    step, take = make_train_step(runs.make_loss(run), tx, decay), runs.make_take(run)
    loop = jax.jit(make_train_loop(step, take), donate_argnums=0)
    arrays = jax.device_put((run.dataset.x, run.dataset.labels))
    index = batch_indices(len(run.dataset.x), run.config.train.batch, 0, 0, visit)
    return step, loop, lambda: runs.new_state(run), arrays, index, take


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
    best, threads = [np.inf, np.inf], torch.get_num_threads()
    for i in range(2 * repeats):
        torch.set_num_threads(1 if i % 2 else threads)  # whichever is faster for it, as the config has it for us
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


def digits_unet():
    """(denoiser of the digits UNet with fresh parameters and labels, its schedule, noise): batch 16."""
    schedule, model = jdiff.VP(), jdiff.create_model("unet_digits", num_classes=10)
    x, labels = jdiff.prior(schedule, jax.random.key(0), (16, 8, 8, 1)), jnp.arange(16) % 10
    params = model.init(jax.random.key(1), x, jnp.zeros(16), labels)
    return jdiff.denoiser(model.apply, params, schedule, jdiff.targets.Eps(), cond=labels), schedule, x


def fastest(repeats: int, *runs) -> list[float]:
    """Seconds of the fastest of so many alternating calls of each."""
    best = [np.inf] * len(runs)
    for _ in range(repeats):
        for i, run in enumerate(runs):
            start = time.perf_counter()
            jax.block_until_ready(run())
            best[i] = min(best[i], time.perf_counter() - start)
    return best


def sampling(steps: int, repeats: int) -> None:
    denoise, schedule, x = digits_unet()
    count = max(steps // 50, 10)
    times = jdiff.grid.log_snr(schedule, count)
    run, network = jax.jit(jdiff.sample), jax.jit(denoise.apply)
    label = jnp.zeros(16)

    def bare():
        for _ in range(count):
            out = network(denoise.params, x, label, denoise.cond)
        return out

    both = [lambda: run(jdiff.solvers.DDIM(), denoise, schedule, x, times), bare]
    fastest(1, *both)  # compiles
    ours, theirs = fastest(repeats, *both)
    print(
        f"sample of {count} steps {ours * 1e3:.0f} ms, {count} bare network calls {theirs * 1e3:.0f} ms, "
        f"ratio {ours / theirs:.3f}"
    )

    def compiling(n):
        # a new function each time: nothing comes from a cache
        fresh = jax.jit(lambda *arguments: jdiff.sample(*arguments))
        return fresh.lower(jdiff.solvers.DDIM(), denoise, schedule, x, jdiff.grid.log_snr(schedule, n)).compile()

    compiling(10)
    long, short = fastest(repeats, lambda: (compiling(1000), 0)[1], lambda: (compiling(10), 0)[1])
    print(f"compiling 1,000 steps {long:.2f} s, 10 steps {short:.2f} s, ratio {long / short:.3f}")


def mlp(steps: int, repeats: int) -> None:
    try:
        import torch
        from diffusers import DDIMScheduler
    except ImportError:
        configs.fail("benchmark mlp compares with diffusers: pip install torch==2.13.0 diffusers")
    T = 1000
    schedule = jdiff.discrete(jdiff.betas.linear(T))
    widths = [3, 128, 128, 2]
    weights = [
        np.random.default_rng(i).normal(0, a**-0.5, (a, b))
        for i, (a, b) in enumerate(zip(widths[:-1], widths[1:], strict=True))
    ]

    def apply(params, x, label, cond):
        h = jnp.concatenate([x, label[:, None] / T], -1)
        for w in params[:-1]:
            h = jax.nn.silu(h @ w)
        return h @ params[-1]

    params = [jnp.asarray(w, jnp.float32) for w in weights]
    index = jdiff.conditioning.Index(T)
    denoise = jdiff.denoiser(apply, params, schedule, jdiff.targets.Eps(), conditioning=index)
    x, times = jdiff.prior(schedule, jax.random.key(0), (1, 2)), jdiff.grid.discrete(T, T)
    run = jax.jit(jdiff.sample)
    tensors = [torch.tensor(w, dtype=torch.float32) for w in weights]
    scheduler = DDIMScheduler(num_train_timesteps=T, clip_sample=False, set_alpha_to_one=False)
    scheduler.set_timesteps(T)

    @torch.no_grad()
    def theirs():
        y = torch.tensor(np.array(x))
        for t in scheduler.timesteps[: T // 5]:  # a fifth of the steps: it is the slower side
            h = torch.cat([y, (t / T).reshape(1, 1)], -1)
            for w in tensors[:-1]:
                h = torch.nn.functional.silu(h @ w)
            y = scheduler.step(h @ tensors[-1], t, y).prev_sample
        return 0

    both = [lambda: run(jdiff.solvers.DDIM(), denoise, schedule, x, times), theirs]
    fastest(1, *both)
    seconds = fastest(max(repeats, steps // 1000), *both)
    ours, other = T / seconds[0], T // 5 / seconds[1]
    print(f"jdiff {ours:,.0f} steps/s, diffusers' DDIM loop {other:,.0f} steps/s, ratio {ours / other:.1f}")


def gradient(steps: int, repeats: int) -> None:
    del steps, repeats  # nothing is timed
    denoise, schedule, x = digits_unet()
    times = jdiff.grid.log_snr(schedule, 101)

    def through(checkpoint):
        return lambda x: jdiff.sample(jdiff.solvers.DDIM(), denoise, schedule, x, times, checkpoint=checkpoint).sum()

    def peak(f):
        memory = jax.jit(jax.value_and_grad(f)).lower(x).compile().memory_analysis()
        return memory.temp_size_in_bytes / 2**20

    one, bounded, plain = peak(lambda x: denoise(x, times[50]).sum()), peak(through(True)), peak(through(False))
    print(
        f"one forward and backward {one:.1f} MiB; through 100 steps {bounded:.1f} MiB ({bounded / one:.1f} times), "
        f"without checkpoints {plain:.1f} MiB ({plain / one:.1f} times)"
    )


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="benchmarks/speed.py")
    if a.steps < 5 or a.repeats < 1:
        raise configs.ConfigError("--steps must be at least 5 and --repeats at least 1")
    what = {"scurve": scurve, "unet": unet, "sampling": sampling, "mlp": mlp, "gradient": gradient}
    what[a.what](a.steps, a.repeats)
    return 0


if __name__ == "__main__":
    configs.run_script(main)
