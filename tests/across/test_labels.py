"""Numbers that choose a row of a table: known ones out of range raise, traced ones make their own sample nan."""

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff.models import MLP, DiT, EDM2UNet, StepMLP, TextEncoder, UNet, ViT
from jdiff.models.unet import InSigma

IMAGE, POINT, CLASSES = (4, 4, 4, 1), (4, 2), 3
TINY = dict(channels=4, multipliers=(1,), blocks=1, attention=())
PATCHES = dict(width=8, depth=1, heads=1, patch=4)
NETWORKS = {
    "unet": (UNet(num_classes=CLASSES, **TINY), IMAGE),
    "edm2": (EDM2UNet(num_classes=CLASSES, head_channels=4, **TINY), IMAGE),
    "dit": (DiT(num_classes=CLASSES, **PATCHES), IMAGE),
    "vit": (ViT(num_classes=CLASSES, **PATCHES), IMAGE),
    "mlp": (MLP(features=8, layers=1, num_classes=CLASSES), POINT),
    "step mlp": (StepMLP(steps=10, features=8, layers=1, num_classes=CLASSES), POINT),
}
GOOD = jnp.array([0, 2, 3, 1])  # 3 is no class
BAD = {
    "above": jnp.array([0, 4, 3, 1]), "below": jnp.array([0, -1, 3, 1]), "far": np.array([0, 2**32 + 1, 3, 1]),
    "float": jnp.array([0.0, 2.0, 3.0, 1.0]), "bool": jnp.array([True, False, True, True]), "column": GOOD[:, None],
    "one": jnp.array(1), "short": GOOD[:3], "one-hot": jax.nn.one_hot(GOOD, CLASSES),
}  # fmt: skip


def variables_of(model, *inputs):
    """Random ones, also of the layers that start at zero. In NumPy: nothing to compile."""
    rng, shapes = np.random.default_rng(0), jax.eval_shape(model.init, jax.random.key(0), *inputs)
    return jax.tree.map(lambda a: jnp.asarray(rng.normal(size=a.shape), a.dtype), shapes)


@pytest.mark.parametrize("name", NETWORKS)
def test_class_labels_that_are_known(name):
    """They raise in one line also where all else is traced, by init as by apply."""
    model, shape = NETWORKS[name]
    message = r"^class labels (must be in 0..3, got (4|-1|4294967297)|are .*; expected integers \(4,\))(\n|$)"
    for cond in BAD.values():
        with pytest.raises(ValueError, match=message):
            jax.eval_shape(lambda x, cond=cond: model.init(jax.random.key(0), x, jnp.ones(4), cond), jnp.ones(shape))


@pytest.mark.parametrize("name", NETWORKS)
def test_class_labels_that_are_traced(name):
    """Whatever they are, the other samples are what they were."""
    model, shape = NETWORKS[name]
    x, label = jnp.ones(shape), jnp.arange(4.0)
    variables, apply = variables_of(model, x, label, GOOD), jax.jit(model.apply)
    want = apply(variables, x, label, GOOD)
    assert np.isfinite(want).all()
    for outside in (4, 300, -1, -(2**31), 2**31 - 1):
        got = np.asarray(apply(variables, x, label, GOOD.at[1].set(outside)))
        assert np.isnan(got[1]).all(), outside
        chex.assert_trees_all_equal(np.delete(got, 1, 0), np.delete(np.asarray(want), 1, 0))


def test_labels_of_eight_bits_reach_the_classes_that_they_name():
    """Where there are more than 256 of them: label 44 is not class 300 too."""
    model, x, label = EDM2UNet(num_classes=301, head_channels=4, **TINY), jnp.ones(IMAGE), jnp.arange(4.0)
    cond = jnp.array([44, 0, 255, 127])
    variables, apply = variables_of(model, x, label, cond), jax.jit(model.apply)
    want = apply(variables, x, label, cond)
    chex.assert_trees_all_close(apply(variables, x, label, cond.astype(jnp.uint8)), want, rtol=1e-6)


def test_without_a_row_for_no_class():
    """`null_class` False: the labels are 0..num_classes - 1."""
    model, x = UNet(num_classes=CLASSES, null_class=False, **TINY), jnp.ones(IMAGE)
    jax.eval_shape(lambda x: model.init(jax.random.key(0), x, jnp.zeros(4), [0, 2, 2, 1]), x)
    with pytest.raises(ValueError, match=r"class labels must be in 0..2, got 3"):
        jax.eval_shape(lambda x: model.init(jax.random.key(0), x, jnp.zeros(4), GOOD), x)


class Same(nn.Module):
    """A network that says what it is shown."""

    def __call__(self, x, label, cond, train, augment):
        return x


@pytest.mark.parametrize(
    "model,shape", [(StepMLP(10, 8, 1), POINT), (InSigma(Same(), levels=10), IMAGE)], ids=["steps", "sigmas"]
)
def test_noise_labels_that_are_places_in_a_table(model, shape):
    x, label = jnp.ones(shape), jnp.array([0.0, 9.0, 5.0, 1.0])
    variables, apply = variables_of(model, x, label), jax.jit(model.apply)
    for bad in (10, -1, jnp.nan, 1e30):
        with pytest.raises(ValueError, match=r"^noise labels must be in 0..9, got "):
            model.apply(variables, x, label.at[2].set(bad))
    want = np.asarray(apply(variables, x, label))
    assert np.isfinite(want).all()
    for bad in (10, 1e30, -1, jnp.nan):
        got = np.asarray(apply(variables, x, label.at[2].set(bad)))
        assert np.isnan(got[2]).all(), bad
        chex.assert_trees_all_equal(np.delete(got, 2, 0), np.delete(want, 2, 0))


def test_tokens():
    model = TextEncoder(width=8, depth=1, heads=1, length=5, vocabulary=9)
    tokens, mask = jnp.array([[1, 8, 0], [1, 3, 2]]), jnp.array([[True, True, False], [True, True, True]])
    for bad in (9, -1):
        with pytest.raises(ValueError, match=rf"^tokens must be in 0..8, got {bad}"):
            model.init(jax.random.key(0), tokens.at[0, 1].set(bad), mask)
    variables, apply = variables_of(model, tokens, mask), jax.jit(model.apply)
    want = apply(variables, tokens, mask)
    for bad in (9, -1):
        got = apply(variables, tokens.at[0, 1].set(bad), mask)
        assert all(np.isnan(part[0]).all() for part in got)
        chex.assert_trees_all_equal([part[1] for part in got], [part[1] for part in want])


def test_dropped_labels_hold_no_class():
    """Whatever the dtype of the labels: 300 is not 44, and a dropped boolean is no class."""
    drop = jdiff.conditioning.drop_labels
    for kind in (jnp.uint8, jnp.int8, jnp.int16, jnp.int32):
        chex.assert_trees_all_equal(drop(jax.random.key(0), jnp.arange(4, dtype=kind), 1.0, 300), jnp.full(4, 300))
        kept = drop(jax.random.key(0), jnp.arange(4, dtype=kind), 0.0, np.int64(300))
        chex.assert_trees_all_equal(kept, jnp.arange(4))
    for labels in (jnp.zeros(4), jnp.zeros(4, bool)):
        with pytest.raises(ValueError, match="labels are (float32|bool); expected integers"):
            drop(jax.random.key(0), labels, 0.5, 3)
