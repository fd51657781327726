"""The table of solvers: measured order on every schedule, and error at 10 and 20 evaluations.

python benchmarks/orders.py --out docs/solvers.md      # 5 minutes on 2 CPU cores

Everything is in float64, against the exact probability-flow map (SciPy, 1e-11) of a mixture of two full Gaussians from
t = 0.7 to 0.05, on grids that are even in log-SNR. Order: the slope of log error over log steps, at 64, 128 and 256
steps. Error: root mean square over 32 points, relative to the data's standard deviation.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from scipy.integrate import solve_ivp

import jdiff
from jdiff import config as configs
from jdiff import solvers

START, END = 0.7, 0.05
COUNTS = np.array([64, 128, 256])
SCHEDULES = {
    "VP": jdiff.VP(),
    "sub-VP": jdiff.SubVP(),
    "VE": jdiff.VE(),
    "EDM": jdiff.EDM(),
    "cosine": jdiff.Cosine(),
    "flow": jdiff.Flow(),
}
DETERMINISTIC = {
    "DDIM(), Euler()": solvers.Euler(),
    "Heun()": solvers.Heun(),
    "RK4()": solvers.RK4(),
    "DPM2()": solvers.DPM2(),
    "DPMSolver(3)": solvers.DPMSolver(3),
    "DPMSolverM(2)": solvers.DPMSolverM(2),
    "DPMpp2S()": solvers.DPMpp2S(),
    "DPMpp2M()": solvers.DPMpp2M(),
    "DPMpp3M()": solvers.DPMpp3M(),
    "DPMpp3M(single_step)": solvers.DPMpp3M("single_step"),
    "UniPC(1)": solvers.UniPC(1),
    "UniPC(2)": solvers.UniPC(2),
    "UniPC(2, bh1)": solvers.UniPC(2, "bh1"),
    "UniPC(3)": solvers.UniPC(3),
    "UniPC(3, single_step)": solvers.UniPC(3, start="single_step"),
    "SASolver(2, tau=0)": solvers.SASolver(tau=0.0),
    "LMS(4)": solvers.LMS(),
    "LMS(4, single_step)": solvers.LMS(start="single_step"),
    "DEIS(3)": solvers.DEIS(),
    "DEIS(3, single_step)": solvers.DEIS(start="single_step"),
    "DEIS(3, log_rho, single_step)": solvers.DEIS(3, "log_rho", "single_step"),
    "ExponentialAB(3, eps, single_step)": solvers.ExponentialAB(3, "eps", "single_step"),
    "ExponentialAB(4, x0, single_step)": solvers.ExponentialAB(4, "x0", "single_step"),
    "ExponentialAB(5, eps, single_step)": solvers.ExponentialAB(5, "eps", "single_step"),
    "PNDM()": solvers.PNDM(),
    "PNDM(trapezoid)": solvers.PNDM("trapezoid"),
    "IPNDM()": solvers.IPNDM(),
    "GradientEstimation()": solvers.GradientEstimation(),
    "EulerMaruyama(0)": solvers.EulerMaruyama(0.0),
}
MIXTURE = jdiff.oracle.GaussianMixture(
    [0.4, 0.6], [[0.8, -0.5], [-0.6, 0.7]], [[[0.4, 0.1], [0.1, 0.3]], [[0.3, -0.1], [-0.1, 0.5]]]
)


INTRODUCTION = """# Solvers, measured

Made by `python benchmarks/orders.py`. Each cell: the measured order of convergence, then the relative error at 10 and
20 evaluations, against the exact probability-flow map of a Gaussian mixture from t = 0.7 to 0.05 in float64, on grids
even in log-SNR. `nominal` is the method's own order; of those above 2, the ones that start with low orders are held to
second order by their start, and the ones marked `single_step` are not. PNDM is of second order by construction.

"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure every solver on every schedule and write the table."""

    out: str = "docs/solvers.md"
    """The Markdown file to write."""
    only: str = ""
    """Solvers whose name contains this; all when left out."""


