"""Nouns as values: pickled, copied, compared, hashed, and one program for every kind of number."""

import copy
import inspect
import pickle

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import config, oracle
from jdiff.core.pytrees import noun, number, per_sample, row_axes, static
from jdiff.guidance import cfg, interval, threshold
from jdiff.solvers import DDIM, Churn, DPMpp2M, Heun, Langevin, PredictorCorrector, Remember, Restart, UniPC

TABLES = dict(
    schedule=config.SCHEDULES, target=config.TARGETS, conditioning=config.CONDITIONINGS, levels=config.LEVELS,
    weight=config.WEIGHTS, coupling=config.COUPLINGS, solver=config.SOLVERS,
)  # fmt: skip
FIRST = {"index": 10, "knots": 10, "antithetic": 10, "discrete": "linear"}  # arguments without a default


def apply(params, x, label, cond):
    return params["scale"] * x if isinstance(params, dict) else params[0] * x


def build(kind, name, of_kind=lambda value: value):
    """One entry of a table, with every number among its arguments made by `of_kind`."""
    make = TABLES[kind][name]
    arguments = {
        name: of_kind(p.default) for name, p in inspect.signature(make).parameters.items() if type(p.default) is float
    }
    return make(*[FIRST[name] for _ in range(name in FIRST)], **arguments)


def own():
    """Nouns that are no entry of a table."""
    flow = jdiff.Flow()
    mixture = oracle.GaussianMixture(np.ones(2), np.zeros((2, 1)), np.ones((2, 1, 1)))
    denoise = jdiff.denoiser(apply, jnp.ones(1), flow, jdiff.targets.Eps(), jnp.arange(3), self_conditioning=True)
    guided = cfg(denoise, denoise, jnp.arange(3.0))
    return dict(
        restart=Restart(Restart(UniPC(3)), 0.4, 0.9), corrected=PredictorCorrector(DPMpp2M("single_step"), Langevin()),
        remember=Remember(DPMpp2M()), churn=Churn(Heun(), 3), shifted=jdiff.Shifted(flow, 2), mixture=mixture,
        gaussian=oracle.Gaussian(np.zeros(2), np.eye(2)), oracle=mixture.denoise(flow), denoiser=denoise, guided=guided,
        thresholded=threshold(interval(guided, denoise, 0.1, 2), flow, 1, 0.9),
        tree=jdiff.BrownianTree(jax.random.key(0)), trees=jdiff.BrownianTree(jax.random.split(jax.random.key(0), 3)),
        exact=jdiff.discrete(np.array([0.1, 1.0]), exact=True),
    )  # fmt: skip


NOUNS = {f"{kind}-{name}": (lambda kind=kind, name=name: build(kind, name)) for kind in TABLES for name in TABLES[kind]}
NOUNS |= {name: (lambda name=name: own()[name]) for name in own()}


@noun
class Line:
    slope: float = 1.0
    rows: object = per_sample(None)
    power: object = static(1)


@noun
class Knotted:
    """A weight as a function of t."""

    knots: object

    def __call__(self, t):
        return jnp.interp(t, jnp.linspace(0, 1, len(self.knots)), self.knots)


# ---------------------------------------------------------------- values


@pytest.mark.parametrize("name", NOUNS)
def test_copies_are_equal(name):
    """By pickle, by deepcopy and built anew: equal, of one hash and one program; with another leaf, another noun."""
    value = NOUNS[name]()
    for other in (pickle.loads(pickle.dumps(value)), copy.deepcopy(value), NOUNS[name]()):
        assert other == value and hash(other) == hash(value)
        assert jax.tree.structure(other) == jax.tree.structure(value)
    leaves, structure = jax.tree.flatten(value)
    for i, leaf in enumerate(leaves):
        key = isinstance(leaf, jax.Array) and jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)
        changed = jax.vmap(jax.random.key)(jnp.full(leaf.size, 7)).reshape(leaf.shape) if key else 0 * leaf - 3
        assert jax.tree.unflatten(structure, [*leaves[:i], changed, *leaves[i + 1 :]]) != value


