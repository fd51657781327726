"""What is kept of data: a round trip, damage, fingerprints, and the names of classes."""

import dataclasses
import json
import shutil

import numpy as np
import pytest
from data_sources import OF_PIXELS, PIXELS, memory, records, save, smooth, stream

from jdiff import data
from jdiff.data import DataError, Dataset, facts_of, read_facts, without_labels, write_facts


def points(n=40):
    x = np.random.default_rng(0).normal(size=(n, 3)).astype(np.float32)
    return Dataset("points", x, None, x[:0], None)


def named():
    return dataclasses.replace(memory(), class_names=("cats", "dogs", "10"))


def same(a, b):
    for field in dataclasses.fields(a):
        x, y = getattr(a, field.name), getattr(b, field.name)
        if isinstance(x, np.ndarray):
            np.testing.assert_array_equal(x, y, strict=True)
        else:
            assert type(x) is type(y) and x == y, field.name


MAKE = {
    "images": memory,
    "named": named,
    "points": points,
    "records": records,
    "unlabelled": lambda: without_labels(memory()),
}


@pytest.mark.parametrize("name", MAKE)
def test_facts_come_back_as_they_were(name, tmp_path):
    dataset = MAKE[name]()
    facts = facts_of(dataset)
    write_facts(tmp_path, facts)
    same(read_facts(tmp_path), facts)
    assert (facts.size, facts.shape, facts.classes) == (dataset.size, dataset.shape, dataset.classes)
    assert (facts.mean is None) == (name == "records")  # which is decoded as it is read
    if facts.mean is not None:
        np.testing.assert_array_equal(facts.mean, dataset.moments()[0])
        np.testing.assert_array_equal(facts.std, dataset.moments()[1])
    if name == "points":
        np.testing.assert_array_equal(np.sort(facts.points, 0), np.sort(dataset.x[:, :2], 0))
    x = dataset.take(np.arange(4))[0] if name == "records" else dataset.x[:4]
    np.testing.assert_array_equal(facts.to_model(x), dataset.to_model(x))
    np.testing.assert_array_equal(facts.to_data(facts.to_model(x)), x)


def test_moments_are_kept_of_large_sets_where_they_are_asked_for():
    facts, dataset = facts_of(records(), moments=True), memory()
    np.testing.assert_array_equal(facts.mean, dataset.moments()[0])
    np.testing.assert_array_equal(facts.std, dataset.moments()[1])


def test_there_may_be_none(tmp_path):
    assert read_facts(tmp_path) is None


HARM = {
    "no text": lambda d: (d / "data.json").write_bytes(b"\xff"),
    "cut": lambda d: (d / "data.json").write_text((d / "data.json").read_text()[:50]),
    "another value": lambda d: (d / "data.json").write_text("[1]"),
    "a link to nothing": lambda d: ((d / "data.json").unlink(), (d / "data.json").symlink_to("no")),
    "no arrays": lambda d: (d / "data.npz").unlink(),
    "cut arrays": lambda d: (d / "data.npz").write_bytes((d / "data.npz").read_bytes()[:200]),
    "other arrays": lambda d: np.savez(d / "data.npz", mean=np.zeros(3, np.float32), std=np.zeros(3, np.float32)),
    "not finite": lambda d: np.savez(d / "data.npz", mean=np.full((4, 5, 3), np.nan, np.float32), std=PIXELS[0]),
    "one array": lambda d: np.savez(d / "data.npz", mean=np.zeros((4, 5, 3), np.float32)),
}  # fmt: skip
WRONG = dict(
    name=3, size=0, shape=[4, -1, 3], is_image=1, classes=2, class_names=["a", "a", "b"], fingerprint=None,
    arrays=["x"],
)  # fmt: skip


@pytest.mark.parametrize("harm", [*HARM, *WRONG])
def test_damaged_files_are_named(harm, tmp_path):
    write_facts(tmp_path, facts_of(named()))
    if harm in HARM:
        HARM[harm](tmp_path)
    else:
        words = json.loads((tmp_path / "data.json").read_text())
        (tmp_path / "data.json").write_text(json.dumps(words | {harm: WRONG[harm]}))
    with pytest.raises(ValueError, match=r"data\.(json|npz) cannot be used: ") as caught:
        read_facts(tmp_path)
    assert "\n" not in str(caught.value) and len(str(caught.value)) < 600


