"""Data: the order, the split, the way to the model and back; metrics and pictures."""

import numpy as np
import pytest

from jdiff import data, metrics
from jdiff.data import batch_indices
from jdiff.runs import plot


def test_every_epoch_is_a_permutation_whatever_the_chunks():
    n, batch = 103, 8
    stream = batch_indices(n, batch, 0, 0, 103).ravel()  # 8 epochs exactly
    epochs = stream.reshape(8, n)
    for epoch in epochs:
        np.testing.assert_array_equal(np.sort(epoch), np.arange(n))
    assert not (epochs[0] == epochs[1]).all()
    cut = np.concatenate([batch_indices(n, batch, 0, start, count) for start, count in ((0, 5), (5, 60), (65, 38))])
    np.testing.assert_array_equal(cut.ravel(), stream)
    assert not (batch_indices(n, batch, 1, 0, 5).ravel() == stream[:40]).all()


def test_fewer_rows_than_a_batch():
    with pytest.raises(ValueError, match="a batch of 11 from 10 rows"):
        batch_indices(10, 11, 0, 0, 1)


def test_digits_are_scikit_learns():
    from sklearn.datasets import load_digits

    digits = data.load("digits", held_out=0.2)
    assert len(digits.x) + len(digits.held_x) == 1797
    rows = np.concatenate([digits.x, digits.held_x]).reshape(1797, 64)
    real = np.rint(load_digits().data * 255 / 16).astype(np.uint8)
    np.testing.assert_array_equal(rows[np.lexsort(rows.T)], real[np.lexsort(real.T)])
    shares = np.bincount(digits.held_labels) / np.bincount(np.append(digits.labels, digits.held_labels))
    np.testing.assert_allclose(shares, 0.2, atol=0.01)
    np.testing.assert_array_equal(data.load("digits").x, digits.x)


def test_to_model_and_back():
    digits = data.load("digits")
    every = np.arange(256, dtype=np.uint8).reshape(4, 8, 8, 1)
    x = digits.to_model(every)
    assert float(x.min()) == -1 and float(x.max()) == 1
    np.testing.assert_array_equal(digits.to_data(x), every)
    np.testing.assert_array_equal(digits.to_data(np.array([-3.0, 3.0])), [0, 255])
    plane = data.load("scurve", n=100)
    np.testing.assert_array_equal(plane.to_data(plane.to_model(plane.x)), plane.x)
    mean, std = plane.moments()
    np.testing.assert_allclose(mean, plane.x.mean(0), rtol=1e-4)
    np.testing.assert_allclose(std, plane.x.std(0), rtol=1e-4)


def test_scurve_is_scikit_learns():
    from sklearn.datasets import make_s_curve

    points, _ = make_s_curve(50, noise=0.1, random_state=3)
    np.testing.assert_allclose(data.scurve_points(50, 3), np.stack([points[:, 0], points[:, 2]], 1) / 10, rtol=1e-6)


def test_unknown_data():
    with pytest.raises(ValueError, match=r"unknown data set 'digts' \(did you mean 'digits'\?\); one of digits"):
        data.load("digts")


# ---------------------------------------------------------------- metrics


def test_frechet_of_gaussians_in_closed_form():
    """Points with exact moments: |m|^2 + sum (sqrt a - sqrt b)^2 for commuting covariances; 0 for equal sets."""
    base = np.array([[1, 1], [1, -1], [-1, 1], [-1, -1]]) * np.sqrt(3 / 4)  # sample covariance = identity
    a, b = base * [1.0, 2.0], base * [3.0, 1.0] + [1.0, -2.0]
    np.testing.assert_allclose(metrics.frechet(a, b), 1 + 4 + (1 - 3) ** 2 + (2 - 1) ** 2, rtol=1e-10)
    np.testing.assert_allclose(metrics.frechet(a, a), 0, atol=1e-12)


def test_sliced_wasserstein_of_a_shift():
    """A shift by v moves every projection by v.d: the mean over directions of the plane is |v|^2 / 2."""
    a = np.random.default_rng(0).normal(size=(200, 2))
    np.testing.assert_allclose(metrics.sliced_wasserstein(a, a + [3.0, 4.0]), np.sqrt(25 / 2), rtol=1e-6)
    with pytest.raises(ValueError, match="one size"):
        metrics.sliced_wasserstein(a, a[:10])


def test_nearest_distance():
    a, b = np.array([[0.0, 0.0], [3.0, 4.0]]), np.array([[0.0, 1.0], [3.0, 4.0]])
    np.testing.assert_allclose(metrics.nearest_distance(a, b), [1, 0], atol=1e-7)


# ---------------------------------------------------------------- pictures


def test_image_grid_holds_the_pixels(tmp_path):
    from PIL import Image

    images = np.random.default_rng(0).integers(0, 256, (5, 8, 8, 3), dtype=np.uint8)
    plot.image_grid(tmp_path / "a" / "grid.png", images, columns=2, scale=3, gap=2)
    with Image.open(tmp_path / "a" / "grid.png") as picture:
        pixels = np.asarray(picture)
    for i, image in enumerate(images):
        y, x = 2 + i // 2 * 26, 2 + i % 2 * 26
        np.testing.assert_array_equal(pixels[y : y + 24, x : x + 24], image.repeat(3, 0).repeat(3, 1))


def test_pictures_that_cannot_be_written_leave_nothing(tmp_path):
    (tmp_path / "file").write_text("kept")
    with pytest.raises(OSError, match="cannot write"):
        plot.image_grid(tmp_path / "file" / "x.png", np.zeros((1, 2, 2, 1), np.uint8), 1)
    with pytest.raises(RuntimeError):
        plot.write(tmp_path / "file", lambda handle: (_ for _ in ()).throw(RuntimeError()))
    assert (tmp_path / "file").read_text() == "kept" and [p.name for p in tmp_path.iterdir()] == ["file"]
    with pytest.raises(ValueError, match="expected uint8"):
        plot.image_grid(tmp_path / "x.png", np.zeros((1, 2, 2, 1)), 1)