def evaluations(solver, steps: int) -> int:
    """Network calls of so many steps, without the last denoise."""
    if isinstance(solver, solvers.SingleStep):
        return steps * len(solver.tableau)
    if isinstance(solver, solvers.RungeKutta):
        return steps * len(solver.rows)
    if isinstance(solver, solvers.Multistep) and solver.start is not None:
        return steps + min(steps, solver.start.count) * (len(solver.start.tableau) - 1)
    return steps


def affordable(solver, budget: int) -> int:
    """The most steps that `budget` evaluations allow."""
    return max((n for n in range(1, budget + 1) if evaluations(solver, n) <= budget), default=0)


def exact_flow(schedule, denoise, x):
    """The probability-flow map from START to END."""
    velocity = jax.jit(jdiff.sde.probability_flow(denoise, schedule))

    def rhs(t, flat):
        return np.asarray(velocity(jnp.asarray(flat.reshape(x.shape)), jnp.asarray(t))).ravel()

    return solve_ivp(rhs, (START, END), np.asarray(x).ravel(), method="DOP853", rtol=1e-11, atol=1e-11).y[:, -1]


def measure(schedule, names) -> dict:
    """{name: (order, error at 10, error at 20 evaluations)} on one schedule."""
    denoise = MIXTURE.denoise(schedule)
    x = jdiff.prior(schedule, jax.random.key(0), (32, 2), START, dtype=jnp.float64)
    truth = exact_flow(schedule, denoise, x).reshape(x.shape)
    spread = float(jnp.sqrt(jnp.trace(MIXTURE.moments()[1]) / 2))
    ends = jdiff.log_snr(schedule, jnp.array([START, END]))

    @jax.jit
    def error(solver, steps):
        u = jnp.minimum(jnp.arange(COUNTS[-1] + 1) / steps, 1)
        times = jdiff.time_of(schedule, ends[0] + u * (ends[1] - ends[0]))
        path = jdiff.sample(solver, denoise, schedule, x, times, n=steps + 1, path=True)[1]
        return jnp.sqrt(jnp.mean((path[-1] - truth) ** 2)) / spread

    out = {}
    for name in names:
        solver = DETERMINISTIC[name]
        errors = np.array([float(error(solver, int(n))) for n in COUNTS])
        at = [affordable(solver, budget) for budget in (10, 20)]
        order = -np.polyfit(np.log(COUNTS), np.log(errors), 1)[0]
        out[name] = (order, *(float(error(solver, n)) if n else float("nan") for n in at))
        print(f"  {name:36s} order {order:5.2f}, errors {out[name][1]:.1e} {out[name][2]:.1e}", flush=True)
    return out


def table(results: dict, names) -> str:
    """The results as Markdown: one row a solver, one column a schedule."""
    head = "| solver | nominal | " + " | ".join(SCHEDULES) + " |\n|---|---|" + "---|" * len(SCHEDULES) + "\n"
    rows = [
        f"| `{name}` | {DETERMINISTIC[name].order} | "
        + " | ".join("{:.2f}: {:.0e}, {:.0e}".format(*results[s][name]) for s in SCHEDULES)
        + " |\n"
        for name in names
    ]
    return head + "".join(rows)


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="benchmarks/orders.py")
    names = [name for name in DETERMINISTIC if a.only.lower() in name.lower()]
    if not names:
        raise configs.ConfigError(f"--only {a.only}: no such solver; known: {', '.join(DETERMINISTIC)}")
    if not Path(a.out).parent.is_dir():
        raise configs.ConfigError(f"--out {a.out}: its folder does not exist; make it, or name another file")
    jax.config.update("jax_enable_x64", True)
    results = {}
    for label, schedule in SCHEDULES.items():
        print(label, flush=True)
        results[label] = measure(schedule, names)
    Path(a.out).write_text(INTRODUCTION + table(results, names))
    print(f"wrote {a.out}")
    return 0


if __name__ == "__main__":
    configs.run_script(main)
