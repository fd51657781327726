"""Guidance on a plane: a branching mixture of two classes, no guidance, classifier-free guidance and autoguidance.

python benchmarks/autoguidance.py --out docs/autoguidance.md      # 6 minutes on 2 CPU cores; a figure beside it

Each class is a tree of thin Gaussians along its branches. A small network learns both classes and, with a share of the
labels hidden, all of it; a smaller one is trained for less time. The samples of class 0 are measured against its exact
density: the share outside of the region that holds 99% of the data, and how many of the outermost branches have at
least half of the samples that the data have there.

Reference: Karras et al. 2024, arXiv:2406.02507, section 3, with data and networks of our own.
"""

import argparse
import time
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax

import jdiff
from jdiff import guidance, losses, solvers, train

SCHEDULE, TARGET = jdiff.EDM(0.002, 10.0), jdiff.targets.EDM(0.5)
LEVELS = 6  # of branching
N = 10_000
PAGE = """# Guidance on a plane, measured

Made by `python benchmarks/autoguidance.py`. Two classes, each a tree of thin Gaussians; 10,000 samples of one of them
in 32 steps of `Heun`. The good network is an MLP of 3 layers of 128, the bad one has layers of 64 and an eighth of the
steps; for `cfg` the good one has learnt both classes together too. The region holds 99% of the data, by their exact
density. An outermost branch is kept if it has at least half of the samples that the data have there.

![Samples of one class]({picture})

{table}
"""


def branches(seed: int, start, angle: float) -> list[tuple]:
    """(start, end, width, level) of each branch: the trunk, then two from each end, shorter, thinner and turned."""
    rng = np.random.default_rng(seed)
    found, ends = [], [(np.asarray(start), angle, 0.55, 0.03)]
    for level in range(LEVELS):
        following = []
        for at, angle, length, width in ends:
            end = at + length * np.array([np.cos(angle), np.sin(angle)])
            found.append((at, end, width, level))
            for side in (-1, 1):
                turn = side * rng.uniform(0.25, 0.6)
                following.append((end, angle + turn, length * rng.uniform(0.62, 0.8), width * 0.72))
        ends = following
    return found


def mixture(tree) -> tuple[jdiff.oracle.GaussianMixture, np.ndarray]:
    """The mixture of a tree, each level with the same weight, and which outermost branch a component is, or -1."""
    weights, means, covariances, leaf = [], [], [], []
    outermost = 0
    for start, end, width, level in tree:
        along = (end - start) / np.linalg.norm(end - start)
        std = np.linalg.norm(end - start) / 5
        frame = np.stack([along, np.array([-along[1], along[0]])], 1)
        for share in (0.2, 0.5, 0.8):
            weights.append(2.0**-level)
            means.append(start + share * (end - start))
            covariances.append(frame @ np.diag([std**2, width**2]) @ frame.T)
            leaf.append(outermost if level == LEVELS - 1 else -1)
        outermost += level == LEVELS - 1
    made = jdiff.oracle.GaussianMixture(np.array(weights), np.array(means), np.array(covariances))
    return made, np.array(leaf)


