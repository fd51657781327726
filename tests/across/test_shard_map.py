"""Inside `jax.shard_map`, which checks what varies over the mesh: every verb does there what it does on one device.

JAX compares the types of a loop's carry as it traces, so most cases are traced only; the slow ones compare values.
"""

import chex
import jax
import jax.numpy as jnp
import pytest
from helpers import Diagonal
from jax.sharding import PartitionSpec as P

import jdiff
from jdiff import parallel
from jdiff.config import SOLVERS
from jdiff.core.pytrees import noun
from jdiff.solvers import DDIM, DDPM, DPMpp2M, DPMpp3M, GradientEstimation, Heun, Remember

SCHEDULE = jdiff.Flow()
DENOISE = Diagonal(SCHEDULE)
TIMES = jdiff.grid.uniform(4)
X = jdiff.prior(SCHEDULE, jax.random.key(0), (8, 2))
KEYS = jax.random.split(jax.random.key(1), 8)
LABELS = jnp.linspace(0, 3, 8)


def sampled(solver, x, keys=None, denoise=DENOISE, **settings):
    return jdiff.sample(solver, denoise, SCHEDULE, x, TIMES, keys, **settings)


def labelled(params, x, label, cond):
    return params * x + cond[:, None]


def self_conditioned(params, x, label, cond):
    return jnp.tanh(params * x[..., :2] + 0.5 * x[..., 2:])


def guided(labels, w):
    pair = [jdiff.denoiser(labelled, p, SCHEDULE, jdiff.targets.X0(), p * labels) for p in (0.7, 0.0)]
    return jdiff.guidance.interval(jdiff.guidance.cfg(*pair, w), pair[0], 0.1, 2.0)


def remembering(labels):
    c, u = (jdiff.denoiser(labelled, p, SCHEDULE, jdiff.targets.X0(), p * labels) for p in (0.7, 0.0))
    averaged = jdiff.guidance.apg(c, jdiff.guidance.cached(u, 2), labels, momentum=-0.5)
    return jdiff.guidance.interval(averaged, c, 0.1, 2.0)


def rows_first(out):
    return out[0], jnp.moveaxis(out[1], 1, 0)


@noun
class Bisected(jdiff.Schedule):
    """A path without an inverse in closed form, and with a setting."""

    bend: float
    t_min, t_max = 1e-3, 1.0

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t**self.bend


# each of (x, keys, labels), all (B, ...): rows in, rows out
VERBS = {
    "path": lambda x, keys, labels: rows_first(sampled(DPMpp2M(), x, path=True)),
    "no_checkpoint": lambda x, keys, labels: sampled(DPMpp2M(), x, checkpoint=False),
    "traced_n": lambda x, keys, labels: rows_first(
        sampled(DPMpp2M(), x, path=True, n=(3 + 0 * labels[0]).astype(int))
    ),
    "invert": lambda x, keys, labels: jdiff.invert(DPMpp2M(), DENOISE, SCHEDULE, x, TIMES),
    "gradient": lambda x, keys, labels: jax.grad(lambda x: sampled(GradientEstimation(), x).sum())(x),
    "remember": lambda x, keys, labels: sampled(
        Remember(DPMpp2M()), x, None,
        jdiff.denoiser(self_conditioned, 0.7, SCHEDULE, jdiff.targets.X0(), self_conditioning=True),
    ),
    "only_keys_vary": lambda x, keys, labels: sampled(DDIM(1.0), jnp.ones((len(x), 2)), keys),
    "only_labels_vary": lambda x, keys, labels: sampled(DDIM(), jnp.ones((len(x), 2)), None, guided(labels, 2.0)),
    "constant_denoiser": lambda x, keys, labels: sampled(DPMpp3M(), x, None, lambda x, t: jnp.ones(x.shape)),
    "guidance": lambda x, keys, labels: sampled(DPMpp2M(), x, keys, guided(labels, labels)),
    "memory": lambda x, keys, labels: sampled(DDIM(1.0), x, keys, remembering(labels)),
    "brownian_tree": lambda x, keys, labels: sampled(DDIM(1.0), x, jdiff.BrownianTree(keys, 2.0**-6)),
    # each device sweeps until its own rows have settled: with tol = 0, to the same samples
    "parallel": lambda x, keys, labels: jdiff.sample_parallel(DDPM(), DENOISE, SCHEDULE, x, TIMES, keys, tol=0)[0],
    "parallel_ode": lambda x, keys, labels: jdiff.sample_parallel(Heun(), DENOISE, SCHEDULE, x, TIMES, tol=0)[0],
    "bisection": lambda x, keys, labels: jax.vmap(lambda bend: jdiff.time_of(Bisected(bend), 0.0))(1 + labels),
}  # fmt: skip


