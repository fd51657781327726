"""Optimisers against their own formulas, by hand in NumPy (names, schedules and errors: also test_train.py)."""

import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import optim

GRADS = [np.array([3.0, -4.0]), np.array([0.3, 0.4]), np.array([-1.0, 0.5])]


def run(tx, params):
    """The parameters after each gradient of GRADS."""
    params = jnp.asarray(params, jnp.float32)
    state, path = tx.init(params), []
    for grad in GRADS:
        updates, state = tx.update(jnp.asarray(grad, jnp.float32), state, params)
        params = params + updates
        path.append(np.asarray(params))
    return np.array(path)


def adam(params, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, grads=GRADS):
    """Kingma & Ba 2014, arXiv:1412.6980, algorithm 1; with decoupled decay, 1711.05101."""
    m = v = np.zeros(2)
    path = []
    for t, grad in enumerate(grads, 1):
        rate = lr(t - 1) if callable(lr) else lr
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        params = params - rate * (step + decay * params)
        path.append(params)
    return np.array(path)


def test_adam():
    want = adam(np.ones(2), 0.1, b2=0.99)
    np.testing.assert_allclose(run(optim.optimizer("adam", 0.1, b2=0.99), [1, 1]), want, rtol=1e-5)


def test_adamw_decays_the_parameters():
    want = adam(np.ones(2), 0.1, decay=0.5)
    np.testing.assert_allclose(run(optim.optimizer("adamw", 0.1, weight_decay=0.5), [1, 1]), want, rtol=1e-5)


def test_clipping_is_before_adam_and_only_above_the_norm():
    """Of norms 5, 0.5 and 1.118 only the first and the last are scaled down to 1."""
    clipped = [grad / max(1.0, np.linalg.norm(grad)) for grad in GRADS]
    want = adam(np.ones(2), 0.1, grads=clipped)
    np.testing.assert_allclose(run(optim.optimizer("adam", 0.1, clip=1.0), [1, 1]), want, rtol=1e-5)


def test_warm_up_reaches_the_optimizer():
    """Step k of a warm-up over 2 has the rate lr k / 2."""
    rates = optim.lr_schedule("constant", 0.1, 100, warmup_steps=2)
    np.testing.assert_allclose([rates(k) for k in (0, 1, 2, 3, 1000)], [0, 0.05, 0.1, 0.1, 0.1], rtol=1e-6)
    want = np.ones(2) - np.cumsum([k * np.asarray(g) for k, g in zip((0, 0.05, 0.1), GRADS, strict=True)], axis=0)
    np.testing.assert_allclose(run(optim.optimizer("sgd", rates), [1, 1]), want, rtol=1e-5)


def test_cosine_ends_at_zero_and_stays():
    rates = optim.lr_schedule("cosine", 2.0, 100)
    k = np.array([0, 25, 50, 75, 100, 150])
    want = 1 + np.cos(np.pi * np.minimum(k, 100) / 100)
    np.testing.assert_allclose([rates(i) for i in k], want, atol=1e-6)


def test_errors_name_the_choices():
    with pytest.raises(ValueError, match="unknown optimizer 'adma'; one of adam, adamw, sgd"):
        optim.optimizer("adma", 0.1)
    with pytest.raises(ValueError, match="unknown learning-rate schedule 'step'; one of constant, cosine"):
        optim.lr_schedule("step", 0.1, 10)
    with pytest.raises(ValueError, match="clip"):
        optim.optimizer("adam", 0.1, clip=0)
    with pytest.raises(ValueError, match="warm-up"):
        optim.lr_schedule("constant", 0.1, 10, -1)