# ---------------------------------------------------------------- fingerprints


def test_the_fingerprint_of_arrays_is_that_of_their_contents():
    one = memory()
    assert one.fingerprint() == memory().fingerprint() == dataclasses.replace(one, name="other").fingerprint()
    x = PIXELS.copy()
    x[20, 1, 1, 1] ^= 1
    labels = OF_PIXELS.copy()
    labels[20] = (labels[20] + 1) % 3
    others = [dict(x=x), dict(labels=labels), dict(x=PIXELS[:-1], labels=OF_PIXELS[:-1])]
    found = {dataclasses.replace(one, **other).fingerprint() for other in others}
    assert len(found | {one.fingerprint()}) == 4


def test_rounding_does_not_change_the_fingerprint_of_points():
    one = points()
    again = dataclasses.replace(one, x=(one.x * np.float32(1 + 1e-7)))
    assert not np.array_equal(one.x, again.x) and one.fingerprint() == again.fingerprint()
    small = dataclasses.replace(one, x=one.x * np.float32(1e-6))
    assert small.fingerprint() != dataclasses.replace(small, x=small.x[::-1]).fingerprint()


def test_the_fingerprint_of_a_folder_moves_with_it(tmp_path):
    def found(name, **settings):
        return data.folder(str(tmp_path / name), 8, **settings).fingerprint()

    for i, image in enumerate(smooth(12)):
        save(tmp_path / "a" / ("cats", "dogs")[i % 2] / f"{i}.png", image)
    first = found("a")
    shutil.move(tmp_path / "a", tmp_path / "b")
    assert found("b") == found("b", cache=0, threads=1) == first
    zero = tmp_path / "b" / "cats" / "0.png"
    zero.rename(tmp_path / "b" / "cats" / "1.png")
    renamed = found("b")
    (tmp_path / "b" / "cats" / "1.png").rename(zero)
    assert found("b") == first
    save(zero, smooth(12, seed=1)[0])  # as many images, one of them another
    assert len({found("b"), renamed, first}) == 3


def test_all_kinds_have_fingerprints():
    assert len({records().fingerprint(), stream().fingerprint(), memory().fingerprint()}) == 3
    assert records().fingerprint() == records(in_memory=True).fingerprint()
    assert stream().fingerprint() == stream(repeat=False).fingerprint()


# ---------------------------------------------------------------- names of classes


def test_names_come_before_numbers():
    facts = facts_of(named())
    assert [facts.number_of(word) for word in ("cats", "dogs", "10", "0", "2")] == [0, 1, 2, 0, 2]
    for word, text in {
        "dog": r"label 'dog' is none of the classes 0 to 2 \(did you mean 'dogs'\?\); their names are cats, dogs, 10$",
        "3": "label '3' is none of the classes 0 to 2; their", "-1": "'-1' is none", "9" * 30: "is none of the classes",
    }.items():  # fmt: skip
        with pytest.raises(ValueError, match=text):
            facts.number_of(word)
    with pytest.raises(ValueError, match="label 12 is none of the classes 0 to 2$"):
        facts_of(memory()).number_of("12")
    with pytest.raises(ValueError, match="labels were given, but this run has no classes"):
        facts_of(points()).number_of("1")


def test_classes_have_the_names_of_their_source(tmp_path):
    assert memory().class_names == records().class_names == stream().class_names == ("0", "1", "2")
    assert without_labels(named()).class_names == without_labels(records()).class_names == ()
    path = tmp_path / "a.npz"
    np.savez(path, samples=PIXELS, labels=OF_PIXELS, class_names=np.array(["cats", "dogs", "hens"]))
    assert data.arrays(str(path)).class_names == ("cats", "dogs", "hens")
    assert data.arrays(str(path), labels=False).class_names == ()
    for names, text in (
        (["cats", "dogs"], "the labels in .* go up to 2; classes=2"),
        (["cats", "dogs", "dogs"], "has 3 classes, and 2 different names"),
        ([1, 2, 3], r"the names of the classes in .* are int64 \(3,\); expected texts"),
    ):
        np.savez(path, samples=PIXELS, labels=OF_PIXELS, names=np.array(names))
        with pytest.raises(DataError, match=text):
            data.arrays(str(path))
    with pytest.raises(ValueError, match="memory has 3 classes, and 2 different names for them"):
        dataclasses.replace(memory(), class_names=("a", "b"))