def over_the_mesh(f, check=True):
    """f(x, keys, labels), each of the 8 devices with a row of its own."""
    mesh = parallel.mesh()
    return jax.jit(jax.shard_map(f, mesh=mesh, in_specs=P("data"), out_specs=P("data"), check_vma=check))


def assert_the_mesh_is_one_device(f, rtol=2e-5, check=True):
    got, want = over_the_mesh(f, check)(X, KEYS, LABELS), jax.jit(f)(X, KEYS, LABELS)
    chex.assert_trees_all_close(got, want, rtol=rtol, atol=rtol)


@pytest.mark.parametrize("name", VERBS)
def test_verbs_are_traced(name):
    jax.eval_shape(over_the_mesh(VERBS[name]), X, KEYS, LABELS)


@pytest.mark.parametrize("name", [name for name in SOLVERS if jax.tree.leaves(SOLVERS[name]().init(X))])
def test_solvers_with_memory_are_traced(name):
    out = jax.eval_shape(over_the_mesh(lambda x, keys, _: sampled(SOLVERS[name](), x, keys)), X, KEYS, LABELS)
    assert out.shape == X.shape


def test_samples_of_a_mesh_are_those_of_one_device():
    assert_the_mesh_is_one_device(VERBS["path"])


@pytest.mark.slow
@pytest.mark.parametrize("name", VERBS)
def test_verbs(name):
    assert_the_mesh_is_one_device(VERBS[name])


@pytest.mark.slow
@pytest.mark.parametrize("name", SOLVERS)
def test_solvers(name):
    """The samples, and their derivatives by x."""

    def both(x, keys, _):
        out, back = jax.vjp(lambda x: sampled(SOLVERS[name](), x, keys), x)
        return out, back(jnp.ones_like(out))

    assert_the_mesh_is_one_device(both)


@pytest.mark.slow
def test_adaptive_steps_without_the_check():
    """Weights follow their rows there too."""

    def verbs(x, keys, labels):
        weighted = jdiff.guidance.cfg(DENOISE, Diagonal(SCHEDULE, 0.0), 0.5 * labels)
        ode, _ = jdiff.sample_adaptive(weighted, SCHEDULE, x, rtol=1e-3, atol=1e-3)
        return ode, jdiff.sample_adaptive(DENOISE, SCHEDULE, x, keys, sde=True, rtol=3e-2, atol=3e-2)[0]

    assert_the_mesh_is_one_device(verbs, rtol=1e-3, check=False)


@pytest.mark.parametrize(
    "name, verb",
    {
        "sample_adaptive": lambda x, *_: jdiff.sample_adaptive(DENOISE, SCHEDULE, x)[0],
        "log_likelihood": lambda x, keys, _: jdiff.log_likelihood(DENOISE, SCHEDULE, x, keys)[0],
        "Assignment": lambda x, *_: jdiff.coupling.Assignment()(jax.random.key(0), x, x),
    }.items(),
)
def test_loops_of_other_libraries_say_what_to_do(name, verb):
    with pytest.raises(ValueError, match=f"{name}: .* check_vma=False"):
        jax.eval_shape(over_the_mesh(verb), X, KEYS, LABELS)
