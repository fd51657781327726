"""What is to be known of a data set once a network is trained on it, kept in two files, so that no data are needed."""

import dataclasses
import json
from pathlib import Path
from typing import Any

import jax
import numpy as np

from jdiff.core import files, foreign
from jdiff.core.names import did_you_mean
from jdiff.data.dataset import names_of_classes, to_data, to_model
from jdiff.data.records import CACHE, fits

POINTS = 3000  # kept for figures
MOST_CLASSES = 1_000_000
SHOWN = 20  # names of classes in a message


@dataclasses.dataclass(frozen=True)
class DataFacts:
    """What sampling needs to know of the data that a network was trained on.

    Args:
        name: the name of the data set.
        size: the number of training samples.
        shape: the shape of a sample.
        is_image: whether samples are images, uint8, and not points, float32.
        classes: the number of classes, 0 for none.
        class_names: their names; () for their numbers.
        fingerprint: a word that other data do not have, as far as a look at some of them can tell.
        mean, std: over the training samples in the model's numbers, each of the shape of one; or None.
        points: real points (n, 2) to draw beside samples: of points the first two coordinates, at most 3,000; or None.
    """

    name: str
    size: int
    shape: tuple[int, ...]
    is_image: bool
    classes: int
    class_names: tuple[str, ...]
    fingerprint: str
    mean: np.ndarray | None = None
    std: np.ndarray | None = None
    points: np.ndarray | None = None

    def __post_init__(self):
        object.__setattr__(self, "class_names", names_of_classes(self.name, self.class_names, self.classes))

    def to_model(self, x) -> jax.Array:
        """Stored numbers as the model sees them, float32; it runs on the device and under jit."""
        return to_model(x, self.is_image)

    def to_data(self, x) -> np.ndarray:
        """The model's numbers as they are stored: images clipped and rounded to uint8, points float32."""
        return to_data(x, self.is_image)

    def number_of(self, word: str) -> int:
        """The number of the class that a word names; a word that is no name may be the number itself.

        Raises:
            ValueError: it is neither; the message suggests the nearest name.
        """
        if word in self.class_names:
            return self.class_names.index(word)
        if word.isdecimal() and len(word) < 10 and int(word) < self.classes:
            return int(word)
        if not self.classes:
            raise ValueError("labels were given, but this run has no classes")
        numbers = f"is none of the classes 0 to {self.classes - 1}"
        if self.class_names == tuple(map(str, range(self.classes))):
            raise ValueError(f"label {foreign.one_line(word, 80)} {numbers}")
        shown = ", ".join(self.class_names[:SHOWN]) + (", ..." if self.classes > SHOWN else "")
        hint = did_you_mean(word, self.class_names)
        raise ValueError(f"label {foreign.one_line(word, 80)!r} {numbers}{hint}; their names are {shown}")


def facts_of(data: Any, moments: bool = False) -> DataFacts:
    """Look at a data set.

    Args:
        data: the data set, of any kind.
        moments: whether mean and standard deviation are needed. They are taken in any case of a set that is kept in
            memory, which is decoded for it.
    """
    mean = std = points = None
    if moments or (data.in_memory and fits(data.size, data.shape, CACHE)):
        mean, std = data.moments()
    if not data.is_image and len(real := data.held_x if len(data.held_x) or not data.in_memory else data.x):
        points = np.asarray(real[np.random.default_rng(0).permutation(len(real))[:POINTS]], np.float32)[:, :2]
    return DataFacts(
        data.name, data.size, tuple(map(int, data.shape)), bool(data.is_image), data.classes, data.class_names,
        data.fingerprint(), mean, std, points,
    )  # fmt: skip


def write_facts(directory, facts: DataFacts) -> None:
    """Write `directory/data.json`, and the arrays into `directory/data.npz`.

    Raises:
        OSError: they cannot be written.
    """
    directory, arrays = Path(directory), _arrays(facts)
    if arrays:
        files.write(directory / "data.npz", lambda file: np.savez(file, **arrays))
    words = {f.name: getattr(facts, f.name) for f in dataclasses.fields(facts) if f.name not in ARRAYS}
    if facts.class_names == tuple(map(str, range(facts.classes))):
        words["class_names"] = ()
    text = json.dumps(words | dict(arrays=list(arrays)), indent=2) + "\n"
    files.write(directory / "data.json", lambda file: file.write(text.encode()))


def read_facts(directory) -> DataFacts | None:
    """Read what `write_facts` wrote; None where there is no data.json.

    Raises:
        ValueError: a file is damaged; the message names it.
    """
    path = Path(directory) / "data.json"
    if not (path.exists() or path.is_symlink()):
        return None
    try:
        words = foreign.read_json(path)
        names = _check_words(words)
        facts = DataFacts(**words | dict(shape=tuple(words["shape"]), class_names=tuple(words["class_names"])))
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be used: {foreign.one_line(error, 300)}") from error
    if not names:
        return facts
    path = path.with_suffix(".npz")
    try:
        foreign.check_file(path)
        arrays: dict[str, Any] = dict(foreign.read_npz(path, names))
        facts = dataclasses.replace(facts, **arrays)
        _check_arrays(facts, names)
    except (ValueError, OSError) as error:
        raise ValueError(f"{path} cannot be used: {foreign.one_line(error, 300)}") from error
    return facts


ARRAYS = ("mean", "std", "points")
KINDS = dict(name=str, size=int, shape=list, is_image=bool, classes=int, class_names=list, fingerprint=str, arrays=list)


def _arrays(facts: DataFacts) -> dict[str, Any]:
    return {name: array for name in ARRAYS if (array := getattr(facts, name)) is not None}


def _check_words(words) -> list[str]:
    """Check what stands in data.json, take the names of the arrays out of it, and return them."""
    if not isinstance(words, dict) or set(words) != set(KINDS):
        raise ValueError(f"expected an object with {', '.join(KINDS)}")
    for name, kind in KINDS.items():
        if type(words[name]) is not kind:
            raise ValueError(f"{name} is {words[name]!r:.80}")
    shape, classes, arrays = words["shape"], words["classes"], words.pop("arrays")
    sides = all(type(side) is int and 0 < side <= 2**20 for side in shape)
    if not sides or not 0 < len(shape) <= 4 or int(np.prod(shape, dtype=float)) > 2**31 or words["size"] < 1:
        raise ValueError(f"{words['size']} samples of the shape {shape!r:.80}")
    if not 0 <= classes <= MOST_CLASSES or not all(type(name) is str for name in words["class_names"]):
        raise ValueError(f"{classes} classes of the names {words['class_names']!r:.80}")
    if not all(name in ARRAYS for name in arrays) or ("mean" in arrays) != ("std" in arrays):
        raise ValueError(f"the arrays {arrays!r:.80}")
    return arrays


def _check_arrays(facts: DataFacts, names: list[str]) -> None:
    for name in names:
        array = getattr(facts, name)
        right = array is not None and array.dtype == np.float32 and np.isfinite(array).all()
        shape = (len(array), min(2, facts.shape[0])) if right and name == "points" and array.ndim else facts.shape
        if not right or array.shape != shape or (name == "std" and array.min() < 0):
            raise ValueError(f"{name} is not of finite numbers, float32 {facts.shape}")