def test_equality_is_of_values():
    ones = np.ones(3, np.float32)
    assert Line(ones) == Line(jnp.ones(3)) and hash(Line(ones)) == hash(Line(jnp.ones(3)))
    assert Line(np.nan) == Line(-np.float32(np.nan)) and hash(Line(np.nan)) == hash(Line(-np.float32(np.nan)))
    assert Line([0.0]) == Line([-0.0]) and hash(Line(np.zeros(2))) == hash(Line(-np.zeros(2)))
    assert Line(np.zeros(2)) == Line(-np.zeros(2)) and Line(np.full(2, np.nan)) == Line(np.full(2, np.nan))
    assert jax.jit(lambda line: line)(Line(0.5)) == Line(0.5)  # an array of one number is that number
    for other in (
        Line(np.ones((1, 3))), Line(np.ones(3, np.float16)), Line(np.array([1, 1, 2.0])), Line(1.0), Line([1.0] * 3),
        Line(np.ones(3), power=2), jdiff.Flow(), 1.0,
    ):  # fmt: skip
        assert Line(np.ones(3)) != other
    assert Line({"a": np.ones(2)}) == Line({"a": np.ones(2)}) != Line({"a": np.zeros(2)})
    assert len({Line(2), Line(2.0), Line(np.int64(2)), Line(3)}) == 2


def test_what_has_no_hash_or_no_answer_says_so():
    denoise = jdiff.denoiser(apply, {"scale": jnp.ones(())}, jdiff.Flow(), jdiff.targets.Eps())
    with pytest.raises(TypeError, match="Denoiser has no hash, because of its field params: unhashable type: 'dict'"):
        hash(denoise)
    with pytest.raises(TypeError, match="because of its field conditional: Denoiser has no hash"):
        hash(cfg(denoise, denoise, 2.0))
    with pytest.raises(TypeError, match="Line has no hash, because of its field power"):
        hash(Line(power=[1]))
    assert denoise == copy.deepcopy(denoise)
    for question in (hash, lambda line: line == Line(2.0)):
        with pytest.raises(TypeError, match="traced values cannot be compared or hashed"):
            jax.jit(lambda slope: question(Line(slope)) or slope)(2.0)  # noqa: B023


# ---------------------------------------------------------------- rows


def test_rows_are_marked_never_guessed():
    """Arrays of B entries that are parameters or the knots of a weight have no rows; labels in any tree have them."""
    B, flow = 4, jdiff.Flow()
    params, cond = {"w": jnp.ones((B, 2)), "cond": jnp.ones(B)}, {"class": jnp.arange(B), "text": jnp.ones((B, 3))}
    denoise = jdiff.denoiser(apply, params, flow, jdiff.targets.Eps(), cond, self_conditioning=True)
    denoise = denoise.replace(previous=jnp.ones((B, 1)))
    plain = jdiff.denoiser(apply, params, flow, jdiff.targets.Eps(), 3)
    rows = {"class": 0, "text": 0}
    for w, of_w in ((jnp.ones(B), 0), (2.0, None), (Knotted(jnp.ones(B)), Knotted(None))):
        axes = row_axes(threshold(interval(cfg(denoise, plain, w), denoise, 0, 1), flow), B).base
        inside = axes.guided.branches
        assert inside.w == of_w and inside.conditional.cond == axes.conditional.cond == rows
        assert inside.conditional.previous == 0 and inside.unconditional.cond is None
        assert jax.tree.leaves(inside.conditional.params) == []
    for n in (1, 3, 5):
        with pytest.raises(ValueError, match=rf"has shape \(4.*\) for a batch of {n}; expected {n} rows or a number"):
            row_axes(denoise, n)
    assert row_axes(denoise.replace(cond=jnp.ones(1), previous=None), 1).cond == 0  # a batch of one has one row


# ---------------------------------------------------------------- numbers


KINDS = dict(
    float=float, int=lambda value: int(value) if value == int(value) else value, float16=np.float16,
    float32=np.float32, float64=np.float64, zero_d=np.asarray, strong=jnp.float32, weak=jnp.asarray,
)  # fmt: skip


def test_numbers_of_all_kinds_are_one_program():
    """Every entry of every table, and what is not in one."""

    def make(of_kind):
        table = {(kind, name): build(kind, name, of_kind) for kind in TABLES for name in TABLES[kind]}
        denoise = jdiff.denoiser(apply, jnp.ones(1), jdiff.Flow(), jdiff.targets.Eps())
        guided = interval(cfg(denoise, denoise, of_kind(2.0)), denoise, of_kind(0.25), of_kind(2.0))
        more = (
            threshold(guided, jdiff.Flow(), of_kind(1.0), of_kind(0.5)), Churn(Heun(), of_kind(3.0)),
            Restart(DPMpp2M(), of_kind(0.5), of_kind(1.0)), jdiff.Shifted(jdiff.Flow(), of_kind(2.0)),
        )  # fmt: skip
        return table, more

    chex.clear_trace_counter()
    program = jax.jit(chex.assert_max_traces(lambda nouns: jax.tree.leaves(nouns), n=1))
    for of_kind in KINDS.values():
        program(jax.tree.map(lambda leaf: leaf, make(of_kind)))


