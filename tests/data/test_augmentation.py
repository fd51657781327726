"""Augmentation: the wavelet, analytic images under known maps, labels that tell all, rows of the global batch."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.core.keys import BatchKey
from jdiff.data import augment, augmentation, flip

NO_MAP = dict(log_scale=0.0, rotation=0.0, log_stretch=0.0, axis=0.0, offset=(0.0, 0.0))


def images(n=64, height=12, width=10, channels=3, seed=0):
    return np.random.default_rng(seed).uniform(-1, 1, (n, height, width, channels)).astype(np.float32)


@jax.jit
def transformed(x, maps):
    """Each image under its map, an argument of `augmentation.matrix`."""
    return augmentation.transform(x, jax.vmap(lambda m: augmentation.matrix(**m))(maps))


def stacked(maps):
    """Several maps as arrays with a leading axis."""
    maps = list(maps)
    return {name: np.float32([m.get(name, NO_MAP[name]) for m in maps]) for name in NO_MAP}


def rows_of_batch(seed, start=0):
    """The key of rows from `start` on of a batch of 96."""
    return BatchKey(jax.random.key(seed), jnp.int32(start), 96)


@jax.jit
def augmented(key, x, p):
    """(images, labels, mirrors, matrices, flipped images): all that is drawn, in one program for all p."""
    return *augment(key, x, p), *augmentation.draw(key, x.shape, p)[1:], flip(key, x)


def test_the_filter_is_the_symlet_of_six_vanishing_moments():
    h = augmentation.SYM6
    np.testing.assert_allclose(h.sum(), np.sqrt(2), rtol=1e-9)
    for lag in range(6):
        np.testing.assert_allclose(h[2 * lag :] @ h[: len(h) - 2 * lag], float(lag == 0), atol=1e-10)
    k = np.arange(12.0)
    for power in range(6):
        assert abs(((-1) ** k * (k / 11) ** power) @ h) < 1e-9
    assert np.argmax(h) == augmentation.PEAK


def test_whole_pixels_move_over_a_mirrored_border():
    """By no pixels too: the identity gives the image back."""
    moves = [(0, 0), (3, 0), (0, -2), (-8, 7)]
    x = images(len(moves))
    out = transformed(x, stacked(dict(offset=tuple(map(float, move))) for move in moves))
    padded = np.pad(x, ((0, 0), (11, 11), (9, 9), (0, 0)), mode="reflect")
    expected = [padded[i, 11 - dy : 23 - dy, 9 - dx : 19 - dx] for i, (dx, dy) in enumerate(moves)]
    np.testing.assert_allclose(out[0], x[0], atol=3e-6)
    np.testing.assert_allclose(out, expected, atol=1e-5)


MAPS = {
    "scaled": dict(log_scale=-0.4),
    "turned": dict(rotation=0.7),
    "stretched": dict(log_stretch=0.3),
    "stretched along an axis": dict(log_stretch=0.3, axis=0.5),
    "moved": dict(offset=(1.3, -2.6)),
    "all": dict(log_scale=0.2, rotation=-2.0, log_stretch=-0.25, axis=1.1, offset=(0.7, 1.9)),
}


def test_a_smooth_image_is_read_where_the_map_says():
    """A bump of known shape, scaled, turned, stretched and moved: NumPy's own product of the forward maps."""
    height, width = 40, 33
    grid = np.stack(np.meshgrid(np.arange(width) - 16.0, np.arange(height) - 19.5), -1)

    def value(points):
        u = (points - [2.0, -3.0]) @ np.array([[1.0, 0.3], [0.0, 0.7]])
        return np.exp(-(u**2).sum(-1) / (2 * 3.5**2))

    def turn(angle):
        return np.array([[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]])

    x = np.tile(np.float32(value(grid))[None, :, :, None], (len(MAPS), 1, 1, 1))
    results = transformed(x, stacked(MAPS.values()))[..., 0]
    for (name, changes), out in zip(MAPS.items(), results, strict=True):
        m = NO_MAP | changes
        stretch = turn(-m["axis"]) @ np.diag([2.0 ** m["log_stretch"], 2.0 ** -m["log_stretch"]]) @ turn(m["axis"])
        forward = stretch @ turn(-m["rotation"]) * 2.0 ** m["log_scale"]  # then moved
        old = (grid - m["offset"]) @ np.linalg.inv(forward).T
        inside = (np.abs(old) < [width / 2 - 3, height / 2 - 3]).all(-1)  # beyond are mirror images
        np.testing.assert_allclose(out[inside], value(old)[inside], atol=0.015, err_msg=name)
        assert inside.mean() > 0.3 and np.abs(value(old) - value(grid))[inside].max() > 0.1, name


