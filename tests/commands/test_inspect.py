"""What jdiff inspect says of data."""

import importlib

import numpy as np
import pytest
from PIL import Image

from jdiff import config as configs
from jdiff.config import ConfigError
from jdiff.data import Records, Stream

inspect_data = importlib.import_module("jdiff.commands.inspect_data")
PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)


@pytest.fixture
def images(tmp_path):
    """Images of three sizes in two classes, of which 20 and 2; one of them twice."""
    for i in range(22):
        path = tmp_path / "pets" / ("cats" if i < 20 else "dogs") / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        size = {0: (8, 8), 1: (100, 50)}.get(i, (64, 40))
        Image.fromarray(PIXELS[3 if i == 4 else i]).resize(size, Image.Resampling.NEAREST).save(path)
    return tmp_path / "pets"


def said(capsys, *words):
    assert inspect_data.main([str(word) for word in words]) == 0
    return capsys.readouterr().out.splitlines()


def test_a_folder_of_images(images, tmp_path, capsys):
    words = ["--data.args.held_out", 0, "--data.args.size", 32, "--train.steps", 100]
    lines = said(capsys, images, "--out", tmp_path / "a.png", *words)
    assert lines[:5] == [
        "data        pets: images of shape 32x32x3",
        "samples     22 to train on, 0 held out of 22",
        "classes     2 (cats: 20, dogs: 2), to train on",
        "files       22 images, from 8x8 to 50x100 (height x width), the median 40x64",
        "numbers     0 to 255 as stored",
    ]
    assert lines[6:] == [
        "duplicates  1 are the same as another one",
        "training    100 steps of 32: each sample is seen 145 times",
        f"picture     {tmp_path / 'a.png'}",
        "note: 22 samples are too few for train.batch 32: use --train.batch 22 or less",
        "note: jdiff evaluate compares samples with held-out ones: --data.args.held_out 0.1 holds a tenth out",
        "note: class dogs has 2 samples, and cats has 20",
        "note: 1 of the images are smaller than 32x32, and are enlarged",
    ]
    with Image.open(tmp_path / "a.png") as image:
        assert min(image.size) > 2 * 64  # more than one row of tiles


def test_numbers_are_those_of_the_data(capsys, tmp_path):
    """Of digits: the mean and deviation over all pixels, from scikit-learn's own table."""
    from sklearn.datasets import load_digits

    lines = said(capsys, "digits", "--out", tmp_path / "a.png")
    train = configs.build_data(configs.load_config("digits"))
    x = np.rint(load_digits().images * (255 / 16)) / 127.5 - 1
    line = next(line for line in lines if line.startswith("as trained"))
    mean, std = (float(line.split(word)[1].split(",")[0]) for word in ("mean ", "(sigma_data) "))
    assert abs(mean - x.mean()) < 0.02 and abs(std - x.std()) < 0.02  # of four fifths of them
    shown = np.asarray(train.to_model(train.x), np.float64)
    assert f"mean {shown.mean():.4g}, std (sigma_data) {shown.std():.4g}" in line
    assert "samples     1,437 to train on, 360 held out of 1,797" in lines


def test_points_have_a_figure(capsys, tmp_path):
    lines = said(capsys, "scurve", "--data.args.n", 200, "--out", tmp_path / "a.png")
    assert "data        scurve: points of shape 2" in lines and "classes     none" in lines
    assert Image.open(tmp_path / "a.png").size[0] > 100


def test_sets_that_are_read_as_they_are_needed_are_looked_at_in_part(monkeypatch):
    """Of records evenly spaced ones, of a stream the first ones."""
    import grain

    monkeypatch.setattr(inspect_data, "LOOKED_AT", 6)
    labels = np.arange(24, dtype=np.int32) % 3
    records = Records(
        "r", 24, (8, 8, 3), lambda rows: (PIXELS[rows], labels[rows]), lambda: (PIXELS[:2], labels[:2]), 3
    )
    seen = inspect_data.look(records)
    np.testing.assert_array_equal(seen.x, PIXELS[np.linspace(0, 23, 6).astype(int)])
    lines = dict(inspect_data.facts(records, seen))
    assert not seen.all and lines["classes"].endswith(", of 6 samples")
    assert lines["duplicates"] == "1 held-out ones are among those to train on, of 6 samples"

    def make(seed):
        return grain.MapDataset.source(range(24)).map(lambda i: (PIXELS[i], labels[i])).repeat().to_iter_dataset()

    seen = inspect_data.look(Stream("s", make, (8, 8, 3), 24, 3))
    np.testing.assert_array_equal(seen.x, PIXELS[:6])
    np.testing.assert_array_equal(seen.labels, labels[:6])


def test_what_it_refuses(tmp_path, capsys):
    for words, text in (
        (["digits", "--out", "a.gif"], "expected a name that ends in .png"),
        ([tmp_path], "no images in"),
        (["no_such_config"], "no_such_config"),
        (["folder", "--data.args.path", tmp_path / "none"], "is no directory"),
    ):
        with pytest.raises(ConfigError) as caught:
            inspect_data.main([str(word) for word in words])
        assert text in str(caught.value) and "\n" not in str(caught.value)
