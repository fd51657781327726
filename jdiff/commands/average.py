"""Reconstruct an average of the parameters after training: `jdiff average RUN_DIR --sigma-rel 0.075`.

From the snapshots in RUN_DIR/snapshots, which a run leaves that tracks power-function averages. arXiv:2312.02696.
"""

import dataclasses
import warnings
from pathlib import Path

from jdiff import config as configs
from jdiff.train import ema, params_file, posthoc

POOR = 0.1  # the profile's relative error above which its samples are another profile's


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Reconstruct an average of the parameters from a run's snapshots."""

    run_dir: str
    """A run directory made by jdiff train, with snapshots of power-function averages."""
    sigma_rel: float | None = None
    """Width of the wanted average, relative to the run up to --step: 0.05 is short, 0.15 long."""
    step: int | None = None
    """The step at which the average ends; the last snapshot's when left out."""
    out: str | None = None
    """Where to, an .npz; RUN_DIR/posthoc/SIGMA_REL-STEP.npz when left out."""
    list: bool = False
    """Only list the snapshots and what has been reconstructed."""


def main(argv: list[str]) -> int:
    """Reconstruct an average, or list what there is; return the exit status."""
    a = configs.parse(Arguments, argv, prog="jdiff average")
    run = Path(a.run_dir)
    if not run.is_dir():
        raise configs.ConfigError(f"there is no directory {run}; expected one made by jdiff train")
    found = posthoc.snapshots(run / "snapshots")
    if a.list:
        show("snapshots (step, sigma_rel)", [f"{s.step:>9,}  {s.sigma_rel:g}" for s in found])
        show("reconstructed (sigma_rel-step)", sorted(p.stem for p in (run / "posthoc").glob("*.npz")))
        return 0
    if a.sigma_rel is None:
        raise configs.ConfigError("--sigma-rel is missing: the width of the wanted average, such as 0.075; or --list")
    if not found:
        raise configs.ConfigError(f"no snapshots in {run / 'snapshots'}: train with averages of power profiles first")
    try:
        gamma = ema.gamma_of(a.sigma_rel)
    except ValueError as error:
        raise configs.ConfigError(f"--sigma-rel {a.sigma_rel}: {error}") from error
    step = found[-1].step if a.step is None else a.step
    if not 1 <= step <= found[-1].step:
        raise configs.ConfigError(f"--step {step}: expected a step from 1 to {found[-1].step}, the last snapshot's")
    out = run / "posthoc" / f"{a.sigma_rel:g}-{step}.npz" if a.out is None else Path(a.out)
    if out.suffix != ".npz":
        raise configs.ConfigError(f"--out {out}: expected a name that ends in .npz")

    # what ends before the wanted step, and the next ones: those after know nothing more of it
    enough = min(s.step for s in found if s.step >= step)
    used = [s for s in found if s.step <= enough]
    steps, gammas = [s.step for s in used], [s.gamma for s in used]
    weights = posthoc.coefficients(steps, gammas, step, gamma)
    misfit = posthoc.misfit(steps, gammas, weights, step, gamma)
    weighted = [(s, weight) for s, weight in zip(used, weights, strict=True) if weight]
    average = posthoc.combine(posthoc.load(s for s, _ in weighted), [weight for _, weight in weighted])
    params_file.write_params(out, average)
    print(
        f"sigma_rel {a.sigma_rel:g} at step {step:,} from {len(weighted)} snapshots, profile error {misfit:.2%}: {out}"
    )
    if misfit > POOR:
        warnings.warn("the snapshots are too few for this profile: take them more often", stacklevel=2)
    return 0


def show(title: str, lines: list[str]) -> None:
    """Print lines under a title."""
    print(f"{title}:")
    print("\n".join(f"  {line}" for line in lines) or "  none")


if __name__ == "__main__":
    configs.run_script(main)
