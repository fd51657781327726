"""Training in half precision: averages, gradients, moments and losses are those of float32, against float64."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from helpers import Diagonal
from jax.sharding import PartitionSpec as P

import jdiff
from jdiff import ema, losses, optim, parallel, train
from jdiff.train import checkpoint

KEY = jax.random.key(0)
RNG = np.random.default_rng(0)


def cast(tree, dtype):
    return jax.tree.map(lambda a: jnp.asarray(a, dtype), tree)


# ---------------------------------------------------------------- averages


def linear(params, key, data, cond):
    """A loss whose gradient is the data's mean, and the parameters before the step."""
    return (params["w"][None] * data.astype(params["w"].dtype)).mean(0).sum(), {"w": params["w"][None]}


def test_the_average_of_bfloat16_parameters_is_the_weighted_sum():
    """keep^n p_0 + sum_i (1 - keep) keep^(n - i) p_i in float64, over the parameters of 1,000 jitted, donated steps."""
    keep, n = float(np.float32(0.999)), 1000
    tx = optax.sgd(0.1)
    step = train.make_train_step(linear, tx, keep)
    loop = train.make_train_loop(step, record=lambda aux: {"w": aux["w"][0]})
    state = train.init_state({"w": jnp.ones(3, jnp.bfloat16)}, tx)
    arrays = np.float32(RNG.normal(size=(n, 4, 3))), None
    state, record = jax.jit(loop, donate_argnums=0)(state, KEY, arrays, jnp.arange(n), n)
    path = np.concatenate([record["w"], state.params["w"].astype(jnp.float32)[None]]).astype(np.float64)
    weights = (1 - keep) * keep ** np.arange(n, -1, -1.0)
    weights[0] = keep**n
    want = weights @ path
    assert state.params["w"].dtype == jnp.bfloat16 and np.abs(want - 1).min() > 0.01
    chex.assert_trees_all_close(state.ema, {"w": want.astype(np.float32)}, rtol=1e-5)
    chex.assert_trees_all_equal_dtypes(state.ema, {"w": jnp.zeros(3)})


@pytest.mark.parametrize("over_devices", ["pmap", "shard_map"])
def test_averages_are_float32_on_devices(over_devices):
    """With decay 1/2 the average of two bfloat16 numbers, which float32 holds exactly."""
    tx, mesh = optax.sgd(0.1), parallel.mesh()
    params, data = {"w": RNG.normal(size=3).astype(jnp.bfloat16)}, np.float32(RNG.normal(size=(8, 3)))
    state = train.init_state(params, tx, averages=("main", "other"))
    law = {"main": 0.5, "other": 0.0}
    step = train.make_train_step(linear, tx, law, axis_name="data")
    if over_devices == "pmap":
        new, _ = jax.pmap(step, axis_name="data", in_axes=(0, None, 0))(parallel.stack(state), KEY, data[:, None])
        new = jax.tree.map(lambda a: np.asarray(a)[0], new)
    else:
        local = jax.shard_map(lambda s, d: step(s, KEY, d)[0], mesh=mesh, in_specs=(P(), P("data")), out_specs=P())
        new = jax.jit(local, donate_argnums=0)(state, data)
    before, after = (np.asarray(p["w"], np.float64) for p in (params, new.params))
    assert (before != after).any()
    want = {"main": {"w": ((before + after) / 2).astype(np.float32)}, "other": {"w": after.astype(np.float32)}}
    chex.assert_trees_all_equal(new.ema, want, strict=True)
    chex.assert_trees_all_equal_dtypes(new.ema, want)  # the line before takes bfloat16 for float32


def test_averages_of_float64_and_of_what_is_not_floating():
    """float64 stays what it is, decays too; integers, booleans and keys are those of the parameters."""
    old = {"w": jnp.zeros(2), "n": jnp.int32(3), "on": jnp.array([True, False]), "key": jax.random.key(1)}
    new = {"w": jnp.ones(2), "n": jnp.int32(8), "on": jnp.array([False, False]), "key": jax.random.key(2)}
    chex.assert_trees_all_equal(ema.update(old, new, 0.75), new | {"w": jnp.full(2, 0.25)}, strict=True)
    with jax.enable_x64(True):
        average = ema.update({"w": jnp.zeros(2)}, {"w": jnp.ones(2)}, ema.constant(0.999)(0))
        chex.assert_trees_all_close(average, {"w": np.full(2, 1 - 0.999)}, rtol=1e-12)


def test_a_checkpoint_with_half_precision_averages_opens(tmp_path):
    """As they were saved once: the numbers are the same, in float32."""
    tx = optim.optimizer("adamw", 0.1)
    state = train.init_state({"w": RNG.normal(size=(3, 4)).astype(jnp.bfloat16)}, tx)
    checkpoint.save(tmp_path, state.replace(ema=cast(state.ema, jnp.bfloat16)))
    back = checkpoint.restore(tmp_path, jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), state))
    assert back.ema["w"].dtype == jnp.float32 and back.params["w"].dtype == jnp.bfloat16
    chex.assert_trees_all_equal(back, state, strict=True)


# ---------------------------------------------------------------- gradients and moments


def test_gradients_are_added_up_in_float32():
    """512 slices with a gradient of 1: in bfloat16, 256 + 1 is 256."""
    tx = optax.sgd(1.0)
    state = train.init_state({"w": jnp.zeros(3, jnp.bfloat16)}, tx)
    step = jax.jit(train.make_train_step(linear, tx, 0.0, accumulate=512))
    state, aux = step(state, KEY, jnp.ones((512, 3)))
    chex.assert_trees_all_equal(state.params, {"w": jnp.full(3, -1.0, jnp.bfloat16)}, strict=True)
    chex.assert_trees_all_close(aux["grad_norm"], jnp.sqrt(3.0), rtol=1e-6)


