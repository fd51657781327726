"""A run on a folder of images stands alone: what it needs of its data when they have moved, changed, or gone."""

import dataclasses
import importlib
import json
import shutil
import warnings

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image

from jdiff import config as configs
from jdiff import runs
from jdiff.config import Config, ConfigError, Named, Sample, Train
from jdiff.data import DataWarning
from jdiff.train import checkpoint

PIXELS = np.random.default_rng(0).integers(0, 256, (24, 8, 8, 3), np.uint8)


def draw_images(folder, flat=False, pixels=PIXELS):
    """24 images, in two folders or in one."""
    for i, image in enumerate(pixels):
        path = folder / ("" if flat else ("cats", "dogs")[i % 2]) / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(image).save(path)
    return folder


def make_run(directory, images, **args):
    """A run on these images with a checkpoint of fresh parameters, prepared as training does."""
    config = Config(
        name="own", data=Named("folder", {"path": str(images), "size": 8, "held_out": 0.25} | args),
        model=Named("vit_small", {"width": 16, "depth": 1, "heads": 2}), schedule=Named("vp"),
        train=Train(steps=5, batch=8), sample=Sample(solver=Named("ddim"), steps=2, num=4),
    )  # fmt: skip
    run = runs.build(directory, config)
    runs.prepare_directory(run)
    state = runs.new_state(run)
    state = dataclasses.replace(state, step=jnp.asarray(5, state.step.dtype))
    with checkpoint.Writer(run.checkpoints, 1) as writer:
        writer.save(state, dict(config=configs.to_dict(config), data=None, samples=runs.about_data(run)))
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A folder with the images and the run on them; copy it before you change it."""
    where = tmp_path_factory.mktemp("own")
    make_run(where / "run", draw_images(where / "images"))
    return where


@pytest.fixture
def place(trained, tmp_path):
    """The same, to be changed: the config names this place."""
    shutil.copytree(trained, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "run" / "config.json"
    path.write_text(path.read_text().replace(str(trained), str(tmp_path)))
    return tmp_path


def command(name, *words):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", DataWarning)
        assert importlib.import_module(f"jdiff.commands.{name}").main([str(word) for word in words]) == 0
    return [str(w.message) for w in caught if issubclass(w.category, DataWarning)]


def one_line(caught, *texts):
    line = str(caught.value)
    assert "\n" not in line and all(text in line for text in texts), line


# ---------------------------------------------------------------- sampling


def test_sampling_opens_no_data(place, monkeypatch):
    """A class that has gone and a folder that has gone do not matter."""
    monkeypatch.setattr(configs, "build_data", lambda config: pytest.fail("the data were opened"))
    shutil.rmtree(place / "images" / "cats")
    out = place / "a.npz"
    assert command("sample", place / "run", "--num", 4, "--out", out, "--labels", "dogs", "0") == []
    with np.load(out, allow_pickle=False) as file:
        assert file["samples"].shape == (4, 8, 8, 3) and file["samples"].dtype == np.uint8
        assert file["labels"].tolist() == [1, 0, 1, 0] and file["class_names"].tolist() == ["cats", "dogs"]
    shutil.rmtree(place / "images")
    again = place / "b.npz"
    assert command("sample", place / "run", "--num", 4, "--out", again, "--labels", "dogs", "cats") == []
    with np.load(out) as a, np.load(again) as b:
        np.testing.assert_array_equal(a["samples"], b["samples"])


def test_a_class_of_another_name(trained, capsys):
    with pytest.raises(ConfigError) as caught:
        command("sample", trained / "run", "--labels", "dog")
    one_line(caught, "label 'dog' is none of the classes 0 to 1 (did you mean 'dogs'?)", "their names are cats, dogs")


def test_moments_are_kept(trained):
    run = runs.open_run(trained / "run")
    mean, std = runs.build("no", run.config).dataset.moments()
    np.testing.assert_array_equal(run.moments()[0], mean)
    np.testing.assert_array_equal(run.moments()[1], std)
    assert "dataset" not in vars(run)


def test_without_data_json_the_data_are_read_and_a_line_says_so(place):
    (place / "run" / "data.json").unlink()
    with pytest.warns(DataWarning, match="run has no data.json, .*: the training data are read instead"):
        run = runs.open_run(place / "run")
    with warnings.catch_warnings():
        warnings.simplefilter("error", DataWarning)
        kept = runs.open_run(make_run(place / "again", place / "images").directory)
    assert run.facts.fingerprint == kept.facts.fingerprint and run.facts.class_names == ("cats", "dogs")
    shutil.rmtree(place / "images")
    with pytest.raises(ConfigError) as caught:
        runs.open_run(place / "run")
    one_line(caught, "images is no directory", "the training data are asked for because", "has no data.json")


def test_a_damaged_data_json(place):
    (place / "run" / "data.json").write_text('{"name": "own"')
    with pytest.warns(DataWarning, match=r"data\.json cannot be used: .*: the training data are read instead"):
        runs.open_run(place / "run")
    shutil.rmtree(place / "images")
    with pytest.raises(ConfigError) as caught:
        runs.open_run(place / "run")
    one_line(caught, "images is no directory", "data.json cannot be used")


# ---------------------------------------------------------------- going on


def moved_run(place, **changes):
    run = runs.open_run(place / "run")
    args = run.config.data.args | changes
    return runs.build(run.directory, dataclasses.replace(run.config, data=Named("folder", args)))


def test_training_goes_on_where_the_data_have_moved(place):
    (place / "images").rename(place / "elsewhere")
    runs.prepare_directory(moved_run(place, path=str(place / "elsewhere")))
    assert runs.open_run(place / "run").config.data.args["path"] == str(place / "elsewhere")


def test_training_does_not_go_on_with_other_images(place):
    draw_images(place / "others", pixels=255 - PIXELS)
    before = (place / "run" / "data.json").read_bytes()
    for path, texts in {
        "others": ["there are as many samples, of other contents"],
        "fewer": ["'size': 18", "'size': 17"],
    }.items():
        if path == "fewer":
            draw_images(place / path, pixels=PIXELS[:23])
        with pytest.raises(ConfigError) as caught:
            runs.prepare_directory(moved_run(place, path=str(place / path)))
        one_line(caught, "was trained on other data", *texts, "bring the data back, or choose another --run-dir")
    assert (place / "run" / "data.json").read_bytes() == before


def test_a_checkpoint_of_an_earlier_version_does_not_know_data_that_have_moved(place):
    run = runs.open_run(place / "run")
    note = dict(config=configs.to_dict(run.config), data=None, samples=dict(size=18, shape=[8, 8, 3]))
    state = runs.new_state(run)
    with checkpoint.Writer(run.checkpoints, 1) as writer:
        writer.save(dataclasses.replace(state, step=jnp.asarray(6, state.step.dtype)), note)
    runs.prepare_directory(moved_run(place))
    (place / "images").rename(place / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        runs.prepare_directory(moved_run(place, path=str(place / "elsewhere")))
    one_line(caught, "holds another run: data.args.path was")


def test_too_few_images_for_a_batch(place):
    run = runs.open_run(place / "run")
    with pytest.raises(ConfigError) as caught:
        runs.build("no", dataclasses.replace(run.config, train=Train(batch=64)))
    one_line(caught, "train.batch is 64, but images has 18 samples to train on; use --train.batch 18 or less")


# ---------------------------------------------------------------- measuring


def evaluate(capsys, monkeypatch, *words):
    """(what is printed, warnings), where the samples are training images in reverse: no program is compiled."""

    def draw(run, params, key, num, sampling, *args, **options):
        x = run.facts.to_model(np.resize(PIXELS[::-1], (num, 8, 8, 3)))
        return np.asarray(x), (np.resize([1, 0], num) if run.facts.classes else None)

    monkeypatch.setattr(runs, "draw", draw)
    said = command("evaluate", *words, "--num", 24)
    return capsys.readouterr().out, said


def test_measuring_data_that_have_moved(place, capsys, monkeypatch):
    out, said = evaluate(capsys, monkeypatch, place / "run")
    assert said == [] and "classifier on real held-out images" in out and "guidance 2: as asked" in out
    (place / "images").rename(place / "elsewhere")
    with pytest.raises(ConfigError) as caught:
        evaluate(capsys, monkeypatch, place / "run")
    one_line(caught, "images is no directory")
    again, said = evaluate(capsys, monkeypatch, place / "run", "--data-path", place / "elsewhere")
    assert (again, said) == (out, [])


def test_measuring_beside_other_data(place, capsys, monkeypatch):
    draw_images(place / "images", pixels=255 - PIXELS)
    out, said = evaluate(capsys, monkeypatch, place / "run")
    assert said == ["images is not the data of the training (other contents): the numbers are about the data of now"]
    assert "as asked" in out
    shutil.rmtree(place / "images" / "cats")
    draw_images(place / "images", pixels=PIXELS[:2])
    (place / "images" / "cats").rename(place / "images" / "kittens")
    out, said = evaluate(capsys, monkeypatch, place / "run")
    assert len(said) == 1 and "; its classes are others too" in said[0]
    assert "not measured: as asked, because the classes of images are not those of the training" in out
    assert "nearest-neighbour ratio" in out


def test_measuring_without_classes(tmp_path, capsys, monkeypatch):
    """Frechet distance and nearest neighbours need none; the samples are all images, of which a quarter is held out."""
    make_run(tmp_path / "run", draw_images(tmp_path / "images", flat=True))
    out, said = evaluate(capsys, monkeypatch, tmp_path / "run")
    assert "step 5; not measured: as asked, because images has no classes" in out and said == []
    lines = [line for line in out.splitlines() if line.startswith("guidance")]
    assert len(lines) == 1 and lines[0].startswith("guidance 1: Frechet distance ")
    assert lines[0].endswith("nearest-neighbour ratio 0.00")  # most samples are training images
    assert "as asked: how often" not in out  # it is not explained either
    with pytest.raises(ConfigError) as caught:
        evaluate(capsys, monkeypatch, tmp_path / "run", "--judge", tmp_path / "judge.npz")
    one_line(caught, "a ResNet learns classes, and images has 0")


def test_measuring_without_held_out_images(tmp_path, capsys, monkeypatch):
    """The samples are the training images, so their distance to these is 0."""
    make_run(tmp_path / "run", draw_images(tmp_path / "images"), held_out=0.0)
    out, _ = evaluate(capsys, monkeypatch, tmp_path / "run", "--guidance", 1)
    assert "not measured: ratios, because no images are held out" in out
    line = next(line for line in out.splitlines() if line.startswith("guidance"))
    value = float(line.split("Frechet distance ")[1])
    assert abs(value) < 1e-6 and "ratio" not in line


def test_facts_are_words_that_anyone_can_read(trained):
    words = json.loads((trained / "run" / "data.json").read_text())
    assert words["class_names"] == ["cats", "dogs"] and words["shape"] == [8, 8, 3] and words["size"] == 18
    assert jax.tree.map(np.shape, dict(np.load(trained / "run" / "data.npz"))) == dict(mean=(8, 8, 3), std=(8, 8, 3))


@pytest.mark.slow
def test_the_config_of_folders_trains_and_samples_by_name(tmp_path, capsys):
    """With fewer steps; the images are removed before it samples."""
    images, run = draw_images(tmp_path / "images"), tmp_path / "run"
    words = [
        "--train.steps",
        4,
        "--train.batch",
        8,
        "--train.visit",
        2,
        "--model.args.channels",
        8,
        "--sample.steps",
        2,
    ]
    command("train", "folder", "--data.args.path", images, "--run-dir", run, *words)
    assert (run / "samples" / "final.png").is_file()
    shutil.rmtree(images)
    command("sample", run, "--num", 2, "--labels", "dogs", "--out", tmp_path / "a.npz")
    with np.load(tmp_path / "a.npz") as file:
        assert file["samples"].shape == (2, 16, 16, 3) and file["labels"].tolist() == [1, 1]