def test_one_sampler_for_all_kinds_of_numbers():
    chex.clear_trace_counter()
    flow, x = jdiff.Flow(), jnp.ones((2, 1))
    denoise = jdiff.denoiser(apply, jnp.ones(1), flow, jdiff.targets.X0())
    program = jax.jit(chex.assert_max_traces(jdiff.sample, n=1))
    for i, of_kind in enumerate(KINDS.values()):
        times = np.linspace(1.0, 0.5, 3) if i % 2 else jnp.linspace(1.0, 0.5, 3)
        program(DDIM(of_kind(0.25)), cfg(denoise, denoise, of_kind(2.0)), flow, x, times, jax.random.key(0))


def test_what_is_no_number_stays():
    array, key = np.ones(1), jax.random.key(0)
    for value in (None, True, "0.5", array, key, [1.0], 1j):
        assert number(value) is value
    assert jax.jit(lambda v: number(v))(2.0) == 2.0
    assert Line(rows=3).rows == 3 and isinstance(Line(rows=3).rows, int)  # a label
    assert isinstance(Line(power=np.int64(3)).power, int) and UniPC(np.int64(3)) == UniPC(3)


def test_numbers_keep_the_digits_of_float64():
    third = np.float64(1) / 3
    for given in (third, np.asarray(third)):
        assert DDIM(given).eta == third
    with jax.enable_x64(True):
        assert DDIM(jnp.asarray(third)).eta == third
        assert jax.jit(lambda solver: solver.eta + jnp.float64(0))(DDIM(third)) == third


def test_derivatives_by_numbers():
    gradient = jax.grad(lambda vp: vp.alpha(jnp.float32(0.5)))(jdiff.VP(jnp.float32(1), np.float64(3)))
    # alpha = exp(-B / 2), B = low t + (high - low) t^2 / 2
    alpha = np.exp(-0.5 * (0.5 + 0.25))
    np.testing.assert_allclose(
        [gradient.beta_min, gradient.beta_max], [-0.5 * alpha * 0.375, -0.5 * alpha * 0.125], rtol=1e-6
    )


# ---------------------------------------------------------------- values at the edge


@pytest.mark.parametrize("make", [jdiff.VP, jdiff.SubVP])
def test_a_constant_beta(make):
    """B = beta t: against the closed forms, with the inverse and every derivative."""
    schedule, beta = make(2, 2), 2.0
    t = jnp.linspace(0.1, 1, 4)
    alpha = np.exp(-0.5 * beta * np.asarray(t, np.float64))
    sigma = np.sqrt(1 - alpha**2) if make is jdiff.VP else 1 - alpha**2
    np.testing.assert_allclose(schedule.alpha(t), alpha, rtol=1e-6)
    np.testing.assert_allclose(schedule.sigma(t), sigma, rtol=1e-6)
    value = jdiff.log_snr(schedule, t)
    np.testing.assert_allclose(value, 2 * np.log(alpha / sigma), rtol=1e-5)
    np.testing.assert_allclose(jdiff.time_of(schedule, value), t, rtol=1e-5)
    by = lambda f, step: (f(make(2 - step, 2 + step)) - f(make(2, 2))) / step  # noqa: E731
    f = lambda schedule: jdiff.time_of(schedule, jnp.float64(0.5))  # noqa: E731
    with jax.enable_x64(True):
        gradient = jax.grad(f)(schedule)
        np.testing.assert_allclose(gradient.beta_max - gradient.beta_min, by(f, 1e-6), rtol=1e-4)


@pytest.mark.parametrize("make", [jdiff.VE, jdiff.EDM])
def test_a_range_without_noise_to_choose_from(make):
    with pytest.raises(ValueError, match="sigma_min must be below sigma_max, got"):
        make(1, 1)


def test_a_traced_n_outside_the_grid_is_nan():
    flow, x, denoise = jdiff.Flow(), jnp.ones((2, 1)), lambda x, t: 0.5 * x
    times = jdiff.grid.uniform(4)
    run = jax.jit(lambda n: jdiff.sample(DDIM(), denoise, flow, x, times, n=n, path=True))
    for n in (-1, 0, 5, 10**9):
        assert all(np.isnan(out).all() for out in run(n))
    chex.assert_trees_all_close(run(3)[0], jdiff.sample(DDIM(), denoise, flow, x, times[:3]), rtol=1e-6)
    for n in (2, np.int64(2), jnp.asarray(2), 2.0):
        path = jax.eval_shape(lambda: jdiff.sample(DDIM(), denoise, flow, x, times, n=n, path=True))[1]  # noqa: B023
        assert path.shape == (1, 2, 1)
    for n in (0, 5, 2.5, True, "3"):
        with pytest.raises(ValueError, match="expected 1 <= n <= 4"):
            jdiff.sample(DDIM(), denoise, flow, x, times, n=n)
