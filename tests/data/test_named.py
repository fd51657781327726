"""Sets of the literature: the set of TFDS that each name stands for, and how its images are made."""

import pytest

from jdiff.data import named

SETS = {
    "mnist": ("mnist", dict(pad=0)),
    "fashion_mnist": ("fashion_mnist", dict(pad=0)),
    "cifar10": ("cifar10", {}),
    "celeba": ("celeb_a", dict(size=64, crop=140, label=None, held_split="validation")),
    "imagenet64": ("imagenet2012", dict(size=64, held_split="validation")),
}


@pytest.mark.parametrize("name", SETS)
def test_names_stand_for_sets_of_tfds(name, monkeypatch):
    asked = {}
    monkeypatch.setattr(named, "tfds", lambda name, **settings: asked.update(settings, name=name))
    getattr(named, name)(data_dir="here", cache=7)
    of_tfds, settings = SETS[name]
    expected = dict(name=of_tfds, data_dir="here", cache=7, threads=asked["threads"]) | settings
    assert asked == expected


def test_digits_are_padded_to_32():
    assert named._padding(32) == 2
    with pytest.raises(ValueError, match="size is 28, or 32 for two black pixels on every side; got 30"):
        named.mnist(size=30)
