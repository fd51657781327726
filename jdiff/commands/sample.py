"""Sample from a trained run: `jdiff sample RUN_DIR [--num 500 --solver heun --steps 20 ...]`."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jdiff import config as configs
from jdiff import runs
from jdiff.config import Named, Sample
from jdiff.core import files
from jdiff.runs import plot
from jdiff.train import checkpoint, params_file

MOST = 10_000_000  # samples, which are held in memory


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sample from a trained run. Settings left out are those of its config."""

    run_dir: str
    """A run directory made by jdiff train."""
    num: int = 100
    """How many samples."""
    solver: str | None = None
    """Its name: ddpm, ddim, heun, dpmpp_2m, unipc, edm_stochastic, ... (a wrong one lists them all)."""
    eta: float | None = None
    """Stochasticity of the solvers that have it, as ddim: 0 is deterministic, 1 is ddpm."""
    solver_args: tuple[str, ...] = ()
    """The solver's other settings as name=value: order=3, churn=40, start=single_step."""
    grid: str | None = None
    """Its name: uniform, log_snr, karras, polyexponential, beta, discrete, sigmas, ..."""
    grid_args: tuple[str, ...] = ()
    """The grid's settings as name=value: rho=5, spacing=trailing, sigmas=[10,3,1,0.1]."""
    steps: int | None = None
    """Times of the grid: network calls of a one-evaluation solver."""
    guidance: float | None = None
    """Weight of classifier-free guidance; 1 is none."""
    clip: float | None = None
    """Keep estimates of x_0 within plus and minus this."""
    labels: tuple[int, ...] = ()
    """Classes to cycle through; all when left out."""
    seed: int = 0
    """Sample i is a function of (seed, i) and its label."""
    step: int | None = None
    """The checkpoint to use; the newest when left out."""
    params: str | None = None
    """An average made by jdiff average, in place of a checkpoint's."""
    out: str = "samples.png"
    """Where to: a .png picture, or an .npz with `samples` and `labels` (-1 where there are no classes)."""


def main(argv: list[str]) -> int:
    """Draw samples of a run into a file; return the exit status."""
    a = configs.parse(Arguments, argv, prog="jdiff sample")
    out = Path(a.out)
    if out.suffix not in (".png", ".npz"):
        raise configs.ConfigError(f"--out {a.out}: expected a name that ends in .png or .npz")
    if not 1 <= a.num <= MOST:
        raise configs.ConfigError(f"--num must be positive, at most {MOST:,}, got {a.num}")
    configs.check_seed(a.seed)
    configs.check_writable(out)
    run = runs.open_run(a.run_dir)
    sampling = asked(a, run.config.sample)
    dataclasses.replace(run.config, sample=sampling)  # checks the numbers
    configs.build_sampler(sampling, run.schedule)
    source, params = restored(a, run)

    x, labels = runs.draw(run, params, jax.random.key(a.seed), a.num, sampling, a.labels or None)
    samples = run.dataset.to_data(x)
    if out.suffix == ".npz":
        labels = np.full(a.num, -1) if labels is None else labels  # -1: this run has no classes
        labels = labels.astype(np.int32)
        files.write(out, lambda file: np.savez_compressed(file, samples=samples, labels=labels))
    elif run.dataset.is_image:
        plot.image_grid(out, samples, columns=min(a.num, max(10, int(np.sqrt(a.num)))))
    else:
        real = run.dataset.held_x if len(run.dataset.held_x) else run.dataset.x
        plot.plane_figure(out, [(0.0, real)], [(0.0, samples)])
    words = f"{sampling.solver.name}, {sampling.steps} steps, guidance {sampling.guidance:g}"
    print(f"{a.num} samples of {source} ({words}) in {out}")
    return 0


def asked(a: Arguments, old: Sample) -> Sample:
    """The settings of the run's config, with those of the command line in their place."""
    eta = {} if a.eta is None else {"eta": a.eta}
    given = {name: getattr(a, name) for name in ("steps", "guidance", "clip") if getattr(a, name) is not None}
    solver = changed(old.solver, a.solver, a.solver_args, eta)
    return dataclasses.replace(old, num=a.num, solver=solver, grid=changed(old.grid, a.grid, a.grid_args), **given)


def changed(old: Named, name: str | None, texts: tuple[str, ...], added: dict | None = None) -> Named:
    """`old` with other arguments; those of `old` are dropped if another name is given."""
    base = old if name in (None, old.name) else Named(name)
    return Named(base.name, base.args | dict(map(configs.setting, texts)) | (added or {}))


def restored(a: Arguments, run: runs.Run):
    """(where the parameters are from, in words; the parameters)."""
    try:
        if a.params is not None:
            with checkpoint.told():
                return a.params, params_file.load_params(a.params, runs.like(run))
        step, params = runs.restore_ema(run, a.step)
        return f"step {step:,}", params
    except checkpoint.CheckpointError as error:
        offer = f"; use it with --step {error.last_good}" if error.last_good is not None else ""
        raise configs.ConfigError(f"{error}{offer}") from error


if __name__ == "__main__":
    configs.run_script(main)
