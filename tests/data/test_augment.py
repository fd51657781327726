"""Augmentation: the wavelet, analytic images under known maps, labels that tell all, rows of the global batch."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.core.keys import BatchKey
from jdiff.data import augment, augmentation, flip


def images(n=6, height=12, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, height, width, channels)).astype(np.float32)


def matrix_of(zoom=0.0, turn=0.0, pull=0.0, axis=0.0, move=(0.0, 0.0)):
    return augmentation.matrix(*map(jnp.float32, (zoom, turn, pull, axis)), jnp.array(move, jnp.float32))


def test_the_filter_is_the_symlet_of_six_vanishing_moments():
    h = augmentation.SYM6
    np.testing.assert_allclose(h.sum(), np.sqrt(2), rtol=1e-9)
    for lag in range(6):
        np.testing.assert_allclose(h[2 * lag :] @ h[: len(h) - 2 * lag], float(lag == 0), atol=1e-10)
    k = np.arange(12.0)
    for power in range(6):
        assert abs(((-1) ** k * (k / 11) ** power) @ h) < 1e-9
    assert np.argmax(h) == augmentation.PEAK


def test_the_identity_gives_the_image_back():
    x = images()
    same = jnp.tile(matrix_of()[None], (len(x), 1, 1))
    np.testing.assert_allclose(augmentation.transform(x, same), x, atol=3e-6)


@pytest.mark.parametrize("move", [(3, 0), (0, -2), (-8, 7)])
def test_whole_pixels_move_over_a_mirrored_border(move):
    x, (dx, dy) = images(2), move
    inverse = jnp.tile(matrix_of(move=move)[None], (2, 1, 1))
    big = np.pad(x, ((0, 0), (11, 11), (9, 9), (0, 0)), mode="reflect")
    expected = big[:, 11 - dy : 23 - dy, 9 - dx : 19 - dx]
    np.testing.assert_allclose(augmentation.transform(x, inverse), expected, atol=1e-5)


MAPS = {
    "scaled": dict(zoom=-0.4),
    "turned": dict(turn=0.7),
    "stretched": dict(pull=0.3),
    "stretched along an axis": dict(pull=0.3, axis=0.5),
    "moved": dict(move=(1.3, -2.6)),
    "all": dict(zoom=0.2, turn=-2.0, pull=-0.25, axis=1.1, move=(0.7, 1.9)),
}


@pytest.mark.parametrize("how", MAPS, ids=list(MAPS))
def test_a_smooth_image_is_read_where_the_map_says(how):
    """A bump of known shape, scaled, turned, stretched and moved: NumPy's own product of the forward maps."""
    height, width = 40, 33
    grid = np.stack(np.meshgrid(np.arange(width) - 16.0, np.arange(height) - 19.5), -1)

    def value(points):
        u = (points - [2.0, -3.0]) @ np.array([[1.0, 0.3], [0.0, 0.7]])
        return np.exp(-(u**2).sum(-1) / (2 * 3.5**2))

    a = dict(zoom=0.0, turn=0.0, pull=0.0, axis=0.0, move=(0.0, 0.0)) | MAPS[how]
    turn = lambda t: np.array([[np.cos(t), -np.sin(t)], [np.sin(t), np.cos(t)]])  # noqa: E731
    stretch = turn(-a["axis"]) @ np.diag([2.0 ** a["pull"], 2.0 ** -a["pull"]]) @ turn(a["axis"])
    forward = stretch @ turn(-a["turn"]) * 2.0 ** a["zoom"]  # then moved
    old = (grid - a["move"]) @ np.linalg.inv(forward).T
    x = value(grid)[None, :, :, None].astype(np.float32)
    out = augmentation.transform(x, matrix_of(**a)[None])[0, :, :, 0]
    inside = (np.abs(old) < [width / 2 - 3, height / 2 - 3]).all(-1)  # beyond are mirror images
    np.testing.assert_allclose(out[inside], value(old)[inside], atol=0.015)
    assert inside.mean() > 0.3 and np.abs(value(old) - value(grid))[inside].max() > 0.1


