"""Where a denoiser meets a schedule, it must be its own; and a time must be one."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Diagonal

import jdiff
from jdiff import guidance, losses, sde, solvers
from jdiff.denoisers import conditioning, targets

VP, FLOW = jdiff.VP(), jdiff.Flow()
X, TIMES = np.ones((3, 2), np.float32), jdiff.grid.uniform(4)
ELSEWHERE = Diagonal(FLOW)  # a denoiser of another process


def plain(x, t):
    return 0.5 * x


MEET = {
    "sample": lambda d: jdiff.sample(solvers.DDIM(), d, VP, X, TIMES),
    "invert": lambda d: jdiff.invert(solvers.DDIM(), d, VP, X, TIMES),
    "parallel": lambda d: jdiff.sample_parallel(solvers.DDIM(), d, VP, X, TIMES),
    "adaptive": lambda d: jdiff.sample_adaptive(d, VP, X),
    "score": lambda d: sde.score(d, VP, X, 0.5),
    "flow": lambda d: sde.probability_flow(d, VP)(X, 0.5),
    "bound": lambda d: losses.vlb_terms(d, VP, X, X, 0.5),
    "cfg": lambda d: guidance.cfg(d, Diagonal(VP), 2.0),
    "interval": lambda d: guidance.interval(Diagonal(VP), d, 0.1, 0.9),
    "threshold": lambda d: guidance.threshold(d, VP),
    "inside guidance": lambda d: jdiff.sample(solvers.DDIM(), guidance.cfg(d, plain, 2.0), VP, X, TIMES),
    "remembered": lambda d: jdiff.sample(solvers.Remember(solvers.DDIM()), d, VP, X, TIMES),
}


@pytest.mark.parametrize("name", MEET)
def test_a_denoiser_of_another_schedule_is_refused(name):
    with pytest.raises(ValueError, match="must have one schedule, got (VP and Flow|Flow and VP)"):
        MEET[name](ELSEWHERE)


def test_numbers_are_compared_where_they_are_known():
    def denoise(one, other, t=0.5):
        return jdiff.as_denoise(Diagonal(one), other)(X, t)

    table = jdiff.discrete(jdiff.betas.linear(10))
    for one, other, message in (
        (jdiff.VP(0.1, 20.0), jdiff.VP(0.1, 10.0), r"differ in VP\.beta_max: 20.0 and 10.0"),
        (jdiff.Shifted(FLOW, 3.0), jdiff.Shifted(FLOW, 2.0), r"differ in Shifted\.shift"),
        (jdiff.Shifted(FLOW, 3.0), jdiff.Shifted(jdiff.Cosine(), 3.0), "two Shifted of different settings"),
        (table, jdiff.discrete(jdiff.betas.linear(20)), r"differ in Discrete\.log_nsr"),
        (table, jdiff.discrete(jdiff.betas.cosine(10)), r"differ in Discrete\.log_nsr"),
    ):
        with pytest.raises(ValueError, match=message):
            denoise(one, other)
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda t, pair=(one, other): denoise(*pair, t))(0.5)  # the numbers are known in jit too
    expected = denoise(VP, VP)
    for same in (jdiff.VP(np.float32(0.1), jnp.float32(20.0)), jdiff.VP(0.1 * (1 + 1e-7), 20.0)):
        np.testing.assert_allclose(denoise(VP, same), expected, rtol=1e-6)
    # traced numbers are not compared: the denoiser's own schedule is used
    np.testing.assert_allclose(jax.jit(denoise)(VP, jdiff.VP(0.1, 10.0)), expected, rtol=1e-6)
    several = jax.vmap(lambda beta: denoise(jdiff.VP(0.1, beta), jdiff.VP(0.1, beta)))(jnp.array([10.0, 20.0]))
    one_by_one = [denoise(schedule, schedule) for schedule in (jdiff.VP(0.1, 10.0), VP)]
    np.testing.assert_allclose(several, one_by_one, rtol=1e-6)


@pytest.mark.parametrize("table", [jdiff.betas.linear(100), np.array([0.1, 0.2, 0.3056])])  # log_nsr = 1e-4 at the last
def test_a_table_is_itself_in_float32_and_float64(table):
    rounded = jdiff.discrete(table.astype(np.float32))
    with jax.enable_x64(True):
        exact, scaled = jdiff.discrete(table), jdiff.discrete(table * (1 + 1e-4))
        for one, other in ((rounded, exact), (exact, rounded)):
            assert one.log_nsr.dtype != other.log_nsr.dtype
            denoise = Diagonal(one)
            assert jdiff.as_denoise(denoise, other) == denoise
            with pytest.raises(ValueError, match=r"differ in Discrete\.log_nsr"):
                jdiff.as_denoise(denoise, scaled)


def test_a_function_meets_one_schedule():
    lifted = jdiff.as_denoise(plain, VP)
    np.testing.assert_array_equal(jdiff.as_denoise(lifted, VP)(X, 0.5), plain(X, 0.5))
    assert jdiff.as_denoise(lifted, VP) == lifted
    with pytest.raises(ValueError, match="must have one schedule"):
        jdiff.as_denoise(lifted, FLOW)


@pytest.mark.parametrize("t", [500, np.array([0, 1, 2]), np.float32(500), -0.1, np.array([0.5, 0.2, 2.0]), 2])
def test_an_index_is_no_time(t):
    for call in (
        lambda: jdiff.q_sample(VP, X, t, X),
        lambda: Diagonal(VP)(X, t),
        lambda: targets.aim(VP, targets.V(), X, X, t),
        lambda: sde.score(Diagonal(VP), VP, X, t),
        lambda: conditioning.LogSNR()(VP, X, t),
        lambda: jdiff.oracle.Gaussian(np.zeros(2), np.eye(2)).denoise(VP)(X, t),
    ):
        with pytest.raises(ValueError, match=r"t = .* is no time; times .* t = \(k \+ 1\) / T"):
            call()


def test_a_traced_index_is_no_time():
    with pytest.raises(ValueError, match=r"t is int32; times .* t = \(k \+ 1\) / T"):
        jax.jit(lambda t: jdiff.q_sample(VP, X, t, X))(np.array([1, 2, 3], np.int32))
    expected = jdiff.q_sample(VP, X, 1.0, X)
    for one in (1, np.int64(1), np.ones(3, np.int32)):
        np.testing.assert_allclose(jdiff.q_sample(VP, X, one, X), expected, rtol=1e-6)
    np.testing.assert_allclose(jax.jit(lambda t: jdiff.q_sample(VP, X, t, X))(1), expected, rtol=1e-6)
