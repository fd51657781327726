"""Accuracy per evaluation: every deterministic solver here and in diffusers, k-diffusion and azula, in one table.

python benchmarks/accuracy.py --k-diffusion CHECKOUT --azula CHECKOUT --out docs/solvers_accuracy.md

The target is a mixture of many narrow modes, whose denoiser is exact in both frameworks. Everyone starts from the same
noise at sigma = 80, stops at sigma = 0.002, and denoises there; the truth is the exact probability-flow map to the data
(SciPy, 1e-10, float64). Everyone runs on the same grids, and takes the most steps that the budget allows; calls of the
network are counted. Peers that are not installed are named and left out.
"""

import dataclasses
import functools
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from peers import azula_runs, diffusers_runs, k_diffusion_runs
from scipy.integrate import solve_ivp

import jdiff
from jdiff import config as configs
from jdiff import solvers
from jdiff.core.pytrees import noun

sys.path.append(str(Path(__file__).resolve().parents[1] / "parity"))
from checkout import find  # noqa: E402

SCHEDULE = jdiff.EDM(0.002, 80.0)
ENDS = np.array([80.0, 0.002])
STARTS = ("low_order", "single_step")
OURS = {
    "Euler()": solvers.Euler(),
    "Heun()": solvers.Heun(),
    "RK4()": solvers.RK4(),
    "GradientEstimation()": solvers.GradientEstimation(),
    "GradientEstimation(1.5)": solvers.GradientEstimation(1.5),
    "PNDM(runge_kutta)": solvers.PNDM(),
    "PNDM(trapezoid)": solvers.PNDM("trapezoid"),
    "DPMSolver(2)": solvers.DPMSolver(2),
    "DPMSolver(3)": solvers.DPMSolver(3),
    "DPMpp2S()": solvers.DPMpp2S(),
    **{f"IPNDM({k})": solvers.IPNDM(k) for k in (2, 3, 4)},
    **{f"DPMpp2M({s})": solvers.DPMpp2M(s) for s in STARTS},
    **{f"DPMpp3M({s})": solvers.DPMpp3M(s) for s in STARTS},
    **{f"DPMSolverM({k}, {s})": solvers.DPMSolverM(k, s) for k in (2, 3) for s in STARTS},
    **{f"LMS({k})": solvers.LMS(k) for k in (2, 3, 4)},
    **{f"DEIS({k}, t, {s})": solvers.DEIS(k, start=s) for k in (2, 3) for s in STARTS},
    "DEIS(3, log_rho)": solvers.DEIS(3, "log_rho"),
    **{
        f"ExponentialAB({k}, {p}, {s})": solvers.ExponentialAB(k, p, s)
        for p in ("eps", "x0")
        for k in (2, 3, 4)
        for s in STARTS[: 5 - k]
    },
    **{
        f"UniPC({k}, {v}, {p})": solvers.UniPC(k, v, p)
        for k in (1, 2, 3)
        for v in (("bh1", "bh2") if k < 3 else ("bh2",))
        for p in ("x0", "eps")
    },
    **{f"SASolver({k}, {k}, tau=0)": solvers.SASolver(k, k, tau=0.0) for k in (2, 3)},
}


INTRODUCTION = """# Accuracy per evaluation

Made by `python benchmarks/accuracy.py --k-diffusion CHECKOUT --azula CHECKOUT --points {points}{only}`.
The target has {modes} modes of standard deviation {width} of their spacing, scaled to unit variance. Distances are from
the exact probability-flow map, of {points} points that start from the same noise at sigma = 80, stop at 0.002 and are
denoised there. Every library runs on every grid, with the most steps that the budget allows; `calls` were counted.
Five best solvers of each, each on its best grid.
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare the error of solvers at the same number of network evaluations."""

    budgets: tuple[int, ...] = (10, 20)
    """Evaluations, the last denoise included."""
    points: int = 1024
    """Starting points."""
    side: int = 5
    """The target has side x side modes."""
    width: float = 0.05
    """Standard deviation of a mode, in units of their spacing."""
    only: str = ""
    """Our solvers whose name contains this; all when left out."""
    peers: bool = True
    """Whether to run the other libraries."""
    learn: bool = False
    """Whether to learn a grid for our best solver also, which does not count in the verdict."""
    k_diffusion: Path | None = None
    """A checkout of k-diffusion, if it is not installed."""
    azula: Path | None = None
    """A checkout of azula, if it is not installed."""
    out: Path | None = None
    """The Markdown file to write, if any."""


