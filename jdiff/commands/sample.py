"""Sample from a trained run: `jdiff sample RUN_DIR [--num 500 --solver heun --steps 20 ...]`."""

import dataclasses
import functools
from pathlib import Path

import jax
import numpy as np

from jdiff import config as configs
from jdiff import runs
from jdiff.commands import options
from jdiff.core import files
from jdiff.runs import plot
from jdiff.runs.pictures import grid
from jdiff.runs.progress import Progress
from jdiff.train import checkpoint, params_file

MOST = 10_000_000  # samples, which are held in memory


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Sample from a trained run."""

    run_dir: str
    """A run directory made by jdiff train."""
    labels: tuple[str, ...] = ()
    """Classes to cycle through, by name or number; all when left out."""
    seed: int = 0
    """Sample i is a function of (seed, i) and its label."""
    step: int | None = None
    """The checkpoint to use; the newest when left out."""
    params: str | None = None
    """An average made by jdiff average, in place of a checkpoint's."""
    out: str = "samples.png"
    """Where to: a .png picture, or an .npz with `samples`, `labels` (-1 without classes) and `class_names`."""


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
    asked = classes(a.labels, run)
    num, (source, params) = sampling.num, restored(a, run)

    x, labels = runs.draw(run, params, jax.random.key(a.seed), num, sampling, asked, progress=Progress())
    samples, shown = run.facts.to_data(x), num
    if out.suffix == ".npz":
        labels = np.full(num, -1) if labels is None else labels  # -1: this run has no classes
        labels, class_names = labels.astype(np.int32), np.array(run.facts.class_names, str)
        arrays = functools.partial(np.savez_compressed, samples=samples, labels=labels, class_names=class_names)
        files.write(out, arrays)
    elif run.facts.is_image:
        shown = grid(run, out, samples, labels)
    else:
        real = run.facts.points
        plot.plane_figure(out, [] if real is None else [(0.0, real)], [(0.0, samples)])
    guide = "" if sampling.guide.name == "cfg" else f" by {sampling.guide.name}"
    words = f"{sampling.solver.name}, {sampling.steps} steps, guidance {sampling.guidance:g}{guide}"
    part = f"; the picture has room for {shown:,} of them, and an .npz for all" if shown < num else ""
    print(f"{num} samples of {source} ({words}) in {out}{part}")
    return 0


def classes(words: tuple[str, ...], run: runs.Run) -> list[int] | None:
    """The numbers of the classes that words name; None for no words."""
    try:
        return [run.facts.number_of(word) for word in words] or None
    except ValueError as error:
        raise configs.ConfigError(f"--labels: {error}") from error


def restored(a: Arguments, run: runs.Run):
    """(where the parameters are from, in words; the parameters)."""
    try:
        if a.params is not None:
            return a.params, params_file.load_params(a.params, runs.like(run))
        step, params = runs.restore_ema(run, a.step)
        return f"step {step:,}", params
    except checkpoint.CheckpointError as error:
        offer = f"; use it with --step {error.last_good}" if error.last_good is not None else ""
        raise configs.ConfigError(f"{error}{offer}") from error


if __name__ == "__main__":
    configs.run_script(main)