def test_the_norm_of_the_gradient_is_taken_in_float32():
    """Gradients of 300, whose square float16 does not hold: the step is taken, and clipped to 1."""
    tx = optim.optimizer("sgd", 1.0, clip=1.0)
    state = train.init_state({"w": jnp.zeros(50, jnp.float16)}, tx)
    step = train.make_train_step(linear, tx, 0.0, skip_nonfinite=True)
    new, aux = jax.jit(step)(state, KEY, jnp.full((1, 50), 300.0))
    assert aux["skipped"] == 0
    chex.assert_trees_all_close(aux["grad_norm"], np.float32(300 * 50**0.5), rtol=1e-6)
    chex.assert_trees_all_close(new.params["w"].astype(jnp.float32), np.full(50, -(50**-0.5), np.float32), rtol=4e-3)


@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_states_and_steps_of_optimisers_are_float32(name):
    """Of bfloat16 parameters and gradients: as those of float32 ones, without one dtype between that is half."""
    params = {"kernel": jnp.ones((4, 4)), "bias": jnp.ones(4)}
    tx = optim.optimizer(name, 0.1, clip=0.5)

    def step(params):
        state = tx.init(params)
        return state, tx.update(params, state, params)

    got, want = jax.eval_shape(step, cast(params, jnp.bfloat16)), jax.eval_shape(step, params)
    chex.assert_trees_all_equal_shapes_and_dtypes(got, want)
    assert "bf16" not in str(jax.make_jaxpr(tx.update)(params, tx.init(params), params))


def test_a_moment_falls():
    """One gradient of 1 and then none: v = (1 - b2) b2^k after k more steps."""
    params, tx = {"w": jnp.ones(2, jnp.bfloat16)}, optim.optimizer("adam", 0.1, b2=0.999)
    zeros = jax.tree.map(jnp.zeros_like, params)
    _, state = tx.update(params, tx.init(params), params)
    state, _ = jax.jit(lambda s: jax.lax.scan(lambda s, _: (tx.update(zeros, s, params)[1], None), s, None, 500))(state)
    chex.assert_trees_all_close(optax.tree.get(state, "nu"), {"w": np.full(2, 1e-3 * 0.999**500)}, rtol=1e-4)


# ---------------------------------------------------------------- losses

TABLE = jdiff.discrete(jdiff.betas.linear(20, 1e-2, 0.3))
EXACT = Diagonal(TABLE, 0.3, 0.4)
LOSS = dict(schedule=TABLE, target=jdiff.targets.Eps(), conditioning=jdiff.conditioning.Continuous(1.0))


def exact_eps(params, x, t, cond):
    return EXACT.predict(x, t).eps


def losses_of(x0):
    """What a loss and each term of the bound say of x0 (B, D)."""
    halves = lambda p, x, t, cond: jnp.concatenate([exact_eps(p, x, t, cond), 0.3 * x], -1)  # noqa: E731
    chosen = dict(coupling=jdiff.coupling.Nearest(2), weight=jdiff.weights.MinSNR())
    return losses.hybrid(halves, None, KEY, x0, **LOSS, **chosen), losses.vlb_terms(EXACT, TABLE, x0, x0, 0.5)


def test_losses_of_bfloat16_data_are_those_of_the_same_data_in_float32():
    x0 = np.tanh(RNG.normal(size=(8, 2))).astype(jnp.bfloat16)
    got, want = jax.jit(lambda x0: (losses_of(x0), losses_of(x0.astype(jnp.float32))))(x0)
    chex.assert_trees_all_close(got, want, rtol=1e-5, atol=1e-6, strict=True)
    chex.assert_trees_all_equal_dtypes(got, want)


def test_the_noise_of_bfloat16_data_has_tails_and_is_fine():
    """A network that says 0 has the loss eps^2: of 20,000 draws almost all are different, the largest beyond 3.5^2."""
    x0 = jnp.zeros((20_000, 1), jnp.bfloat16)
    _, aux = jax.jit(lambda x0: losses.denoising(lambda p, x, t, cond: 0 * x, None, KEY, x0, **LOSS))(x0)
    square = np.asarray(aux["each"], np.float64)
    assert len(np.unique(square)) > 19_000 and square.max() > 3.5**2
    np.testing.assert_allclose([square.mean(), (square**2).mean()], [1, 3], rtol=0.05)  # 0.01 and 0.02 are deviations


@pytest.mark.parametrize(
    "loss",
    [
        lambda x: losses.denoising(exact_eps, None, KEY, x, **LOSS),
        lambda x: losses.uncertain(exact_eps, None, KEY, x, **LOSS),
        lambda x: losses.hybrid(exact_eps, None, KEY, x, **LOSS),
        lambda x: losses.vlb_terms(EXACT, TABLE, x, x * 1.0, 0.5),
        lambda x: losses.vlb_terms(EXACT, TABLE, x * 1.0, x, 0.5),
        lambda x: losses.vlb_prior(TABLE, x),
    ],
    ids=["denoising", "uncertain", "hybrid", "terms x0", "terms x_t", "prior"],
)
def test_integers_are_no_data(loss):
    with pytest.raises(
        ValueError, match=r"is uint8; expected a floating array: scale images by x / 127.5 - 1"
    ) as caught:
        loss(jnp.full((4, 2), 200, jnp.uint8))
    assert "\n" not in str(caught.value)
