"""Arrays in a file."""

import numpy as np
import pytest
from data_sources import first, smooth

from jdiff import data
from jdiff.data import DataError


def test_arrays(tmp_path):
    x, labels = smooth(20), np.arange(20) % 4
    for key, of_key, kind in (("x", "labels", np.int64), ("images", "y", np.uint8), ("samples", "label", np.int32)):
        np.savez(tmp_path / "set.npz", **{key: x, of_key: labels.astype(kind)})
        dataset = data.load("arrays", path=str(tmp_path / "set.npz"))
        assert (dataset.classes, dataset.is_image, dataset.name) == (4, True, "set")
        np.testing.assert_array_equal(dataset.x, x)
        np.testing.assert_array_equal(dataset.labels, labels)
        assert dataset.labels.dtype == np.int32
    chunk = first(dataset)
    np.testing.assert_array_equal(chunk.x, x[data.batch_indices(20, 8, 0, 0, 3)])
    held = data.arrays(str(tmp_path / "set.npz"), held_out=0.2)
    assert (len(held.x), len(held.held_x)) == (16, 4)
    row = {image.tobytes(): label for image, label in zip(x, labels, strict=True)}
    for images, of_images in ((held.x, held.labels), (held.held_x, held.held_labels)):
        assert [row[image.tobytes()] for image in images] == list(of_images)
    assert data.arrays(str(tmp_path / "set.npz"), labels=False).classes == 0


def test_arrays_of_grey_images_and_of_planes(tmp_path):
    grey, points = smooth(9, channels=1)[..., 0], np.random.default_rng(0).normal(size=(9, 2))
    np.save(tmp_path / "grey.npy", grey)
    np.save(tmp_path / "points.npy", points)
    np.testing.assert_array_equal(data.arrays(str(tmp_path / "grey.npy")).x, grey[..., None])
    plane = data.arrays(str(tmp_path / "points.npy"))
    assert not plane.is_image and plane.x.dtype == np.float32 and plane.labels is None
    np.testing.assert_array_equal(plane.x, points.astype(np.float32))
    assert type(first(plane).x) is np.ndarray and first(data.arrays(str(tmp_path / "grey.npy"))).x.shape[2:] == (
        8,
        8,
        1,
    )


WRONG = {
    "float images": (dict(x=np.zeros((4, 8, 8, 3))), r"holds float64 \(4, 8, 8, 3\); expected images, uint8"),
    "channels first": (dict(x=np.zeros((4, 3, 8, 8), np.uint8)), "of 8 channels; expected .* channels last"),
    "one dimension": (dict(x=np.zeros(4)), r"holds float64 \(4,\)"),
    "nothing": (dict(x=np.zeros((0, 8, 8, 1), np.uint8)), r"holds uint8 \(0, 8, 8, 1\)"),
    "objects": (dict(x=np.array([{}, {}])), "no .npy or .npz file of plain numbers"),
    "not finite": (dict(x=np.array([[1.0, np.nan]])), "not finite"),
    "no samples": (dict(data=np.zeros((4, 2))), "holds data; expected samples under one of x, images"),
    "fewer labels": (
        dict(x=np.zeros((4, 2)), y=np.zeros(3, int)),
        r"int64 \(3,\); expected whole numbers from 0, \(4,\)",
    ),
    "one-hot labels": (dict(x=np.zeros((4, 2)), y=np.eye(4)), r"float64 \(4, 4\); expected whole numbers"),
    "negative labels": (dict(x=np.zeros((2, 2)), y=np.array([-1, 0])), "expected whole numbers from 0"),
}


@pytest.mark.parametrize("name", WRONG)
def test_arrays_that_are_wrong(tmp_path, name):
    content, message = WRONG[name]
    np.savez(tmp_path / "wrong.npz", **content)
    with pytest.raises(DataError, match=message) as error:
        data.arrays(str(tmp_path / "wrong.npz"))
    assert "\n" not in str(error.value)


def test_files_that_are_no_arrays(tmp_path):
    with pytest.raises(DataError, match="there is no file"):
        data.arrays(str(tmp_path / "none.npz"))
    np.savez(tmp_path / "a.npz", x=smooth(50))
    whole = (tmp_path / "a.npz").read_bytes()
    for i, content in enumerate((b"text", b"", whole[:2000], whole[:200] + b"?" * 100 + whole[300:])):
        (tmp_path / f"{i}.npz").write_bytes(content)
        with pytest.raises(DataError, match="plain numbers|damaged"):
            data.arrays(str(tmp_path / f"{i}.npz"))
