"""The recipe of a run: what the network is shown in training, by a network that only notes what it is shown."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import config as configs
from jdiff import data, runs
from jdiff.config import Config, Named, Sample, Train

B, CLASSES = 256, 10


class Spy:
    """A network whose output is zero, or (zero, zero) where it is asked for its uncertainty."""

    num_classes = CLASSES

    def __init__(self):
        self.calls = []

    def apply(self, params, x, label, cond, **options):
        self.calls.append((np.asarray(x), None if cond is None else np.asarray(cond), options))
        out = jnp.zeros_like(x) + 0.0 * params["w"]
        return (out, jnp.zeros(x.shape[0])) if options.get("return_logvar") else out


def run_of(train=None, **changes):
    """(a run on images whose left half is dark, what notes its network's calls); noise is nearly absent."""
    x = np.broadcast_to(np.repeat(np.array([0, 255], np.uint8), 2)[None, None, :, None], (B, 4, 4, 1)).copy()
    labels = np.arange(B, dtype=np.int32) % CLASSES
    images = data.Dataset("halves", x, labels, x, labels, CLASSES)
    settings = dict(
        name="a", data=Named("digits"), model=Named("unet_digits"), schedule=Named("vp"), target=Named("x0"),
        levels=Named("uniform", {"t_min": 1e-4, "t_max": 2e-4}), train=Train(**dict(label_dropout=0.0) | (train or {})),
    )  # fmt: skip
    config, spy = Config(**settings | changes), Spy()
    facts, regression = data.facts_of(images), configs.build_regression(config)
    run = runs.Run("no", config, facts, spy, regression, configs.build_loss(config), lambda: images)
    return run, spy


def shown(run, spy, **collections):
    """((x, labels, options) that the network was shown, aux), for the whole set as one batch."""
    x0, labels = runs.make_take(run)((run.dataset.x, run.dataset.labels), jnp.arange(B))
    value, aux = runs.make_loss(run)({"w": jnp.zeros(())}, jax.random.key(0), x0, labels, **collections)
    chex.assert_shape(aux["each"], (B,))
    chex.assert_shape(value, ())
    return spy.calls[-1], aux


def dark_left(x):
    """For each image, whether it is as stored (1), mirrored (0), or neither (nan)."""
    left = x[:, :, :2].mean((1, 2, 3))
    return np.where(left < -0.9, 1.0, np.where(left > 0.9, 0.0, np.nan))


def test_data_and_labels_as_they_are():
    run, spy = run_of()
    (x, labels, options), _ = shown(run, spy)
    np.testing.assert_array_equal(dark_left(x), 1)
    np.testing.assert_array_equal(labels, run.dataset.labels)
    assert options["train"] is True and set(options) == {"train", "rngs"}


def test_a_share_of_the_labels_is_hidden():
    run, spy = run_of(dict(label_dropout=0.25))
    (_, labels, _), _ = shown(run, spy)
    hidden = labels == CLASSES
    np.testing.assert_array_equal(labels[~hidden], run.dataset.labels[~hidden])
    assert abs(hidden.mean() - 0.25) < 4 * np.sqrt(0.25 * 0.75 / B)


def test_half_of_the_images_are_mirrored():
    run, spy = run_of(dict(flip=True))
    (x, _, _), _ = shown(run, spy)
    assert abs(dark_left(x).mean() - 0.5) < 4 * np.sqrt(0.25 / B)


def test_augmentation_is_told_to_the_network():
    run, spy = run_of(dict(augment=1.0, flip=True))
    (x, _, options), _ = shown(run, spy)
    chex.assert_shape(options["augment"], (B, 9))
    chex.assert_tree_all_finite(options["augment"])
    mirrored = np.asarray(options["augment"][:, 0])  # which is 1 for those that the augmentation has mirrored
    assert set(np.unique(mirrored)) == {0.0, 1.0}


def test_the_uncertainty_is_asked_for():
    run, spy = run_of(loss=Named("uncertain"))
    (_, _, options), aux = shown(run, spy)
    assert options["return_logvar"] is True
    chex.assert_trees_all_equal(aux["each"], aux["error"])  # e^-u err + u at u = 0


def test_loss_aware_levels_learn():
    law = Named("loss_aware", {"T": 8, "bins": 4, "history": 1})
    run, spy = run_of(levels=law, schedule=Named("discrete", {"T": 8}))
    before = {"levels": run.regression.levels.init()}
    _, aux = shown(run, spy, extra=before)
    assert float(aux["extra"]["levels"]["count"].sum()) > 0 == float(before["levels"]["count"].sum())


def test_rehearsing_says_what_does_not_fit():
    run, _ = run_of(sample=Sample(solver=Named("ddpm", {"variance": "learned"}), grid=Named("log_snr")))
    run = dataclasses.replace(run, model=configs.build_model(run.config, CLASSES))
    with pytest.raises(configs.ConfigError, match="do not fit: "):
        runs.rehearse(run)


def test_a_batch_is_that_of_its_rows():
    run, _ = run_of()
    take = runs.make_take(run)
    arrays = run.dataset.x, run.dataset.labels
    x, labels = take(arrays, jnp.array([3, 1]))
    chex.assert_trees_all_equal(np.asarray(x), np.asarray(run.dataset.to_model(run.dataset.x[[3, 1]])))
    np.testing.assert_array_equal(labels, [3, 1])
    one, label = take(arrays, 5)
    chex.assert_shape(one, (4, 4, 1))
    assert int(label) == 5
