"""Sets of TensorFlow Datasets, made here in their own format, and what is said of those that are wrong."""

import numpy as np
import pytest
from data_sources import first, smooth
from PIL import Image

from jdiff import data
from jdiff.data import DataError


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    """A set in TFDS's own format: 20 images and 7 held out, three classes."""
    directory = tmp_path_factory.mktemp("tfds")
    x, held = smooth(20), smooth(7, seed=1)
    labels = np.arange(20) % 3
    data.write_tfds("small", directory, (8, 8, 3), 3, train=zip(x, labels, strict=True), test=((h, 2) for h in held))
    return directory, x, labels, held


def test_what_is_written_is_read_by_tfds_itself(small):
    import tensorflow_datasets

    directory, x, labels, _ = small
    source = tensorflow_datasets.data_source("small", split="train", data_dir=directory, download=False)
    np.testing.assert_array_equal([example["image"] for example in source], x)
    np.testing.assert_array_equal([example["label"] for example in source], labels)


@pytest.mark.parametrize("cache", [0, 10**6], ids=["decoded", "cached"])
def test_tfds(small, cache):
    directory, x, labels, held = small
    dataset = data.load("tfds", name="small", data_dir=str(directory), cache=cache)
    assert (dataset.size, dataset.shape, dataset.classes, dataset.in_memory) == (20, (8, 8, 3), 3, cache > 0)
    chunk, index = first(dataset), data.batch_indices(20, 8, 0, 0, 3)
    np.testing.assert_array_equal(chunk.x, x[index])
    np.testing.assert_array_equal(chunk.labels, labels[index])
    np.testing.assert_array_equal(dataset.held_x, held)
    np.testing.assert_array_equal(dataset.held_labels, np.full(7, 2))
    if cache:
        np.testing.assert_array_equal(dataset.x, x)
        np.testing.assert_array_equal(dataset.labels, labels)


def test_tfds_is_read_without_tensorflow(small):
    import subprocess
    import sys

    code = (
        f"import sys; from jdiff import data; d = data.tfds('small', data_dir={str(small[0])!r}, cache=0);"
        "print(next(d.read(0, 4, [(0, 1)])).x.shape, d.held_x.shape, 'tensorflow' in sys.modules)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert out.stdout.strip() == "(1, 4, 8, 8, 3) (7, 8, 8, 3) False", out.stderr


def test_tfds_slices_sizes_and_labels(small):
    directory, x, _, _ = small
    part = data.tfds("small", split="train[:10]", held_split="train[10:]", data_dir=directory, label=None, pad=2)
    assert (part.size, part.shape, part.classes, part.labels) == (10, (12, 12, 3), 0, None)
    np.testing.assert_array_equal(part.x, np.pad(x[:10], ((0, 0), (2, 2), (2, 2), (0, 0))))
    np.testing.assert_array_equal(part.held_x[:, 2:-2, 2:-2], x[10:])
    crop = data.tfds("small", held_split=None, data_dir=directory, size=4, crop=4, channels=1)
    grey = [np.asarray(Image.fromarray(image).convert("L"))[2:6, 2:6, None] for image in x]
    np.testing.assert_array_equal(crop.x, grey)
    assert crop.held_x.shape == (0, 4, 4, 1) and crop.held_labels.shape == (0,)


def test_tfds_that_is_not_there_names_the_command(tmp_path):
    with pytest.raises(DataError) as error:
        data.mnist(data_dir=str(tmp_path))
    text = str(error.value)
    assert "\n" not in text and f"mnist is not prepared in {tmp_path}/mnist" in text
    command = f"tfds.builder('mnist', data_dir={str(tmp_path)!r}, file_format='array_record').download_and_prepare()"
    assert command in text
    with pytest.raises(DataError, match="'no_such_set' is neither known to TFDS nor prepared in"):
        data.tfds("no_such_set", data_dir=tmp_path)


def test_tfds_with_wrong_arguments(small):
    directory = small[0]
    with pytest.raises(DataError, match=r"Unknown split 'trian'\. Should be one of \["):
        data.tfds("small", split="trian", data_dir=directory)
    with pytest.raises(DataError, match="no image 'picture'; image= is one of image"):
        data.tfds("small", data_dir=directory, image="picture")
    with pytest.raises(DataError, match="no class label 'kind'; label= is one of label, None"):
        data.tfds("small", data_dir=directory, label="kind")
    with pytest.raises(DataError, match="crop needs size"):
        data.tfds("small", data_dir=directory, crop=4)
    with pytest.raises(DataError, match="size is 28, or 32"):
        data.mnist(data_dir=directory, size=30)
    with pytest.raises(ValueError, match="a batch of 21 from 20 rows"):
        first(data.tfds("small", data_dir=directory, cache=0), 21)
