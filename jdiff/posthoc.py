"""Post-hoc averages: snapshots of two power-function averages, from which any other profile is reconstructed.

Karras et al. 2024, arXiv:2312.02696, section 3.2 and appendix C.3. A profile (t, gamma) weighs the parameters of time
tau <= t by p(tau) = (gamma + 1) tau^gamma / t^(gamma + 1): what `ema.power_gamma` tracks. A profile that was not
tracked is the nearest combination of snapshots that were: train once, choose the length of the average afterwards.

`DIR/STEP-SIGMA_REL.npz`, one file a snapshot: each array with its CRC-32, no pickles. Files appear whole or not at all.
"""

import contextlib
import os
import re
import zlib
from collections.abc import Iterable
from pathlib import Path
from typing import Any, NamedTuple
from zipfile import BadZipFile

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.checkpoint import CheckpointError
from jdiff.ema import gamma_of
from jdiff.parallel import host

# ---------------------------------------------------------------- which snapshots, how much of each


def coefficients(steps, gammas, step: float, gamma: float) -> np.ndarray:
    """The weights, (N,), of snapshots (steps[i], gammas[i]) that reconstruct the profile (step, gamma). float64.

    They minimise the integral of (p - sum_i x_i p_i)^2 over time subject to sum_i x_i = 1, so that what the parameters
    have in common stays; a profile that is among the snapshots is that snapshot. arXiv:2312.02696 algorithm 3, which
    divides by the sum instead: the same for many snapshots, half the error for few.
    Raises ValueError for no snapshots, one that is there twice, steps < 1, gammas <= -1/2 (their profiles have no
    norm), and a step past the last snapshot.
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
    """How far the combined profile is from (step, gamma): the norm of the difference over that of the profile."""
    t, g = np.broadcast_arrays(np.float64(steps), np.float64(gammas))
    own = _dot(step, gamma, step, gamma)
    square = own - 2 * weights @ _dot(t, g, step, gamma) + weights @ _dot(t[:, None], g[:, None], t, g) @ weights
    return float(np.sqrt(max(square, 0.0) / own))


def _dot(t, g, s, h):
    """The integral of p_(t, g) p_(s, h) over time: (g+1)(h+1)/(g+h+1) (short/long)^(gamma of the long) / long."""
    short, long = np.minimum(t, s), np.maximum(t, s)
    return (g + 1) * (h + 1) / (g + h + 1) * (short / long) ** np.where(t < s, h, g) / long


def combine(snapshots: Iterable[Any], weights) -> Any:
    """sum_i weights[i] snapshots[i], leaf by leaf, summed in float64, in the dtypes of the snapshots; NumPy arrays.

    `snapshots` may be a generator: they are taken one at a time. Leaves that are not floating are those of the last.
    Raises ValueError unless there are as many as weights.
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
    """An average on disk: the step it was taken at, its profile's relative width, its file."""

    step: int
    sigma_rel: float
    path: Path

    @property
    def gamma(self) -> float:
        """The exponent of its profile."""
        return gamma_of(self.sigma_rel)


def store(directory, step: int, averages: dict) -> list[Path]:
    """Write the averages {sigma_rel: params} of `ema.power(sigma_rel)` after `step` steps; the files.

    Under several processes all of them call this, and the first writes. An older file of the same name is replaced.
    Raises ValueError for a step < 1 or a key that is no sigma_rel, OSError where the directory cannot be written.
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
        write_params(paths[-1], params)
    return paths


def snapshots(directory) -> list[Snapshot]:
    """The snapshots in a directory, by step and width; none if there is no such directory."""
    directory = Path(directory)
    found = []
    for path in directory.iterdir() if directory.is_dir() else ():
        match = re.fullmatch(r"(\d+)-([\d.]+(?:e-\d+)?)\.npz", path.name)
        if match:
            found.append(Snapshot(int(match[1]), float(match[2]), path))
    return sorted(found)


def write_params(path, params: Any) -> None:
    """Write a tree of arrays as .npz, whole or not at all. Raises OSError naming the path if that fails."""
    path = Path(path)
    arrays = {}
    for name, leaf in _leaves(params):
        whole = host(leaf)
        if jax.process_index() == 0:
            arrays[f"ema/{name}"] = np.float32(whole) if whole.dtype.kind == "V" else whole  # bfloat16 is not NumPy's
    if jax.process_index():
        return
    temporary = path.with_name(path.name + ".tmp")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with temporary.open("wb") as file:
            np.savez(file, allow_pickle=False, **arrays)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(path)
    except OSError as error:
        with contextlib.suppress(OSError):
            temporary.unlink()
        raise OSError(f"cannot write {path}: {error.strerror or error}") from error


def read(path) -> dict[str, np.ndarray]:
    """{name: array} of a file of `store` or `write_params`. Raises CheckpointError if it is missing or damaged."""
    path = Path(path)
    if not path.is_file():
        raise CheckpointError(f"there is no {path}")
    try:
        with np.load(path, allow_pickle=False) as archive:
            return {name.removeprefix("ema/"): archive[name] for name in archive.files}
    except (
        OSError,
        ValueError,
        KeyError,
        EOFError,
        NotImplementedError,
        RuntimeError,
        BadZipFile,
        zlib.error,
    ) as error:
        raise CheckpointError(f"{path} is damaged ({' '.join(f'{type(error).__name__}: {error}'.split())})") from error


def load_params(path, like: Any) -> Any:
    """The tree in a file of `store` or `write_params`, in the structure, shapes and dtypes of `like`; NumPy arrays.

    Raises CheckpointError if the file is missing, damaged or of another model.
    """
    arrays = read(path)
    names = {name: leaf for name, leaf in _leaves(like)}
    for what, odd in (("missing", names.keys() - arrays.keys()), ("unexpected", arrays.keys() - names.keys())):
        if odd:
            more = f" and {len(odd) - 1} more" if len(odd) > 1 else ""
            raise CheckpointError(f"{path} is of another model: {what} {min(odd)}{more}")
    for name, leaf in names.items():
        if arrays[name].shape != tuple(leaf.shape):
            shapes = f"{arrays[name].shape}, expected {tuple(leaf.shape)}"
            raise CheckpointError(f"{path} is of another model: {name} has shape {shapes}")
    leaves = [arrays[name].astype(leaf.dtype, copy=False) for name, leaf in names.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves)


def _leaves(tree):
    leaves, _ = jax.tree_util.tree_flatten_with_path(tree)
    return [(jax.tree_util.keystr(path, simple=True, separator="/"), leaf) for path, leaf in leaves]
