"""What the losses share, as the denoiser of the network that was trained with it."""

import chex
import jax
import jax.numpy as jnp
import pytest

import jdiff
from jdiff import conditioning, losses, targets


def network(params, x, label, cond):
    shift = 0 if cond is None else cond[:, None]
    return params * x * jnp.cos(label)[:, None] + shift


X, PARAMS = jax.random.normal(jax.random.key(0), (3, 2)), jnp.float32(0.7)


def test_denoiser_of_a_regression():
    """It has the schedule, the target and the conditioning of the loss."""
    made = losses.Regression(
        schedule=jdiff.Flow(), target=targets.Velocity(), conditioning=conditioning.Continuous(2.0)
    )
    cond = jnp.arange(3.0)
    denoise = made.denoiser(network, PARAMS, cond)
    by_hand = jdiff.denoiser(
        network, PARAMS, jdiff.Flow(), targets.Velocity(), cond, conditioning=conditioning.Continuous(2.0)
    )
    chex.assert_trees_all_equal(denoise(X, 0.3), by_hand(X, 0.3), strict=True)
    loss, _ = losses.denoising(network, PARAMS, jax.random.key(1), X, cond, **vars(made))
    assert jnp.isfinite(loss)


def test_a_function_as_conditioning_is_shown_a_time_for_each_sample():
    """Also where a solver asks at one time for all samples."""
    shown = []

    def raw(schedule, x, t):
        shown.append(jnp.shape(t))
        return x, t

    denoise = jdiff.denoiser(network, PARAMS, jdiff.Flow(), targets.Velocity(), conditioning=raw)
    of_one = jdiff.denoiser(
        network, PARAMS, jdiff.Flow(), targets.Velocity(), conditioning=conditioning.Continuous(1.0)
    )
    times = jdiff.grid.uniform(3)
    found, expected = (jdiff.sample(jdiff.solvers.Heun(), one, jdiff.Flow(), X, times) for one in (denoise, of_one))
    chex.assert_trees_all_close(found, expected, rtol=1e-6, atol=1e-6)
    assert set(shown) == {(3,)}


@pytest.mark.parametrize("shape", [(), (2,)])
def test_a_label_without_a_row_for_each_sample_is_refused(shape):
    denoise = jdiff.denoiser(
        network, PARAMS, jdiff.Flow(), targets.Velocity(), conditioning=lambda schedule, x, t: (x, jnp.zeros(shape))
    )
    with pytest.raises(ValueError, match=r"the conditioning made a label \(.*\) for x \(3, 2\); expected \(3,\)"):
        denoise(X, 0.5)
