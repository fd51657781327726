"""Folders of images."""

import warnings

import numpy as np
import pytest
from data_sources import first, save, smooth

from jdiff import data
from jdiff.data import DataError


@pytest.fixture
def pictures(tmp_path):
    """Two classes, three file types, sizes and modes of all sorts; a few files that are no pictures."""
    x = smooth(12, 8, 8)
    for i, image in enumerate(x):
        kind = ("png", "PNG", "webp")[i % 3]
        options = dict(lossless=True) if kind == "webp" else {}
        save(tmp_path / "pictures" / ("cats", "dogs/deep")[i % 2] / f"{i:02d}.{kind}", image, **options)
    (tmp_path / "pictures" / "notes.txt").write_text("no picture")
    (tmp_path / "pictures" / "cats" / "._00.png").write_text("no picture either")
    return tmp_path / "pictures", x


@pytest.mark.parametrize("cache", [0, 10**6], ids=["decoded", "cached"])
def test_folder(pictures, cache):
    path, x = pictures
    dataset = data.load("folder", path=str(path), size=8, cache=cache)
    order = np.array([*range(0, 12, 2), *range(1, 12, 2)])  # cats, then dogs
    assert (dataset.size, dataset.classes, dataset.name) == (12, 2, "pictures")
    chunk, index = first(dataset), data.batch_indices(12, 8, 0, 0, 3)
    np.testing.assert_array_equal(chunk.x, x[order][index])
    np.testing.assert_array_equal(chunk.labels, order[index] % 2)
    assert dataset.held_x.shape == (0, 8, 8, 3)


def test_folder_held_out(pictures):
    path, x = pictures
    dataset = data.folder(str(path), 8, held_out=0.25)
    assert (dataset.size, len(dataset.held_x), len(dataset.held_labels)) == (9, 3, 3)
    both = np.concatenate([dataset.x, dataset.held_x]).reshape(12, -1)
    np.testing.assert_array_equal(both[np.lexsort(both.T)], x.reshape(12, -1)[np.lexsort(x.reshape(12, -1).T)])


def test_folder_of_flat_and_of_mixed_images(tmp_path):
    for i, (height, width) in enumerate([(8, 8), (20, 9), (9, 31), (8, 64)]):
        save(tmp_path / f"{i}.jpg", smooth(1, height, width)[0])
    save(tmp_path / "4.jpeg", smooth(1, 16, 16, 1)[0])
    dataset = data.folder(str(tmp_path), 8)
    assert (dataset.classes, dataset.labels, dataset.x.shape) == (0, None, (5, 8, 8, 3))
    assert first(dataset, 4).labels is None
    with pytest.raises(ValueError, match="a batch of 8 from 5 rows"):
        first(dataset)
    save(tmp_path / "cats" / "5.png", smooth(1)[0])
    with pytest.raises(DataError, match="images beside its sub-folders, such as 0.jpg"):
        data.folder(str(tmp_path), 8)
    assert data.folder(str(tmp_path), 8, labels=False, channels=1).x.shape == (6, 8, 8, 1)


@pytest.mark.parametrize("damage", ["cut", "text", "empty"])
def test_corrupt_images_are_named_or_skipped(pictures, damage):
    path, x = pictures
    bad = path / "cats" / "04.PNG"
    whole = (path / "cats" / "06.png").read_bytes()
    bad.write_bytes({"cut": whole[: len(whole) // 2], "text": b"not an image", "empty": b""}[damage])
    for cache in (0, 10**6):
        with pytest.raises(DataError, match=r"cats/04\.PNG cannot be read \((damaged|no PNG).*corrupt='skip'"):
            first(data.folder(str(path), 8, cache=cache))
    with pytest.warns(UserWarning, match=r"1 of 12 images in .* cannot be read and are left out, the first .*04\.PNG"):
        dataset = data.folder(str(path), 8, corrupt="skip")
    order = [0, 2, 6, 8, 10, 1, 3, 5, 7, 9, 11]
    np.testing.assert_array_equal(dataset.x, x[order])
    np.testing.assert_array_equal(dataset.labels, np.array(order) % 2)
    bad.unlink()
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        data.folder(str(path), 8, corrupt="skip")


def test_folders_that_are_none(tmp_path):
    with pytest.raises(DataError, match="is no directory"):
        data.folder(str(tmp_path / "none"), 8)
    with pytest.raises(DataError, match=r"no images in .*; expected files ending in \.png, \.jpg, \.jpeg, \.webp"):
        data.folder(str(tmp_path), 8)
    (tmp_path / "a.png").write_text("nothing")
    with pytest.raises(DataError, match="none of the 1 images"):
        data.folder(str(tmp_path), 8, corrupt="skip")
    for wrong in (dict(size=0), dict(channels=2), dict(corrupt="ignore"), dict(threads=0)):
        with pytest.raises(DataError, match="channels 1 or 3, corrupt 'stop' or 'skip'"):
            data.folder(str(tmp_path), **(dict(size=8) | wrong))