@functools.cache
def grids(n: int) -> dict[str, np.ndarray]:
    """{name: n values of sigma/alpha, from 80 down to 0.002}."""
    made = {f"karras {rho:g}": jdiff.grid.karras(SCHEDULE, n, rho) for rho in (1.5, 2, 3, 4, 5, 7, 10, 14)}
    made |= {f"polyexponential {r:g}": jdiff.grid.polyexponential(SCHEDULE, n, r) for r in (0.6, 0.8, 1, 1.25, 1.5, 2)}
    out = {name: SCHEDULE.sigma(times) for name, times in made.items()}
    for schedule in (jdiff.VP(), jdiff.Cosine(), jdiff.Flow()):
        last, first = (float(jdiff.time_of(schedule, -2 * np.log(sigma))) for sigma in ENDS[::-1])
        times = jdiff.grid.uniform(n, last, first)
        out[f"uniform {type(schedule).__name__}"] = schedule.sigma(times) / schedule.alpha(times)
    return {name: np.asarray(sigmas, np.float64) for name, sigmas in out.items()}


def target(side: int, width: float) -> jdiff.oracle.GaussianMixture:
    """A square lattice of side^2 equal modes, scaled to unit variance in each dimension."""
    line = np.arange(side) - (side - 1) / 2
    spacing = 1 / np.sqrt((line**2).mean() + width**2)
    means = spacing * np.stack(np.meshgrid(line, line), -1).reshape(-1, 2)
    covariances = np.tile((spacing * width) ** 2 * np.eye(2), (len(means), 1, 1))
    return jdiff.oracle.GaussianMixture(np.ones(len(means)), means, covariances)


def exact_map(mixture, x):
    """The data point of each x (B, 2) at sigma = 80, by the flow in log sigma down to 1e-5 and a denoise there."""
    wide = jdiff.VE(1e-6, 1e3)
    denoise = mixture.denoise(wide)

    @jax.jit
    def slope(c, x):
        return x - denoise(x, jdiff.time_of(wide, -2 * c))

    def flat(c, y):
        return np.asarray(slope(c, y.reshape(x.shape))).ravel()

    ends = np.log([ENDS[0], 1e-5])
    y = solve_ivp(flat, ends, np.asarray(x).ravel(), method="DOP853", rtol=1e-10, atol=1e-10).y[:, -1]
    return np.asarray(denoise(jnp.asarray(y.reshape(x.shape)), jdiff.time_of(wide, -2 * ends[1])))


@noun
class Counted:
    """A denoiser that adds to CALLS each time it runs."""

    base: object

    def __call__(self, x, t):
        return self.predict(x, t).x0

    def predict(self, x, t):
        jax.debug.callback(lambda: CALLS.append(1))
        return self.base.predict(x, t)


CALLS = []


def most(calls, budget: int) -> int:
    """The most grid points whose run takes at most `budget` calls; 0 for none."""
    return next((n for n in range(budget, 1, -1) if calls(n) <= budget), 0)


def errors(x0, truth) -> tuple[float, float]:
    """(root mean square distance, median distance)."""
    distance = np.linalg.norm(np.asarray(x0, np.float64) - truth, axis=-1)
    return float(np.sqrt((distance**2).mean())), float(np.median(distance))


def ours(a, mixture, x, truth):
    """Rows (budget, rms, median, calls, n, solver, grid) of our solvers, each compiled once."""
    size = max(a.budgets)
    denoise = Counted(mixture.denoise(SCHEDULE))

    def run(solver, sigmas, n, count):
        def one(i, out):
            times = jdiff.time_of(SCHEDULE, -2 * jnp.log(sigmas[i]))
            return out.at[i].set(jdiff.sample(solver, denoise, SCHEDULE, x, times, n=n))

        return jax.lax.fori_loop(0, count, one, jnp.zeros((len(sigmas), *x.shape)))

    run = jax.jit(run)

    @functools.cache
    def padded(n):
        return jnp.asarray([np.pad(sigmas, (0, size - n), "edge") for sigmas in grids(n).values()])

    def calls(solver, n):
        CALLS.clear()
        sigmas = np.pad(np.geomspace(*ENDS, n), (0, size - n), "edge")
        jax.block_until_ready(run(solver, jnp.asarray(np.tile(sigmas, (len(grids(size)), 1))), n, 1))
        jax.effects_barrier()
        return len(CALLS)

    for name in (name for name in OURS if a.only.lower() in name.lower()):
        for budget in a.budgets:
            n = most(functools.partial(calls, OURS[name]), budget)
            if n:
                used, found = calls(OURS[name], n), run(OURS[name], padded(n), n, len(padded(n)))
                for grid, x0 in zip(grids(n), found, strict=True):
                    yield budget, *errors(x0, truth), used, n, name, grid


def learned(best, mixture, x, truth):
    """The row of a solver on the grid that `grid.optimize` makes, on other noise, of the one it was best on."""
    budget, _, _, calls, n, name, grid = best
    denoise, other = mixture.denoise(SCHEDULE), ENDS[0] * jax.random.normal(jax.random.key(1), x.shape)
    goal = exact_map(mixture, other)
    times = jdiff.time_of(SCHEDULE, -2 * np.log(grids(n)[grid]))

    def run(x):
        return lambda times: jdiff.sample(OURS[name], denoise, SCHEDULE, x, times)

    times, _ = jdiff.grid.optimize(run(other), SCHEDULE, times, goal, steps=300, learning_rate=0.02)
    return budget, *errors(jax.jit(run(x))(times), truth), calls, n, name, f"learned from {grid}"


