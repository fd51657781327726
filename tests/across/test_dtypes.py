"""What arrays the verbs take: floating ones of any precision, and never integers in silence."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Diagonal
from scipy import stats

import jdiff
from jdiff import losses, solvers, targets
from jdiff.core.keys import normal

SCHEDULE = jdiff.VP()
IMAGES = np.arange(24, dtype=np.uint8).reshape(2, 3, 4)
NOISE = np.ones((2, 3, 4), np.float32)
T = jnp.array(0.5)
TIMES = jdiff.grid.log_snr(SCHEDULE, 3)


def network(params, x, label, cond):
    return x


def total(x, t=None):
    return x.reshape(len(x), -1).sum(1)


DENOISE = jdiff.denoiser(network, (), SCHEDULE, targets.V())
MIXTURE = jdiff.oracle.Gaussian(np.zeros(4, np.float32), np.eye(4, dtype=np.float32))
TAKES_X = {
    "q_sample": lambda x: jdiff.q_sample(SCHEDULE, x, T, NOISE),
    "q_sample of eps": lambda x: jdiff.q_sample(SCHEDULE, NOISE, T, x),
    "q_posterior of x0": lambda x: jdiff.q_posterior(SCHEDULE, x, NOISE, T, 0.2),
    "q_posterior of x_t": lambda x: jdiff.q_posterior(SCHEDULE, NOISE, x, T, 0.2),
    "eps_from": lambda x: jdiff.eps_from(SCHEDULE, x, NOISE, T),
    "eps_from of x": lambda x: jdiff.eps_from(SCHEDULE, NOISE, x, T),
    "aim": lambda x: targets.aim(SCHEDULE, targets.V(), x, NOISE, T),
    "aim of eps": lambda x: targets.aim(SCHEDULE, targets.V(), NOISE, x, T),
    "solve": lambda x: targets.solve(SCHEDULE, targets.V(), x, NOISE, T),
    "denoiser": lambda x: DENOISE(x, T),
    "denoiser.predict": lambda x: DENOISE.predict(x, T),
    "guided": lambda x: jdiff.guidance.cfg(DENOISE, DENOISE, 2.0)(x, T),
    "apg": lambda x: jdiff.guidance.apg(DENOISE, lambda x, t: 0.5 * x, 2.0, limit=0.1)(x, T),
    "cfg_pp": lambda x: jdiff.guidance.cfg_pp(DENOISE, lambda x, t: 0.5 * x, 0.5)(x, T),
    "zero_star": lambda x: jdiff.guidance.zero_star(DENOISE, lambda x, t: 0.5 * x, 2.0)(x, T),
    "tcfg": lambda x: jdiff.guidance.tcfg(DENOISE, lambda x, t: 0.5 * x, 2.0)(x, T),
    "rescale": lambda x: jdiff.guidance.rescale(lambda x, t: 2 * x - 0.1, DENOISE, 0.7)(x, T),
    "compose": lambda x: jdiff.guidance.compose(DENOISE, [(lambda x, t: 0.5 * x, 2.0)])(x, T),
    "classifier": lambda x: jdiff.guidance.classifier(DENOISE, total, 2.0)(x, T),
    "classifier_x0": lambda x: jdiff.guidance.classifier_x0(DENOISE, total, 2.0, std=1.0)(x, T),
    "interval": lambda x: jdiff.guidance.interval(DENOISE, DENOISE, 0.1, 9.0)(x, T),
    "threshold": lambda x: jdiff.guidance.threshold(DENOISE, SCHEDULE)(x, T),
    "oracle": lambda x: MIXTURE.denoise(SCHEDULE)(x[0], T),
    "oracle score": lambda x: MIXTURE.score(SCHEDULE, x[0], T),
    "oracle log_prob": lambda x: MIXTURE.log_prob(SCHEDULE, x[0], T),
    "score": lambda x: jdiff.sde.score(lambda x, t: jnp.ones_like(x), SCHEDULE, x, T),
    "reverse": lambda x: jdiff.sde.reverse(DENOISE, SCHEDULE)(x, T),
    "probability_flow": lambda x: jdiff.sde.probability_flow(DENOISE, SCHEDULE)(x, T),
    "log_snr conditioning": lambda x: jdiff.conditioning.LogSNR()(SCHEDULE, x, T),
    "sample": lambda x: jdiff.sample(solvers.DDIM(), DENOISE, SCHEDULE, x, TIMES),
    "invert": lambda x: jdiff.invert(solvers.DDIM(), DENOISE, SCHEDULE, x, TIMES),
    "sample_parallel": lambda x: jdiff.sample_parallel(solvers.DDIM(), DENOISE, SCHEDULE, x, TIMES),
    "sample_adaptive": lambda x: jdiff.sample_adaptive(DENOISE, SCHEDULE, x),
    "log_likelihood": lambda x: jdiff.log_likelihood(DENOISE, SCHEDULE, x, jax.random.key(0)),
    "encode": lambda x: jdiff.encode(DENOISE, SCHEDULE, x),
    "variational_bound": lambda x: jdiff.variational_bound(DENOISE, SCHEDULE, x, jax.random.key(0)),
    "denoising loss": lambda x: losses.denoising(
        network, (), jax.random.key(0), x, schedule=SCHEDULE, target=targets.V()
    ),
}


@pytest.mark.parametrize("dtype", [np.uint8, np.int32, bool])
def test_integers_are_refused(dtype):
    """Cast to an integer, alpha_t and sigma_t are 0: each verb says that it wants floating arrays."""
    for name, verb in TAKES_X.items():
        with pytest.raises(ValueError, match=f"{np.dtype(dtype)}.*float"):
            print(name, verb(jnp.asarray(IMAGES).astype(dtype)))
    with pytest.raises(ValueError, match="noise is floating"):
        jdiff.prior(SCHEDULE, jax.random.key(0), (2, 3), dtype=dtype)


def test_verbs_take_floats():
    """The same table is traced on floating images: the errors above are those of the dtype."""
    for verb in TAKES_X.values():
        jax.eval_shape(verb, jax.ShapeDtypeStruct(IMAGES.shape, jnp.float32))


def test_half_precision_noise_is_that_of_float32():
    """Drawn in float32 and rounded: the same numbers, with the moments and the tails of a normal law."""
    dtypes = jnp.float32, jnp.bfloat16, jnp.float16

    @jax.jit
    def noises(key):
        step = jdiff.BrownianTree(key).rows(4).over(0, 0.7, 0.3)
        return [(normal(key, (1000, 200), dtype), normal(step, (4, 2), dtype)) for dtype in dtypes]

    single, *halves = noises(jax.random.key(0))
    for dtype, half in zip(dtypes[1:], halves, strict=True):
        rounded = jax.tree.map(lambda a, d=dtype: a.astype(d), single)
        # a unit in the last place: XLA may compute the float32 numbers twice, in two ways
        chex.assert_trees_all_close(half, rounded, rtol=float(jnp.finfo(dtype).eps), strict=True)
        z = np.asarray(half[0], np.float64).ravel()
        assert abs(z.mean()) < 5 / np.sqrt(z.size) and abs(z.std() - 1) < 5 / np.sqrt(2 * z.size)
        beyond = (np.abs(z) > 3).mean() / (2 * stats.norm.sf(3))
        assert 0.8 < beyond < 1.2


def test_half_precision_samples_follow_float32():
    """A sampler in bfloat16, stochastic solver and all, stays within its rounding of the one in float32."""
    x = jdiff.prior(SCHEDULE, jax.random.key(0), (64, 2))

    @jax.jit
    def both(x):
        single, half = (
            jdiff.sample(solvers.DDIM(1.0), Diagonal(SCHEDULE), SCHEDULE, x.astype(d), TIMES, jax.random.key(1))
            for d in (jnp.float32, jnp.bfloat16)
        )
        return single, half

    single, half = both(x)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), single, atol=0.05)
