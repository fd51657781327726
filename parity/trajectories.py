"""Trajectories of every solver beside those of another checkout of jdiff: `python parity/trajectories.py CHECKOUT`.

Every solver that a config can name, with its defaults, on every schedule, float32, from the same noise, with the same
network and key: the largest difference of any state is printed, relative to the largest number of the trajectory. Exit
status 1 if one is above 1e-6. A change of the code that should change no number is checked so.
"""

import dataclasses
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Annotated

import numpy as np
import tyro

TOLERANCE = 1e-6
# run by the interpreter of each checkout; it uses nothing but names that all versions have
PROGRAM = """
import sys
import jax, jax.numpy as jnp, numpy as np
import jdiff
from jdiff.config import SOLVERS

print("from", jdiff.__file__)

schedules = [
    jdiff.VP(), jdiff.SubVP(), jdiff.VE(), jdiff.EDM(), jdiff.Cosine(), jdiff.Flow(),
    jdiff.discrete(jdiff.betas.linear(100)),
]


@jax.tree_util.register_pytree_node_class
class OneOf(getattr(jdiff, "Schedule", object)):
    # the schedule of this number: one program serves all

    def __init__(self, which):
        self.which = which

    def _switch(self, f, *args):
        return jax.lax.switch(self.which, [lambda *args, one=one: f(one, *args) for one in schedules], *args)

    t_min = property(lambda self: self._switch(lambda one: jnp.float32(one.t_min)))
    t_max = property(lambda self: self._switch(lambda one: jnp.float32(one.t_max)))

    def alpha(self, t):
        return self._switch(lambda one, t: one.alpha(t), jnp.asarray(t, jnp.float32))

    def sigma(self, t):
        return self._switch(lambda one, t: one.sigma(t), jnp.asarray(t, jnp.float32))

    def time_at(self, alpha, sigma):
        ratio = jnp.asarray(alpha, jnp.float32), jnp.asarray(sigma, jnp.float32)
        return self._switch(lambda one, *ratio: one.time_at(*ratio), *ratio)

    def tree_flatten(self):
        return (self.which,), None

    @classmethod
    def tree_unflatten(cls, _, children):
        return cls(*children)


needs = {"annealed_langevin": dict(steps=3)}


def network(params, x, label, cond):
    return jnp.tanh(x @ params["a"] + label[:, None] * params["b"]), 0 * x


params = {"a": jnp.array([[1.0, -0.4], [0.3, 0.8]]), "b": jnp.array([0.5, -0.2])}
apply = lambda params, x, label, cond: jnp.concatenate(network(params, x, label, cond), -1)
out = {}
grids = [jdiff.grid.log_snr(schedule, 8) for schedule in schedules]
noise = jax.random.normal(jax.random.key(0), (3, 2))
for name, make in SOLVERS.items():
    solver = make(**needs.get(name, {}))

    @jax.jit
    def run(which, times):
        schedule = OneOf(which)
        denoise = jdiff.denoiser(apply, params, schedule, jdiff.targets.EDM(), learned_variance=True)
        x = schedule.sigma(times[0]) * noise
        return jdiff.sample(solver, denoise, schedule, x, times, jax.random.key(1), path=True, checkpoint=False)

    for which, times in enumerate(grids):
        x0, path = run(jnp.int32(which), times)
        out[f"{name} {type(schedules[which]).__name__}"] = np.concatenate([np.asarray(path), np.asarray(x0)[None]])
np.savez(sys.argv[1], **out)
"""


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare the trajectories of every solver with those of another checkout of jdiff."""

    checkout: Annotated[Path, tyro.conf.Positional]
    """The root of the other checkout."""


def trajectories(checkout: Path, out: Path) -> dict[str, np.ndarray]:
    """{solver and schedule: all states and the last x_0 (8, 3, 2)} of a checkout."""
    environment = os.environ | {"PYTHONPATH": str(checkout)}
    # in its folder: what is in the working directory is imported first
    subprocess.run([sys.executable, "-c", PROGRAM, str(out)], check=True, env=environment, cwd=checkout)
    with np.load(out) as file:
        return dict(file)


def main(argv: list[str]) -> int:
    from jdiff import config as configs

    a = configs.parse(Arguments, argv, prog="parity/trajectories.py")
    if not (a.checkout / "jdiff" / "__init__.py").is_file():
        raise SystemExit(f"error: {a.checkout} is no checkout of jdiff; expected a folder with jdiff/__init__.py")
    with tempfile.TemporaryDirectory() as where:
        ours = trajectories(Path(__file__).resolve().parents[1], Path(where) / "ours.npz")
        theirs = trajectories(a.checkout.resolve(), Path(where) / "theirs.npz")
    worst = {}
    for name in sorted(ours.keys() & theirs.keys()):
        difference = np.abs(ours[name] - theirs[name]).max() / np.abs(theirs[name]).max()
        solver = name.split()[0]
        worst[solver] = max(worst.get(solver, 0.0), float(difference))
    for solver, difference in worst.items():
        print(f"{solver:24s} {difference:.1e}{'' if difference <= TOLERANCE else '  DIFFERS'}")
    only = sorted(ours.keys() ^ theirs.keys())
    print(f"{len(worst)} solvers, the largest difference {max(worst.values()):.1e}; in one only: {only or 'none'}")
    return int(not max(worst.values()) <= TOLERANCE)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