def theirs(a, runs, mixture, x, truth):
    """Rows of one library, as those of `ours`."""
    import torch

    torch.set_num_threads(1)  # small arrays: more only wait for each other
    means, variance = torch.tensor(np.array(mixture.means)), float(mixture.covariances[0, 0, 0])
    start, count = torch.tensor(np.array(x)), [0]

    def network(x, sigma):
        count[0] += 1
        x, v = x.double(), variance + sigma.double() ** 2
        share = torch.softmax(-((x[:, None] - means) ** 2).sum(-1) / (2 * v), -1)
        return (variance * x + (v - variance) * share @ means) / v

    def calls(run, n):
        count[0] = 0
        run(network, start[:2], np.geomspace(*ENDS, n))
        return count[0]

    for name, run in runs.items():
        for budget in a.budgets:
            n = most(functools.partial(calls, run), budget)
            used = n and calls(run, n)
            for grid, sigmas in grids(n).items() if n else ():
                yield budget, *errors(run(network, start, sigmas), truth), used, n, name, grid


def collect(library: str, rows) -> list:
    """The rows whose error is a number; says how far it is."""
    kept, last = [], None
    for row in rows:
        if row[-2] != last:
            print(f"  {library} {row[-2]}", flush=True)
        last = row[-2]
        if np.isfinite(row[1]):
            kept.append(row)
    return kept


def table(rows, title: str, top: int = 5) -> str:
    """The best rows, each solver once."""
    seen, lines = set(), [f"| {title} | grid | calls | RMS error | median error |", "|---|---|---|---|---|"]
    for _, rms, median, calls, _, name, grid in sorted(rows, key=lambda row: row[1]):
        if name not in seen and len(seen) < top:
            seen.add(name)
            lines.append(f"| `{name}` | {grid} | {calls} | {rms:.5f} | {median:.2e} |")
    return "\n".join(lines) + "\n"


def compare(a) -> None:
    """Run everything, print the tables, and write them."""
    peers = {"diffusers": (diffusers_runs, "schedulers", None)} if a.peers else {}
    if a.peers:
        peers |= {
            "k_diffusion": (k_diffusion_runs, "sampling", a.k_diffusion),
            "azula": (azula_runs, "sample", a.azula),
        }
    found = {name: (runs, find(name, module, checkout)) for name, (runs, module, checkout) in peers.items()}
    for name, (_, module) in found.items():
        print(f"{name}: {'not found, left out' if module is None else 'found'}", flush=True)
    mixture = target(a.side, a.width)
    x = ENDS[0] * jax.random.normal(jax.random.key(0), (a.points, 2))
    truth = exact_map(mixture, x)
    rows = {"jdiff": collect("jdiff", ours(a, mixture, x, truth))}
    for name, (runs, module) in found.items():
        if module is not None:
            rows[name] = collect(name, theirs(a, runs(module), mixture, x, truth))
    only = f' --only "{a.only}"' if a.only else ""
    text = INTRODUCTION.format(modes=a.side**2, width=a.width, points=a.points, only=only)
    for budget in a.budgets:
        here = {name: [row for row in found if row[0] == budget] for name, found in rows.items()}
        best = {name: min(found, key=lambda row: row[1]) for name, found in here.items() if found}
        text += f"\n## {budget} evaluations\n"
        for name in best:
            text += "\n" + table(here[name], name)
        if a.learn and "jdiff" in best:
            text += "\n" + table(
                [learned(best["jdiff"], mixture, x, truth)], "jdiff, learned grid (not in the verdict)"
            )
        own, others = best.pop("jdiff", None), {name: row[1] for name, row in best.items()}
        if own and others:
            name = min(others, key=others.get)
            verdict = "at least as close as" if own[1] <= others[name] * (1 + 1e-6) else "NOT as close as"
            text += f"\nVerdict: jdiff {own[1]:.5f}, {verdict} the best of the others, {name} {others[name]:.5f}.\n"
    print(text)
    if a.out:
        a.out.write_text(text)
        print(f"wrote {a.out}")


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="benchmarks/accuracy.py")
    if min(a.budgets, default=0) < 2 or a.points < 2 or a.side < 1 or not a.width > 0:
        raise configs.ConfigError("--budgets and --points must be at least 2, --side at least 1, --width positive")
    if not any(a.only.lower() in name.lower() for name in OURS):
        raise configs.ConfigError(f"--only {a.only}: no such solver; known: {', '.join(OURS)}")
    if a.out and not a.out.parent.is_dir():
        raise configs.ConfigError(f"--out {a.out}: its folder does not exist; make it, or name another file")
    with jax.enable_x64(True):
        compare(a)
    return 0


if __name__ == "__main__":
    configs.run_script(main)
