"""Adaptive sampling: exact maps, tolerances, evaluations, samples that keep to themselves, gradients."""

import functools
import sys

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, Diagonal, mixture

import jdiff
from jdiff.core.pytrees import noun

pytestmark = pytest.mark.slow  # many programs to compile

GAUSSIAN = jdiff.oracle.Gaussian(jnp.full(2, 0.3), 0.4 * jnp.eye(2))  # what Diagonal denoises


@pytest.fixture(autouse=True, scope="module")
def _needs_diffrax():
    pytest.importorskip("diffrax", reason="the adaptive extra is not installed")


@functools.partial(jax.jit, static_argnames=("method", "sde", "adjoint"))
def run(denoise, schedule, x, key=None, **settings):
    return jdiff.sample_adaptive(denoise, schedule, x, key, **settings)


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_error_follows_the_tolerance(schedule):
    """Against the exact probability-flow map, from t_max (where alpha may be 0) to t_min."""
    with jax.enable_x64(True):
        schedule = SCHEDULES[schedule]
        denoise = Diagonal(schedule)
        x = jdiff.prior(schedule, jax.random.key(0), (3, 2), dtype=jnp.float64)
        truth = denoise(GAUSSIAN.flow(schedule, x, 1.0, schedule.t_min), schedule.t_min)
        errors, evaluations = [], []
        for tolerance in (1e-3, 1e-5, 1e-7):
            out, info = run(denoise, schedule, x, rtol=tolerance, atol=tolerance)
            assert info.success.all()
            errors.append(float(jnp.abs(out - truth).max()))
            evaluations.append(int(info.nfe.max()))
        assert errors[0] < 0.05 and errors[1] < 1e-3 and errors[2] < 1e-5, errors
        assert evaluations[0] < evaluations[1] < evaluations[2]


@pytest.mark.parametrize("schedule", ["discrete", "zero_snr"])
def test_tables(schedule):
    schedule = MORE_SCHEDULES[schedule]
    denoise, x = Diagonal(schedule), jdiff.prior(schedule, jax.random.key(0), (3, 2))
    out, info = run(denoise, schedule, x, rtol=1e-4, atol=1e-4)
    fine = jdiff.sample(jdiff.solvers.RK4(), denoise, schedule, x, jdiff.grid.log_snr(schedule, 200))
    np.testing.assert_allclose(out, fine, atol=2e-3)
    assert (info.nfe < 400).all()


@pytest.mark.parametrize("method,calls_a_step", [("tsit5", 6), ("dopri8", 13), ("heun", 2)])
def test_evaluations_are_counted(method, calls_a_step):
    """`nfe` is what one sample costs, the last denoise included."""
    schedule, count = jdiff.Cosine(), []

    def denoise(x, t):
        jax.debug.callback(lambda: count.append(1))
        return Diagonal(schedule)(x, t)

    x = jdiff.prior(schedule, jax.random.key(0), (1, 2))
    _, info = jax.block_until_ready(jdiff.sample_adaptive(denoise, schedule, x, method=method))
    jax.effects_barrier()
    assert len(count) == info.nfe[0] > calls_a_step * info.steps[0]


@pytest.mark.parametrize("method", ["kvaerno3", "dopri5"])
def test_methods_agree(method):
    with jax.enable_x64(True):
        schedule = jdiff.VP()
        denoise, x = Diagonal(schedule), jax.random.normal(jax.random.key(0), (2, 2), jnp.float64)
        reference, _ = run(denoise, schedule, x, rtol=1e-7, atol=1e-7)
        out, info = run(denoise, schedule, x, rtol=1e-6, atol=1e-6, method=method)
        np.testing.assert_allclose(out, reference, atol=1e-4)
        assert info.success.all()


def test_each_sample_has_its_own_steps():
    """A hard sample costs more, and an easy one does not notice it."""
    with jax.enable_x64(True):
        schedule = jdiff.EDM()
        denoise = mixture().denoise(schedule)
        x = jdiff.prior(schedule, jax.random.key(0), (8, 2), dtype=jnp.float64)
        x = x.at[0].set(1e4)
        out, info = run(denoise, schedule, x, rtol=1e-5, atol=1e-5)
        assert len(set(info.nfe.tolist())) > 1
        alone, alone_info = run(denoise, schedule, x[3:4], rtol=1e-5, atol=1e-5)
        np.testing.assert_allclose(out[3], alone[0], rtol=1e-9)
        assert info.nfe[3] == alone_info.nfe[0]