def fit(features: int, steps: int, points, labels, *, batch=1024, seed=0):
    """The averaged parameters of an MLP, and its apply."""
    model = jdiff.create_model("mlp", features=features, num_classes=2)
    variables = model.init(jax.random.key(seed), points[:1], jnp.zeros(1), labels[:1])

    def loss(params, key, data, cond):
        cond = jdiff.conditioning.drop_labels(jax.random.fold_in(key, 1), cond, 0.2, 2)
        law = jdiff.levels.LogNormal(-2.3, 1.5)
        return losses.denoising(model.apply, params, key, data, cond, schedule=SCHEDULE, target=TARGET, levels=law)

    tx = optax.adam(optax.cosine_decay_schedule(2e-3, steps))
    state = train.init_state(variables, tx)
    loop = jax.jit(train.make_train_loop(train.make_train_step(loss, tx, 0.998)), donate_argnums=0)
    rng = np.random.default_rng(seed)
    for _ in range(-(-steps // 500)):
        index = jnp.asarray(rng.integers(0, len(points), (500, batch)))
        state, metrics = loop(state, jax.random.key(seed), (points, labels), index, 500)
    return model.apply, state.ema, float(metrics["loss"].mean())


def measure(samples, data, leaf, edge: float) -> tuple[float, float]:
    """(share outside of the 99% region, share of outermost branches with half of their samples or more)."""
    log_prob = jax.jit(lambda x: data.log_prob(SCHEDULE, x, 0.0))
    outside = float(np.mean(np.asarray(log_prob(samples)) < edge))
    counts, expected = (of_branches(a, data, leaf) for a in (samples, data.sample(jax.random.key(9), N)))
    return outside, float(np.mean(counts >= 0.5 * expected))


def of_branches(x, data, leaf) -> np.ndarray:
    """How many points each outermost branch has, by the component that is most likely to have made them."""
    away = np.asarray(x)[:, None] - np.asarray(data.means)[None]
    precision, size = np.linalg.inv(data.covariances), np.linalg.slogdet(data.covariances)[1]
    score = np.log(data.weights) - 0.5 * size - 0.5 * np.einsum("nkd,kde,nke->nk", away, precision, away)
    which = leaf[np.argmax(score, 1)]
    return np.bincount(which[which >= 0], minlength=leaf.max() + 1)


def draw(panels, tree, other, path: Path) -> None:
    """One panel for each set of samples, over the branches of both classes."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, len(panels), figsize=(4 * len(panels), 5.4), layout="constrained")
    for axis, (name, points) in zip(axes, panels.items(), strict=True):
        for colour, branch in [("0.85", b) for b in other] + [("#f2c9a1", b) for b in tree]:
            ends, width = np.stack(branch[:2], 1), 60 * branch[2]
            axis.plot(*ends, color=colour, linewidth=width, solid_capstyle="round", zorder=0)
        axis.plot(*np.asarray(points)[:4000].T, ",", color="#a33b00")
        axis.set(xlim=(-1.4, 0.9), ylim=(-1.3, 1.6))
        axis.set_title(name)
        axis.set_aspect("equal")
        axis.set_axis_off()
    figure.savefig(path, dpi=110)


def main() -> None:
    """Train, sample, measure, write."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--out", type=Path, help="a page to write; its figure lies beside it")
    parser.add_argument("--steps", type=int, default=7000, help="of the good network (default: 7000)")
    a = parser.parse_args()
    trees = branches(0, (-1.0, -0.05), -0.4), branches(1, (-1.0, 0.1), 0.5)
    (data, leaf), (other, _) = (mixture(tree) for tree in trees)
    points = jnp.concatenate([m.sample(jax.random.key(i), 1 << 17) for i, m in enumerate((data, other))])
    labels = jnp.repeat(jnp.arange(2), 1 << 17)
    began = time.perf_counter()
    nets = {}
    for name, features, steps in (("good", 128, a.steps), ("bad", 64, a.steps // 8)):
        nets[name] = fit(features, steps, points, labels)
        print(f"{name}: loss {nets[name][2]:.4f} after {time.perf_counter() - began:.0f} s", flush=True)

    def model(name, label):
        apply, params, _ = nets[name]
        return jdiff.denoiser(apply, params, SCHEDULE, TARGET, jnp.full(N, label))

    c, u, bad = model("good", 0), model("good", 2), model("bad", 0)
    x = jdiff.prior(SCHEDULE, jax.random.key(1), (N, 2))
    times = jdiff.grid.karras(SCHEDULE, 32)
    sample = jax.jit(jdiff.sample)
    truth = data.sample(jax.random.key(5), N)
    edge = float(np.quantile(data.log_prob(SCHEDULE, data.sample(jax.random.key(7), 20 * N), 0.0), 0.01))
    drawn = {"the data": truth, "no guidance": sample(solvers.Heun(), c, SCHEDULE, x, times)}
    for w in (1.5, 2.0, 3.0):
        drawn[f"CFG, w = {w:g}"] = sample(solvers.Heun(), guidance.cfg(c, u, w), SCHEDULE, x, times)
        drawn[f"autoguidance, w = {w:g}"] = sample(solvers.Heun(), guidance.autoguidance(c, bad, w), SCHEDULE, x, times)
    rows = {name: measure(points, data, leaf, edge) for name, points in drawn.items()}
    table = "\n".join(f"| {name} | {out:.1%} | {cover:.0%} |" for name, (out, cover) in rows.items())
    table = "| samples | outside of the 99% region | outermost branches kept |\n|---|---|---|\n" + table
    print(table)
    if a.out:
        picture = a.out.with_suffix(".png")
        shown = ("the data", "no guidance", "CFG, w = 2", "autoguidance, w = 2")
        draw({name: drawn[name] for name in shown}, *trees, picture)
        a.out.write_text(PAGE.format(picture=picture.name, table=table))


if __name__ == "__main__":
    main()
