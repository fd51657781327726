"""Post-hoc averages: snapshots of two power-function averages, from which any other profile is reconstructed.

A profile (t, gamma) weighs the parameters of time tau <= t by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1), which is
what `ema.power_gamma` tracks. A profile that was not tracked is approximated by the nearest combination of snapshots.
So a run is trained once, and the length of its average is chosen afterwards.

Each snapshot is one file `DIR/STEP-SIGMA_REL.npz` (see `train.params_file`). Its record notes the step and sigma_rel.

Reference: Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.3.
"""

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.trees import shape_difference
from jdiff.train.checkpoint import CheckpointError
from jdiff.train.ema import gamma_of
from jdiff.train.params_file import SNAPSHOT, read_recorded, warn_unverified, write_params

# ---------------------------------------------------------------- which snapshots, how much of each


def coefficients(steps, gammas, step: float, gamma: float) -> np.ndarray:
    """The weights of snapshots that reconstruct the profile (step, gamma).

    They minimise the integral of (p - sum_i x_i p_i)^2 over time under the constraint sum_i x_i = 1, so that what the
    parameters have in common stays. A profile that is among the snapshots is that snapshot. Algorithm 3 of the paper
    divides by the sum instead: for many snapshots that is the same, and for few its error is twice as large.

    Args:
        steps: the step of each snapshot (N,), 1 or more.
        gammas: the exponent of each snapshot's profile (N,), or one for all; above -1/2, or profiles have no norm.
        step: the step at which the wanted profile ends, at most the last of `steps`.
        gamma: the exponent of the wanted profile.

    Returns:
        The weights (N,), float64.

    Raises:
        ValueError: an argument is outside its range, a snapshot is given twice, or there is none.

    Reference:
        arXiv:2312.02696 algorithm 3.
    """
    t, g = np.broadcast_arrays(np.atleast_1d(np.float64(steps)), np.float64(gammas))
    if t.ndim != 1 or not t.size:
        raise ValueError(f"steps and gammas are those of at least one snapshot, (N,); got shape {t.shape}")
    if not (t >= 1).all() or not (g > -0.5).all() or not step >= 1 or not gamma > -0.5:
        raise ValueError("the steps of profiles must be 1 or more, and their gammas above -0.5")
    if len(set(zip(t, g, strict=True))) < t.size:
        raise ValueError("a snapshot is given twice: each pair of step and gamma may be there once")
    if step > t.max():
        raise ValueError(f"step {step:g} is past the last snapshot, which is of step {t.max():g}")
    same = (t == step) & (g == gamma)
    if same.any():
        return same.astype(np.float64)
    # in units of the snapshots' norms: of profiles that overlap, the wide ones are orders of magnitude smaller
    norm = np.sqrt(_dot(t, g, t, g))
    gram = _dot(t[:, None], g[:, None], t, g) / (norm[:, None] * norm)
    free, ones = np.linalg.solve(gram, np.stack([_dot(t, g, step, gamma) / norm, 1 / norm], axis=1)).T
    free, ones = free / norm, ones / norm
    return free + ones * (1 - free.sum()) / ones.sum()


def misfit(steps, gammas, weights, step: float, gamma: float) -> float:
    """How far a combined profile is from (step, gamma): the norm of the difference over the norm of the profile.

    Args:
        steps, gammas, step, gamma: as in `coefficients`.
        weights: the weight of each snapshot (N,).
    """
    t, g = np.broadcast_arrays(np.float64(steps), np.float64(gammas))
    norm = _dot(step, gamma, step, gamma)
    square = norm - 2 * weights @ _dot(t, g, step, gamma) + weights @ _dot(t[:, None], g[:, None], t, g) @ weights
    return float(np.sqrt(max(square, 0.0) / norm))


def _dot(t, g, s, h):
    """The integral of p_(t, g) p_(s, h) over time: (g+1)(h+1)/(g+h+1) (short/long)^(gamma of the long) / long."""
    short, long = np.minimum(t, s), np.maximum(t, s)
    return (g + 1) * (h + 1) / (g + h + 1) * (short / long) ** np.where(t < s, h, g) / long