def test_labels_and_weights_follow_their_samples():
    """cond (B,) and guidance weights (B,) are seen by their own sample: as in separate runs."""
    schedule = jdiff.VP()

    def apply(params, x, label, cond):
        return params * x + 0.1 * cond[:, None].astype(x.dtype)

    labels, w = jnp.array([0, 5, 2]), jnp.array([1.0, 2.0, 0.5])
    x = jdiff.prior(schedule, jax.random.key(0), (3, 2))

    def guided(labels, w):
        pair = [jdiff.denoiser(apply, jnp.float32(0.9), schedule, jdiff.targets.Eps(), c) for c in (labels, 0 * labels)]
        return jdiff.guidance.cfg(*pair, w)

    out, _ = run(guided(labels, w), schedule, x, rtol=1e-4, atol=1e-4)
    for i in range(3):
        one, _ = run(guided(labels[i : i + 1], w[i : i + 1]), schedule, x[i : i + 1], rtol=1e-4, atol=1e-4)
        np.testing.assert_allclose(out[i], one[0], rtol=1e-3, atol=1e-4)
    fine = jdiff.sample(jdiff.solvers.Heun(), guided(labels, w), schedule, x, jdiff.grid.log_snr(schedule, 200))
    np.testing.assert_allclose(out, fine, rtol=1e-2, atol=1e-2)


def test_reverse_sde():
    """The data's mean and variance; each sample a function of its own key; other keys, other samples."""
    schedule = jdiff.Flow()
    denoise, n = Diagonal(schedule), 512
    x = jdiff.prior(schedule, jax.random.key(0), (n, 1))
    keys = jax.random.split(jax.random.key(1), n)
    out, info = run(denoise, schedule, x, keys, sde=True, rtol=3e-2, atol=3e-2)
    assert info.success.all()
    np.testing.assert_allclose(out.mean(), 0.3, atol=0.1)
    np.testing.assert_allclose(out.var(), 0.4, atol=0.1)
    part, _ = run(denoise, schedule, x[:3], keys[:3], sde=True, rtol=3e-2, atol=3e-2)
    np.testing.assert_allclose(part, out[:3], atol=1e-4)
    other, _ = run(denoise, schedule, x[:3], keys[3:6], sde=True, rtol=3e-2, atol=3e-2)
    assert jnp.abs(other - part).min() > 1e-4


@pytest.mark.parametrize("adjoint", ["checkpoint", "backsolve", "forward"])
@pytest.mark.parametrize("schedule", [pytest.param("vp", marks=pytest.mark.slow), "cosine"])
def test_gradients(schedule, adjoint):
    """With respect to the noise and the data's mean: against the derivative of the exact map, from alpha = 0 too."""
    with jax.enable_x64(True):
        schedule = SCHEDULES[schedule]
        x = jax.random.normal(jax.random.key(0), (1, 2), jnp.float64)

        def adaptive(x, m):
            return run(Diagonal(schedule, m), schedule, x, rtol=1e-7, atol=1e-7, adjoint=adjoint)[0][0, 0]

        def exact(x, m):
            gaussian = jdiff.oracle.Gaussian(jnp.full(2, m), 0.4 * jnp.eye(2))
            return Diagonal(schedule, m)(gaussian.flow(schedule, x, 1.0, schedule.t_min), schedule.t_min)[0, 0]

        differentiate = jax.jacfwd if adjoint == "forward" else jax.grad
        got, expected = (d(f, (0, 1))(x, 0.3) for d, f in ((differentiate, adaptive), (jax.grad, exact)))
        for a, b in zip(got, expected, strict=True):
            np.testing.assert_allclose(a, b, atol=1e-4)


