"""The classifier that judges samples."""

import chex
import numpy as np
import pytest

from jdiff import data, metrics
from jdiff.train.checkpoint import CheckpointError


@pytest.fixture(scope="module")
def judged():
    digits = data.digits()
    return digits, metrics.fit_judge(digits, steps=300, batch=64, width=16)


@pytest.mark.slow
def test_a_judge_knows_its_classes(judged, tmp_path):
    digits, judge = judged
    x = np.asarray(digits.to_model(digits.held_x))
    labels, features = judge.look(x, batch=100)  # the last batch is filled up and cut
    assert np.mean(labels == digits.held_labels) > 0.9
    np.testing.assert_array_equal(labels[:7], judge.look(x[:7])[0])
    chex.assert_shape(features, (len(x), 128))
    chex.assert_tree_all_finite(features)
    # features of held-out images are nearer to those of the training set than features of noise are
    train = judge.look(np.asarray(digits.to_model(digits.x)))[1]
    noise = judge.look(np.random.default_rng(0).normal(size=x.shape).astype(np.float32))[1]
    assert metrics.frechet(features, train) < 0.1 * metrics.frechet(noise, train)

    path = tmp_path / "judge.npz"
    metrics.save_judge(path, judge)
    again = metrics.load_judge(path, digits, width=16)
    chex.assert_trees_all_equal(again.variables, judge.variables)
    chex.assert_trees_all_equal(again.look(x)[1], features, strict=True)
    with pytest.raises(CheckpointError):
        metrics.load_judge(path, digits, width=32)


def test_a_judge_is_kept_in_an_npz(tmp_path):
    with pytest.raises(ValueError, match="a judge is kept in a file NAME.npz, got .*x.txt"):
        metrics.save_judge(tmp_path / "x.txt", metrics.judge.Judge(None, {"w": np.ones(2)}))
    assert not list(tmp_path.iterdir())


def test_a_judge_needs_classes():
    with pytest.raises(ValueError, match="scurve has no images with classes"):
        metrics.fit_judge(data.scurve(n=50))
