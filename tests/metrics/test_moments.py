"""Streamed moments against NumPy's of all points; files of statistics, as other code bases write and read them."""

import numpy as np
import pytest

from jdiff import metrics


def test_batches_are_as_all_points_at_once():
    """Of uneven batches, merged in two halves, far from 0 where a sum of squares would have no digits left."""
    x = np.random.default_rng(0).normal(size=(1000, 5)) @ np.diag([1, 2, 3, 4, 1e-3]) + 1e7
    first = metrics.Moments.init(5)
    for batch in (x[:1], x[1:1], x[1:400]):
        first = first.update(batch)
    found = first.merge(metrics.Moments.init(5).update(x[400:].astype(np.float64)))
    assert found.count == 1000
    np.testing.assert_allclose(found.mean, x.mean(0), rtol=1e-14)
    np.testing.assert_allclose(found.covariance, np.cov(x.T), rtol=1e-6, atol=1e-9)
    empty = metrics.Moments.init(5)
    assert empty.merge(empty).count == 0


def test_50_000_images_take_the_memory_of_a_batch():
    """50,000 of 64 features: what is kept is a mean and a scatter."""
    moments, random = metrics.Moments.init(64), np.random.default_rng(0)
    for _ in range(50):
        moments = moments.update(random.normal(size=(1000, 64)).astype(np.float32))
    assert moments.count == 50_000 and moments.mean.nbytes + moments.scatter.nbytes == 8 * (64 + 64**2)
    distance = metrics.frechet_distance(moments.mean, moments.covariance, np.zeros(64), np.eye(64))
    np.testing.assert_allclose(distance, metrics.frechet_bias(moments), rtol=0.2)


def test_statistics_are_read_back(tmp_path):
    """Bit for bit; of the network that was named; by NumPy as EDM and guided-diffusion do."""
    random = np.random.default_rng(0)
    mean, root = random.normal(size=3), random.normal(size=(3, 3))
    images = random.integers(0, 256, (2, 4, 4, 3), np.uint8)
    path = tmp_path / "deep" / "ref.npz"
    metrics.write_statistics(path, mean, root @ root.T, features="inception", images=images)
    for wanted in (None, "inception"):
        found = metrics.read_statistics(path, wanted)
        np.testing.assert_array_equal(found[0], mean)
        np.testing.assert_array_equal(found[1], root @ root.T)
    with np.load(path, allow_pickle=False) as theirs:
        np.testing.assert_array_equal(theirs["mu"], mean)
        np.testing.assert_array_equal(theirs["sigma"], root @ root.T)
        np.testing.assert_array_equal(theirs["arr_0"], images)
    with pytest.raises(ValueError, match="statistics of the features of 'inception', not of 'dino'; make them anew"):
        metrics.read_statistics(path, "dino")


def test_statistics_of_others(tmp_path):
    """EDM's two arrays, in either precision; guided-diffusion's six, of which two are of no use here."""
    path, mean, C = tmp_path / "ref.npz", np.arange(2.0), np.eye(2) * 3
    np.savez(path, mu=mean.astype(np.float32), sigma=C.astype(np.float32))
    found = metrics.read_statistics(path, "inception")
    np.testing.assert_array_equal(found[0], mean)
    assert found[1].dtype == np.float64
    np.savez(path, arr_0=np.zeros((1, 2, 2, 3), np.uint8), mu=mean, sigma=C, mu_s=mean, sigma_s=C)
    np.testing.assert_array_equal(metrics.read_statistics(path)[1], C)


def test_bad_files(tmp_path):
    path, C = tmp_path / "ref.npz", np.eye(2)

    class Trap:
        def __reduce__(self):
            return print, ("a file was executed",)

    for arrays, words in (
        (dict(arr_0=np.zeros(3)), "ref.npz holds arr_0; expected `mu` and `sigma`"),
        (dict(mu=np.array([Trap()], object), sigma=C), r"ref.npz: mu: .* which are not numbers"),
        (dict(mu=np.zeros(3), sigma=C), r"ref.npz: mean \(3,\) and covariance \(2, 2\); expected"),
        (dict(mu=np.full(2, np.nan), sigma=C), "numbers that are not finite"),
    ):
        np.savez(path, **arrays)
        with pytest.raises(ValueError, match=words):
            metrics.read_statistics(path)
    path.write_bytes(b"no archive")
    with pytest.raises(ValueError, match="ref.npz: not a .npz file"):
        metrics.read_statistics(path)
    with pytest.raises(FileNotFoundError):
        metrics.read_statistics(tmp_path / "none.npz")
    with pytest.raises(ValueError, match="write_statistics: mean"):
        metrics.write_statistics(path, np.zeros(3), C)
    assert path.read_bytes() == b"no archive"


def test_bad_features():
    moments = metrics.Moments.init(2)
    for call, words in (
        (lambda: moments.update(np.zeros((3, 4))), r"features have shape \(3, 4\); expected \(N, 2\)"),
        (lambda: moments.update(np.full((1, 2), np.nan)), "not finite"),
        (lambda: moments.merge(metrics.Moments.init(3)), "2 and 3 features cannot be merged"),
        (lambda: moments.update(np.zeros((1, 2))).covariance, "the covariance of 1 points is not defined"),
        (lambda: metrics.Moments.init(0), "d must be an integer, 1 or more, got 0"),
    ):
        with pytest.raises(ValueError, match=words):
            call()
