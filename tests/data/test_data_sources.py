"""Sources: sets of TFDS made here, folders, files of arrays, planes; and what is said of those that are wrong."""

import warnings

import numpy as np
import pytest
from PIL import Image

from jdiff import data
from jdiff.data import DataError
from jdiff.data.images import from_bytes, to_array


def smooth(n, height=8, width=8, channels=3, seed=0):
    return np.random.default_rng(seed).integers(0, 256, (n, height, width, channels), np.uint8)


def save(path, image, **how):
    path.parent.mkdir(parents=True, exist_ok=True)
    image = image if isinstance(image, Image.Image) else Image.fromarray(image.squeeze())
    image.save(path, **how)
    return path


def first(dataset, batch=8, count=3):
    return next(dataset.read(0, batch, [(0, count)]))


# ---------------------------------------------------------------- TensorFlow Datasets


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


def test_images_that_cannot_be_written(tmp_path):
    with pytest.raises(Exception, match=r"expected uint8 \(8, 8, 3\)"):
        data.write_tfds("bad", tmp_path, (8, 8, 3), 0, train=smooth(2, 7))
    with pytest.raises(Exception, match="label 3 is none of the classes 0 to 2"):
        data.write_tfds("bad", tmp_path, (8, 8, 3), 3, train=[(smooth(1)[0], 3)])


# ---------------------------------------------------------------- images


def test_modes():
    grey = np.arange(0, 256, 4, dtype=np.uint8).reshape(8, 8)
    colour, alpha = smooth(1)[0], np.tile(np.array([0, 255], np.uint8), (8, 4))
    of_grey, whitened = np.repeat(grey[..., None], 3, -1), np.where(alpha[..., None] > 0, colour, 255)
    deep = Image.fromarray(grey.astype(np.uint16) * 257)
    palette = Image.fromarray(colour).quantize(256)
    images = {
        "L": (Image.fromarray(grey), of_grey),
        "1": (Image.fromarray(grey > 99), np.repeat((grey > 99)[..., None] * np.uint8(255), 3, -1)),
        "RGB": (Image.fromarray(colour), colour),
        "P": (palette, np.asarray(palette.convert("RGB"))),
        "RGBA": (Image.fromarray(np.dstack([colour, alpha])), whitened),
        "LA": (Image.fromarray(np.dstack([grey, alpha])), np.where(alpha > 0, grey, 255)[..., None].repeat(3, -1)),
        "I;16": (deep, of_grey),
    }
    for mode, (image, expected) in images.items():
        assert image.mode == mode
        np.testing.assert_array_equal(to_array(image), expected, err_msg=mode)
    np.testing.assert_array_equal(to_array(deep, channels=1), grey[..., None])


def test_pictures_are_set_upright(tmp_path):
    image = smooth(1, 8, 6)[0]
    exif = Image.Exif()
    exif[0x0112] = 6  # shown after a quarter turn clockwise
    path = save(tmp_path / "turned.png", image, exif=exif)
    np.testing.assert_array_equal(from_bytes(path.read_bytes()), np.rot90(image, -1))


def test_the_central_square_is_resized_without_aliasing():
    stripes = np.zeros((64, 96, 3), np.uint8)
    stripes[:, ::2] = 200  # finer than what is left can show: an even grey
    out = to_array(Image.fromarray(stripes), 16)
    assert out.shape == (16, 16, 3) and np.abs(out[:, 1:-1].astype(int) - 100).max() <= 2
    image = smooth(1, 10, 16)[0]
    np.testing.assert_array_equal(to_array(Image.fromarray(image), 10), image[:, 3:13])
    np.testing.assert_array_equal(to_array(Image.fromarray(image), 4, crop=4), image[3:7, 6:10])


# ---------------------------------------------------------------- folders


@pytest.fixture
def pictures(tmp_path):
    """Two classes, three file types, sizes and modes of all sorts; a few files that are no pictures."""
    x = smooth(12, 8, 8)
    for i, image in enumerate(x):
        kind = ("png", "PNG", "webp")[i % 3]
        how = dict(lossless=True) if kind == "webp" else {}
        save(tmp_path / "pictures" / ("cats", "dogs/deep")[i % 2] / f"{i:02d}.{kind}", image, **how)
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


# ---------------------------------------------------------------- arrays


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


# ---------------------------------------------------------------- planes, and names


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


def test_a_data_set_of_ones_own():
    @data.register_dataset
    def my_set(n: int = 5):
        return data.scurve(n)

    try:
        assert data.load("my_set", n=7).size == 7
        my_set.__module__ = "elsewhere"

        def digits():
            return None

        with pytest.raises(ValueError, match="'digits' is registered already, by jdiff.data.embedded"):
            data.register_dataset(digits)
    finally:
        del data.DATASETS["my_set"]
