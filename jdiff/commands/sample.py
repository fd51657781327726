"""Sample from a trained run: `jdiff sample RUN_DIR [--num 500 --solver heun --steps 20 ...]`."""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jdiff import config as configs
from jdiff import runs
from jdiff.commands import options
from jdiff.core import files
from jdiff.runs import plot
from jdiff.train import checkpoint, params_file

MOST = 10_000_000  # samples, which are held in memory


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sample from a trained run."""

    run_dir: str
    """A run directory made by jdiff train."""
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
    a, sampling = options.parse(Arguments, argv, prog="jdiff sample", description="Sample from a trained run.")
    out = Path(a.out)
    if out.suffix not in (".png", ".npz"):
        raise configs.ConfigError(f"--out {a.out}: expected a name that ends in .png or .npz")
    if not 1 <= sampling.num <= MOST:
        raise configs.ConfigError(f"--num must be positive, at most {MOST:,}, got {sampling.num}")
    configs.check_seed(a.seed)
    configs.check_writable(out)
    run = runs.open_run(a.run_dir)
    dataclasses.replace(run.config, sample=sampling)  # checks the numbers
    configs.build_sampler(sampling, run.schedule)
    num, (source, params) = sampling.num, restored(a, run)

    x, labels = runs.draw(run, params, jax.random.key(a.seed), num, sampling, a.labels or None)
    samples = run.dataset.to_data(x)
    if out.suffix == ".npz":
        labels = np.full(num, -1) if labels is None else labels  # -1: this run has no classes
        labels = labels.astype(np.int32)
        files.write(out, lambda file: np.savez_compressed(file, samples=samples, labels=labels))
    elif run.dataset.is_image:
        plot.image_grid(out, samples, columns=min(num, max(10, int(np.sqrt(num)))))
    else:
        real = run.dataset.held_x if len(run.dataset.held_x) else run.dataset.x
        plot.plane_figure(out, [(0.0, real)], [(0.0, samples)])
    words = f"{sampling.solver.name}, {sampling.steps} steps, guidance {sampling.guidance:g}"
    print(f"{num} samples of {source} ({words}) in {out}")
    return 0


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
