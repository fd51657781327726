"""RePaint on Gaussian data, where its mean is an affine map that no draw is needed for."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Diagonal

import jdiff
from jdiff import posterior
from jdiff.core.pytrees import noun

C, Y = np.float32([[1.0, 0.9], [0.9, 1.0]]), np.float32([0.8, 0.0])
MASK, TIMES = np.float32([1, 0]), jdiff.grid.log_snr(jdiff.VP(), 12)
DATA = jdiff.oracle.Gaussian(np.zeros(2, np.float32), C)


@noun
class Still:
    """Noise that is 0: what is affine in its noise then gives its mean."""

    def rows(self, n):
        return self

    def over(self, i, t, s):
        return self

    def fold(self, data):
        return self

    def part(self, t, s, j):
        return self

    def normal(self, shape, dtype=jnp.float32):
        return jnp.zeros(shape, dtype)


def test_more_rounds_bring_the_hidden_part_to_its_posterior():
    """E[hidden | y] is 0.72. The mean comes nearer with each number of rounds; one round is far."""

    @jax.jit
    def means(x):
        denoise, schedule = DATA.denoise(jdiff.VP()), jdiff.VP()
        made = [posterior.repaint(jdiff.solvers.DDIM(), MASK, Y, rounds=rounds) for rounds in (1, 4, 40)]
        return [jdiff.sample(one, denoise, schedule, x, TIMES, Still())[0, 1] for one in made]

    away = abs(np.asarray(means(jnp.zeros((1, 2)))) - C[0, 1] * Y[0])
    assert away[0] > 0.1 and (away[1:] < away[:-1] / 2).all(), away


def test_what_is_observed_is_y():
    """With `replace` as the denoiser the samples are y where it is seen, also of one y for each sample."""
    denoise, schedule = Diagonal(jdiff.VP()), jdiff.VP()

    @jax.jit
    def run(key, y):
        solver = posterior.repaint(jdiff.solvers.DDPM(), MASK, y, rounds=3)
        x = jdiff.prior(schedule, key, (4, 2))
        return jdiff.sample(solver, posterior.replace(denoise, MASK, y), schedule, x, TIMES, key)

    for y in (Y, np.arange(8, dtype=np.float32).reshape(4, 2)):
        x = np.asarray(run(jax.random.key(0), y))
        np.testing.assert_allclose(x[:, 0], np.broadcast_to(y, (4, 2))[:, 0], rtol=1e-6)
        assert np.isfinite(x).all() and x[:, 1].std() > 0.05


BAD = [
    (lambda: posterior.repaint("ddim", MASK, Y), "solver is 'ddim'; expected a solver, as solvers.DDIM()"),
    (lambda: posterior.repaint(jdiff.solvers.DPMpp2M(), MASK, Y), "remembers earlier steps; use DDIM, DDPM, Heun"),
    (
        lambda: posterior.repaint(jdiff.solvers.DDIM(), MASK, Y, rounds=0),
        "repaint: rounds must be a whole number, 1 or",
    ),
    (lambda: posterior.repaint(jdiff.solvers.DDIM(), 0.5 * MASK, Y), "mask has other numbers than 0 and 1"),
    (lambda: posterior.repaint(jdiff.solvers.DDIM(), MASK, Y * np.nan), "y has numbers that are not finite"),
    (
        lambda: jdiff.sample(
            posterior.repaint(jdiff.solvers.DDIM(), MASK, Y), Diagonal(jdiff.VP()), jdiff.VP(), np.ones((3, 2)), TIMES
        ),
        "Repaint draws noise: give a key",
    ),
]


@pytest.mark.parametrize("call,message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_calls(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
