"""The data sets that scikit-learn ships or makes."""

import numpy as np

from jdiff import data


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


def test_scurve_is_scikit_learns():
    from sklearn.datasets import make_s_curve

    points, _ = make_s_curve(50, noise=0.1, random_state=3)
    np.testing.assert_allclose(data.scurve_points(50, 3), np.stack([points[:, 0], points[:, 2]], 1) / 10, rtol=1e-6)


def test_planes_are_scikit_learns():
    from sklearn.datasets import make_circles, make_moons, make_swiss_roll

    points = make_moons(50, noise=0.05, random_state=0)[0]
    np.testing.assert_allclose(data.moons(50).x, points - points.mean(0), atol=0.02)  # centred, up to the noise
    np.testing.assert_allclose(
        data.circles(50).x, make_circles(50, noise=0.05, factor=0.5, random_state=0)[0], rtol=1e-5
    )
    roll = make_swiss_roll(50, noise=0.5, random_state=0)[0]
    np.testing.assert_allclose(data.swiss_roll(50).x * 15, roll[:, [0, 2]], rtol=1e-5)
    for name in ("moons", "circles", "swiss_roll"):
        plane = data.load(name, n=500)
        assert plane.held_x.shape == plane.x.shape == (500, 2) and not plane.is_image
        assert not np.array_equal(plane.x, plane.held_x) and 0.2 < plane.x.std() < 1