def test_nothing_drawn_is_nothing_done():
    x = images(64)
    out, labels = jax.jit(augment)(jax.random.key(0), x, 0.0)
    mirrored = np.asarray(labels[:, 0]) == 1
    assert 10 < mirrored.sum() < 54 and not np.asarray(labels[:, 1:]).any()
    np.testing.assert_array_equal(out, np.where(mirrored[:, None, None, None], x[:, :, ::-1], x))


@pytest.mark.slow
def test_labels_tell_what_was_done():
    """Rows of one label are the same map; rows of zeros are untouched; others are not."""
    x = np.tile(images(1), (200, 1, 1, 1))
    out, labels = map(np.asarray, jax.jit(augment)(jax.random.key(1), x, 0.12))
    nothing = ~labels.any(1)
    assert nothing.sum() > 20
    np.testing.assert_array_equal(out[nothing], x[nothing])
    for row in np.flatnonzero(~nothing)[:40]:
        assert np.abs(out[row] - x[row]).max() > 1e-3
    _, mirror, inverse = augmentation.draw(jax.random.key(1), x.shape, 0.12)
    np.testing.assert_array_equal(labels[:, :2], np.asarray(mirror, np.float32))
    still = ~labels[:, 2:].any(1)
    np.testing.assert_allclose(inverse[still], np.tile(np.eye(2, 3)[None], (still.sum(), 1, 1)), atol=1e-6)
    only_moved = labels[:, 7:].any(1) & ~labels[:, 2:7].any(1)
    assert only_moved.any()
    move = -labels[only_moved, 7:] * 0.125 * [10, 12]
    np.testing.assert_allclose(np.asarray(inverse)[only_moved, :, 2], move, atol=1e-5)


def test_labels_follow_their_laws():
    n, p = 40_000, 0.3
    labels = np.asarray(augmentation.draw(jax.random.key(2), (n, 2, 2, 1), p)[0], np.float64)
    shares = (np.abs(labels) > 1e-9).mean(0)
    np.testing.assert_allclose(shares[[0, 1, 2, 3, 4, 5, 7, 8]], [0.5, p / 2] + [p] * 6, atol=0.012)
    np.testing.assert_allclose(shares[6], p / 2, atol=0.012)  # half of the axes are turned
    square = (labels**2).mean(0)
    np.testing.assert_allclose(square[[2, 7, 8]], p, rtol=0.04)
    np.testing.assert_allclose(square[3], p * 1.5, rtol=0.04)  # E (cos - 1)^2
    np.testing.assert_allclose(square[[4, 6]], [p / 2, p / 4], rtol=0.06)
    apart = np.corrcoef(labels[:, [0, 1, 2, 4, 5, 7, 8]].T) - np.eye(7)
    assert np.abs(apart).max() < 0.025


def test_rows_of_the_global_batch():
    x, key = images(8), jax.random.key(3)
    whole, labels = jax.jit(augment)(key, x, 0.8)
    for start in (0, 4):
        half, of_half = jax.jit(augment)(BatchKey(key, jnp.int32(start), 8), x[start : start + 4], 0.8)
        np.testing.assert_allclose(half, whole[start : start + 4], atol=1e-5)
        np.testing.assert_allclose(of_half, labels[start : start + 4], atol=1e-6)
        np.testing.assert_array_equal(
            flip(BatchKey(key, jnp.int32(start), 8), x[start : start + 4]), flip(key, x)[start : start + 4]
        )


def test_flip():
    x, key = np.arange(400 * 2 * 3, dtype=np.uint8).reshape(400, 2, 3, 1), jax.random.key(0)
    np.testing.assert_array_equal(flip(key, x, 0.0), x)
    np.testing.assert_array_equal(flip(key, x, 1.0), x[:, :, ::-1])
    out = np.asarray(flip(key, x))
    assert out.dtype == np.uint8
    turned = (out != x).any((1, 2, 3))
    np.testing.assert_array_equal(out[turned], x[turned][:, :, ::-1])
    assert 160 < turned.sum() < 240


def test_what_is_no_image():
    with pytest.raises(ValueError, match=r"\(B, H, W, C\); got \(8, 8\)"):
        flip(jax.random.key(0), np.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"use to_model first.*got uint8\(2, 8, 8, 1\)"):
        augment(jax.random.key(0), np.zeros((2, 8, 8, 1), np.uint8))