def test_nothing_drawn_is_nothing_done():
    x = images()
    out, labels, _, _, _ = augmented(rows_of_batch(0), x, 0.0)
    mirrored = np.asarray(labels[:, 0]) == 1
    assert 10 < mirrored.sum() < 54 and not np.asarray(labels[:, 1:]).any()
    np.testing.assert_array_equal(out, np.where(mirrored[:, None, None, None], x[:, :, ::-1], x))


def test_labels_tell_what_was_done():
    """Rows of zeros are untouched, others are not; what only moved has a matrix of only that."""
    x = np.tile(images(1), (64, 1, 1, 1))
    out, labels, mirror, inverse, _ = map(np.asarray, augmented(rows_of_batch(1), x, 0.12))
    nothing = ~labels.any(1)
    assert nothing.sum() > 8
    np.testing.assert_array_equal(out[nothing], x[nothing])
    assert (np.abs(out - x)[~nothing].max((1, 2, 3)) > 1e-3).all()
    np.testing.assert_array_equal(labels[:, :2], mirror.astype(np.float32))
    still = ~labels[:, 2:].any(1)
    np.testing.assert_allclose(inverse[still], np.tile(np.eye(2, 3)[None], (still.sum(), 1, 1)), atol=1e-6)
    only_moved = labels[:, 7:].any(1) & ~labels[:, 2:7].any(1)
    assert only_moved.any()
    move = -labels[only_moved, 7:] * 0.125 * [10, 12]
    np.testing.assert_allclose(inverse[only_moved, :, 2], move, atol=1e-5)


def test_labels_follow_their_laws():
    n, p = 40_000, 0.3
    draw = jax.jit(lambda key: augmentation.draw(key, (n, 2, 2, 1), p)[0])
    labels = np.asarray(draw(jax.random.key(2)), np.float64)
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
    """Two parts of a batch of 96 rows agree where they overlap."""
    x = images(96)
    first = augmented(rows_of_batch(3), x[:64], 0.8)
    last = augmented(rows_of_batch(3, start=32), x[32:], 0.8)
    first, last = jax.tree.map(lambda a: a[32:], first), jax.tree.map(lambda a: a[:32], last)
    chex.assert_trees_all_close(first, last, atol=1e-5, strict=True)
    chex.assert_trees_all_equal(first[-1], last[-1], strict=True)


def test_flip():
    x, key = np.arange(400 * 2 * 3, dtype=np.uint8).reshape(400, 2, 3, 1), jax.random.key(0)
    flipped = jax.jit(flip)
    chex.assert_trees_all_equal(flipped(key, x, 0.0), x, strict=True)
    chex.assert_trees_all_equal(flipped(key, x, 1.0), x[:, :, ::-1], strict=True)
    out = np.asarray(flipped(key, x, 0.5))
    turned = (out != x).any((1, 2, 3))
    np.testing.assert_array_equal(out[turned], x[turned][:, :, ::-1])
    assert 160 < turned.sum() < 240


def test_what_is_no_image():
    with pytest.raises(ValueError, match=r"\(B, H, W, C\); got \(8, 8\)"):
        flip(jax.random.key(0), np.zeros((8, 8)))
    with pytest.raises(ValueError, match=r"use to_model first.*got uint8\(2, 8, 8, 1\)"):
        augment(jax.random.key(0), np.zeros((2, 8, 8, 1), np.uint8))