def test_one_compile_for_all_tolerances():
    schedule = jdiff.VE()
    go = jax.jit(functools.partial(jdiff.sample_adaptive), static_argnames=("method",))
    for i in range(4):
        x = jdiff.prior(schedule, jax.random.key(i), (2, 2), 0.9)
        go(Diagonal(schedule, 0.1 * i), schedule, x, rtol=10.0**-i, atol=0.1**i, t_max=0.9, t_min=0.01 * i)
    assert go._cache_size() == 1


def test_errors(monkeypatch):
    schedule, x = jdiff.VP(), jnp.ones((2, 2))
    denoise = Diagonal(schedule)
    for settings, message in (
        (dict(method="rk45"), "unknown method of sample_adaptive 'rk45'; one of tsit5"),
        (dict(adjoint="none"), "unknown adjoint"),
        (dict(sde=True), "give a key"),
        (dict(t_min=0.5, t_max=0.4), "<= t_min < t_max"),
        (dict(t_min=0.0), "<= t_min < t_max"),
    ):
        with pytest.raises(ValueError, match=message):
            jdiff.sample_adaptive(denoise, schedule, x, **settings)
    monkeypatch.setitem(sys.modules, "diffrax", None)
    with pytest.raises(ImportError, match=r"pip install 'jdiff\[adaptive\]'"):
        jdiff.sample_adaptive(denoise, schedule, x)


# ---------------------------------------------------------------- what has rows


@noun
class Knotted:
    """A guidance weight as a function of t: its knots are no rows, however many there are."""

    knots: jax.Array

    def __call__(self, t):
        return jnp.interp(t, jnp.linspace(0, 1, len(self.knots)), self.knots)


def linear(params, x, label, cond):
    """Parameters (B,) that belong to the network, and a label of several arrays that belong to the samples."""
    return params.sum() * x + 0.1 * cond["class"][:, None].astype(x.dtype) + 0.01 * cond["text"].sum((1, 2))[:, None]


def with_rows(labels, w, schedule=SCHEDULES["vp"]):
    """Guidance in an interval, thresholded, of networks whose parameters have as many entries as there are samples."""
    params = jnp.linspace(0.1, 0.3, 4)
    cond = {"class": labels, "text": jnp.arange(6.0).reshape(1, 3, 2) * labels[:, None, None]}
    pair = [
        jdiff.denoiser(linear, params, schedule, jdiff.targets.Eps(), c)
        for c in (cond, jax.tree.map(jnp.zeros_like, cond))
    ]
    guided = jdiff.guidance.interval(jdiff.guidance.cfg(*pair, w), pair[0], 0.05, 5.0)
    return jdiff.guidance.threshold(guided, schedule, 100.0)


def test_rows_are_what_is_marked():
    """A weight schedule of B knots, parameters of B entries, labels and weights (B,): in the whole batch as alone."""
    schedule, go = SCHEDULES["vp"], jax.jit(jdiff.sample_adaptive)
    x, labels = jdiff.prior(schedule, jax.random.key(0), (4, 2)), jnp.array([0, 3, 1, 2])
    for w in (Knotted(jnp.array([0.0, 1.0, 3.0, 5.0])), jnp.array([1.0, 2.0, 0.5, 3.0]), 2.0):
        own = (lambda i: w[i : i + 1]) if isinstance(w, jax.Array) else (lambda i: w)  # noqa: B023
        out, _ = go(with_rows(labels, w), schedule, x, rtol=1e-5, atol=1e-5)
        alone = [
            go(with_rows(labels[i : i + 1], own(i)), schedule, x[i : i + 1], rtol=1e-5, atol=1e-5)[0] for i in range(4)
        ]
        chex.assert_trees_all_close(out, jnp.concatenate(alone), atol=2e-2)  # with rows guessed: off by 2


def test_rows_of_another_batch():
    x = jnp.ones((4, 2))
    for labels, w, name in ((jnp.arange(3), 2.0, "cond"), (jnp.arange(4), jnp.ones(3), "w")):
        with pytest.raises(ValueError, match=rf"{name} has shape \(3.*\) for a batch of 4; expected 4 rows"):
            jdiff.sample_adaptive(with_rows(labels, w), SCHEDULES["vp"], x)