def combine(snapshots: Iterable[Any], weights) -> Any:
    """sum_i weights[i] snapshots[i], leaf by leaf, summed in float64.

    Args:
        snapshots: trees of one structure; a generator holds one of them in memory at a time.
        weights: as many numbers.

    Returns:
        A tree of NumPy arrays in the dtypes of the snapshots. Leaves that are not floating are those of the last one.

    Raises:
        ValueError: there are no snapshots, or not as many as weights.
    """
    sums = None
    for weight, tree in zip(weights, snapshots, strict=True):
        leaves, structure = jax.tree.flatten(tree)
        leaves = [np.asarray(leaf) for leaf in leaves]
        floating = [jnp.issubdtype(leaf.dtype, jnp.floating) for leaf in leaves]
        if sums is None:
            sums = [np.zeros(leaf.shape, np.float64) for leaf in leaves]
        for sum, leaf, counts in zip(sums, leaves, floating, strict=True):
            if counts:
                sum += weight * leaf.astype(np.float64)
    if sums is None:
        raise ValueError("there are no snapshots to combine")
    mixed = [sum.astype(a.dtype) if counts else a for sum, a, counts in zip(sums, leaves, floating, strict=True)]
    return jax.tree.unflatten(structure, mixed)


# ---------------------------------------------------------------- files


class Snapshot(NamedTuple):
    """An average on disk: the step at which it was taken, the relative width of its profile, and its file."""

    step: int
    sigma_rel: float
    path: Path

    @property
    def gamma(self) -> float:
        """The exponent of its profile."""
        return gamma_of(self.sigma_rel)


def store(directory, step: int, averages: dict) -> list[Path]:
    """Write averages as snapshots; under several processes all of them call this, and the first writes.

    An older file of the same name is replaced.

    Args:
        directory: where the files go.
        step: the number of steps taken, 1 or more.
        averages: {sigma_rel: parameters}, each the average of `ema.power(sigma_rel)`.

    Returns:
        The files.

    Raises:
        ValueError: the step is below 1, or a key is no sigma_rel.
        OSError: a file could not be written.
    """
    if int(step) < 1:
        raise ValueError(f"a snapshot is taken after a step, 1 or later; got {step}")
    widths = {}
    for key in averages:
        try:
            widths[key] = float(key)
            gamma_of(widths[key])
        except ValueError as error:
            raise ValueError(f"averages are keyed by their sigma_rel, such as 0.05; got {key!r}") from error
    paths = []
    for key, params in averages.items():
        paths.append(Path(directory) / f"{int(step)}-{widths[key]!r}.npz")
        write_params(paths[-1], params, dict(step=int(step), sigma_rel=widths[key]))
    return paths


def snapshots(directory) -> list[Snapshot]:
    """The snapshots in a directory, sorted by step and width; none if there is no such directory.

    Raises:
        CheckpointError: a file has the form of a snapshot's name and says an impossible step or width, or two files say
            the same ones.
    """
    directory = Path(directory)
    found: dict[tuple, Snapshot] = {}  # by step and sigma_rel
    for path in sorted(directory.iterdir()) if directory.is_dir() else ():
        if match := SNAPSHOT.fullmatch(path.name):
            try:
                snapshot = Snapshot(int(match[1]), float(match[2]), path)
                snapshot.gamma  # noqa: B018  it raises
            except ValueError as error:
                raise CheckpointError(f"{path} is no snapshot: {error}; put it elsewhere") from error
            if not snapshot.step:
                raise CheckpointError(f"{path} is no snapshot: it is of step 0, expected 1 or more; put it elsewhere")
            if other := found.get(snapshot[:2]):
                raise CheckpointError(f"{path} and {other.path.name} are of one step and sigma_rel; put one elsewhere")
            found[snapshot[:2]] = snapshot
    return sorted(found.values())


def load(snapshots: Iterable[Snapshot]) -> Iterator[dict[str, np.ndarray]]:
    """The arrays {name: array} of each snapshot in turn, as `combine` takes them.

    Each file is compared with its name, with its checksums and with the model of the first one. Files of earlier
    versions have no checksums: a `CheckpointWarning` says so at the end.

    Raises:
        CheckpointError: a file is missing, damaged, renamed or of another model; the message names it.
    """
    first: Snapshot | None = None
    shapes: dict[str, tuple[int, ...]] = {}  # those of the first one
    old: list[Snapshot] = []
    for snapshot in snapshots:
        arrays, record = read_recorded(snapshot.path)
        found = {name: array.shape for name, array in arrays.items()}
        if first is None:
            first, shapes = snapshot, found
        elif difference := shape_difference(found, shapes):
            raise CheckpointError(f"{snapshot.path} is of another model than {first.path.name}: {difference}")
        if record is None:
            old.append(snapshot)
        yield arrays
    if old:
        warn_unverified(f"{old[0].path} and {len(old) - 1} more are" if len(old) > 1 else f"{old[0].path} is")
