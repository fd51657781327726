"""Folders of images."""

import os
import shutil
import warnings

import numpy as np
import pytest
from data_sources import first, save, smooth

from jdiff import data
from jdiff.data import DataError, DataWarning, from_folder
from jdiff.data.images import check_whole


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
    assert dataset.class_names == ("cats", "dogs")
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


# ---------------------------------------------------------------- what is found out before anything is decoded


@pytest.mark.parametrize("kind,options", [("png", {}), ("jpg", {}), ("webp", {}), ("webp", dict(lossless=True))])
def test_an_image_that_was_cut_is_found_at_any_length(kind, options, tmp_path):
    """The whole file is good, and a part of it is not."""
    path = save(tmp_path / f"a.{kind}", smooth(1, 40, 30)[0], **options)
    whole = path.read_bytes()
    assert check_whole(path) == (40, 30)
    for length in (len(whole) * 3 // 4, len(whole) // 2, 30, 1, 0):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged|no PNG"):
            check_whole(path)


def test_good_images_are_not_decoded_when_a_set_is_opened(pictures, monkeypatch):
    path, _ = pictures
    decoded, decode = [], from_folder.from_bytes
    monkeypatch.setattr(from_folder, "from_bytes", lambda *a: decoded.append(a) or decode(*a))
    dataset = data.folder(str(path), 8)
    assert not decoded
    np.testing.assert_array_equal(dataset.original, np.full((12, 2), 8))
    assert len(dataset.x) == len(decoded) == 12


def test_several_corrupt_images_are_counted(pictures):
    path, _ = pictures
    for name in ("00.png", "04.PNG"):
        (path / "cats" / name).write_text("no image")
    with pytest.raises(DataError, match=r"cats/00\.png cannot be read \(no PNG.*\), nor can 1 more in .*; remove"):
        data.folder(str(path), 8)
    for file in path.rglob("*.*"):
        file.write_text("no image")
    with pytest.raises(DataError, match="none of the 12 images in .* can be read"):
        data.folder(str(path), 8)


def test_hidden_folders_are_no_classes(pictures):
    path, _ = pictures
    for name in (".git", "__MACOSX", "dogs/.thumbnails"):
        shutil.copytree(path / "cats", path / name)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        dataset = data.folder(str(path), 8)
    assert (dataset.size, dataset.class_names) == (12, ("cats", "dogs"))


def test_an_empty_sub_folder_is_no_class_and_is_named(pictures):
    path, _ = pictures
    (path / "birds").mkdir()
    with pytest.warns(DataWarning, match="a sub-folder of .* without images, no class: birds"):
        assert data.folder(str(path), 8).class_names == ("cats", "dogs")


def test_a_link_that_leads_up_is_followed_once(pictures):
    path, _ = pictures
    (path / "dogs" / "again").symlink_to(path)
    with pytest.warns(DataWarning, match="a link in .* to folders read before"):
        assert data.folder(str(path), 8).size == 12


def test_folders_that_cannot_be_looked_into(pictures, monkeypatch):
    path, _ = pictures
    scan = os.scandir

    def closed(where):
        if os.fspath(where).endswith("dogs"):
            raise PermissionError(13, "Permission denied", os.fspath(where))
        return scan(where)

    monkeypatch.setattr(os, "scandir", closed)
    with pytest.raises(DataError, match=r"cannot look into .*dogs \(Permission denied\); open it, or give corrupt="):
        data.folder(str(path), 8)
    (path / "dogs").rename(path / "cats" / "dogs")
    with pytest.warns(DataWarning, match="a folder in .* cannot be looked into and left out, the first .*dogs"):
        assert data.folder(str(path), 8, corrupt="skip").size == 6


def test_one_image(tmp_path):
    save(tmp_path / "a.PNG", smooth(1)[0])
    assert data.folder(str(tmp_path), 8).x.shape == (1, 8, 8, 3)
    with pytest.raises(DataError, match="held_out=0.9 leaves none of the 1 images in .* to train on"):
        data.folder(str(tmp_path), 8, held_out=0.9)
