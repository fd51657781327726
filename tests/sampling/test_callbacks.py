"""Callbacks from inside the loop, and the progress bar."""

import io
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Diagonal

import jdiff
from jdiff import grid, solvers

SCHEDULE = jdiff.VP()
EULER, DENOISE = solvers.Euler(), Diagonal(SCHEDULE)
X = jdiff.prior(SCHEDULE, jax.random.key(0), (2, 3))
LOOPS = {"checkpointed": dict(), "plain": dict(checkpoint=False), "traced": dict(n=jnp.array(6))}
run = jax.jit(jdiff.sample, static_argnames=("path", "checkpoint", "callback"))


def sample(callback=None, **options):
    times = grid.log_snr(SCHEDULE, 6, size=8 if "n" in options else None)
    return run(EULER, DENOISE, SCHEDULE, X, times, callback=callback, **options)


@pytest.mark.parametrize("loop", LOOPS)
def test_every_step_is_reported_once(loop):
    """i, t and x are those of the path, x_0 the estimate at the state before, whatever the loop."""
    seen = {}

    def callback(i, t, x, x0):
        assert int(i) not in seen
        seen[int(i)] = (float(t), np.array(x), np.array(x0))

    x0 = sample(callback, **LOOPS[loop])
    jax.effects_barrier()
    expected, path = sample(path=True)
    times = grid.log_snr(SCHEDULE, 6)
    assert sorted(seen) == list(range(5))
    states = np.concatenate([X[None], path])
    for i, (t, x, estimate) in seen.items():
        np.testing.assert_allclose(t, times[i + 1], rtol=1e-6)
        np.testing.assert_allclose(x, path[i], atol=1e-5)
        np.testing.assert_allclose(estimate, DENOISE(states[i], times[i]), atol=1e-4)
    np.testing.assert_allclose(x0, expected, atol=1e-5)


@pytest.mark.parametrize("loop", LOOPS)
def test_nothing_is_there_without_one(loop):
    times = grid.log_snr(SCHEDULE, 6, size=8 if loop == "traced" else None)

    def program(callback):
        options = LOOPS[loop] if callback is None else LOOPS[loop] | dict(callback=callback)
        return str(
            jax.make_jaxpr(lambda x, times: jdiff.sample(EULER, DENOISE, SCHEDULE, x, times, **options))(X, times)
        )

    assert "callback" not in program(None)
    assert "callback" in program(lambda i, t, x, x0: None)


def test_under_grad_and_vmap():
    """A callback changes no gradient, and is called once per element under vmap."""
    seen = []

    def callback(i, t, x, x0):
        seen.append(int(i))

    f = lambda x, callback=None: jdiff.sample(  # noqa: E731
        EULER, DENOISE, SCHEDULE, x, grid.log_snr(SCHEDULE, 6), callback=callback
    ).sum()
    with_one = jax.jit(jax.grad(lambda x: f(x, callback)))(X)
    jax.effects_barrier()
    assert set(seen) == set(range(5))
    np.testing.assert_allclose(with_one, jax.jit(jax.grad(f))(X), rtol=1e-6)
    seen.clear()
    jax.jit(jax.vmap(lambda x: f(x, callback)))(jnp.stack([X, X]))
    jax.effects_barrier()
    assert sorted(seen) == sorted(2 * list(range(5)))


@pytest.mark.parametrize("loop", LOOPS)
def test_progress_counts_to_the_total(loop):
    out = io.StringIO()
    bar = jdiff.progress(5, file=out, desc="steps", mininterval=0)
    for _ in range(2):
        sample(bar, **LOOPS[loop])
        jax.effects_barrier()
        assert "5/5" in out.getvalue() and "steps" in out.getvalue()
        assert bar.bar is None
        out.truncate(0)


def test_progress_on_several_devices():
    """Each device reports every step; the bar counts them once."""
    out = io.StringIO()
    bar = jdiff.progress(5, file=out, mininterval=0)
    times = grid.log_snr(SCHEDULE, 6)
    jax.pmap(lambda x: jdiff.sample(EULER, DENOISE, SCHEDULE, x, times, callback=bar))(jnp.stack([X] * 4))
    jax.effects_barrier()
    assert "5/5" in out.getvalue() and "6/5" not in out.getvalue()


def test_progress_forgives_order():
    out = io.StringIO()
    bar = jdiff.progress(4, file=out, mininterval=0)
    for i in (1, 0, 0, 2):
        bar(np.array(i), 0.5, None, None)
    assert bar.bar.n == 3
    for i in (3, 2, 3):  # stragglers of a run that is over open nothing
        bar(i, 0.5, None, None)
    assert bar.bar is None
    bar(0, 0.5, None, None)
    assert bar.bar.n == 1
    bar.bar.close()


def test_progress_shows_the_estimates():
    shown = []
    bar = jdiff.progress(5, show=lambda step, x0: shown.append((step, x0)), file=io.StringIO())
    sample(bar)
    jax.effects_barrier()
    assert [step for step, _ in shown] == sorted({step for step, _ in shown}) and shown[-1][0] == 5
    states = np.concatenate([X[None], sample(path=True)[1]])
    for step, x0 in shown:
        np.testing.assert_allclose(x0, DENOISE(states[step - 1], grid.log_snr(SCHEDULE, 6)[step - 1]), atol=1e-4)


def test_progress_errors(monkeypatch):
    with pytest.raises(ValueError, match="number of steps"):
        jdiff.progress(-1)
    monkeypatch.setitem(sys.modules, "tqdm.auto", None)
    with pytest.raises(ImportError, match="pip install 'jdiff.train.'"):
        jdiff.progress(3)
