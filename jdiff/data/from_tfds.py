"""Sets of TensorFlow Datasets that are prepared as array_record; they are read without TensorFlow."""

import contextlib
from pathlib import Path

import numpy as np

from jdiff.core import foreign
from jdiff.core.extras import needs
from jdiff.data import fingerprint
from jdiff.data.dataset import DataError
from jdiff.data.images import from_bytes
from jdiff.data.order import spread
from jdiff.data.records import CACHE, HELD, Records, decode, fits
from jdiff.data.registry import register_dataset


@register_dataset
def tfds(
    name: str,
    split: str = "train",
    held_split: str | None = "test",
    data_dir: str | None = None,
    image: str = "image",
    label: str | None = "label",
    size: int | None = None,
    crop: int | None = None,
    pad: int = 0,
    channels: int | None = None,
    cache: int = CACHE,
    threads: int = 4,
) -> Records:
    """A set of images of TensorFlow Datasets, such as "cifar10"; nothing is downloaded.

    Args:
        name: the name of the set.
        split: the training split, which may be a slice: "train[:90%]".
        held_split: the split that is held out; None for no samples.
        data_dir: where sets are prepared as array_record; None for the default of TensorFlow Datasets.
        image: the feature that is the image.
        label: the feature that is the class; None for a set without classes.
        size: resize the central square to this side; None keeps images as they are.
        crop: the side of that square; None for the largest.
        pad: then add so many black pixels on every side.
        channels: 3 for colour, 1 for grey; None for those of the set.
        cache: a set of at most these bytes is kept in memory; others are decoded as they are read.
        threads: how many threads decode.

    Raises:
        DataError: the set is not prepared (the message has the command that prepares it), or an argument does not fit.
    """
    if threads < 1 or pad < 0 or (crop is not None and size is None):
        raise DataError(
            f"tfds: threads must be positive, pad 0 or more, and crop needs size; got {threads=}, {pad=}, {crop=}, "
            f"{size=}"
        )
    builder = _builder(name, data_dir)
    shape, channels, names = _features(builder, image, label, size, channels)
    classes = len(names)
    shape = (shape[0] + 2 * pad, shape[1] + 2 * pad, channels)

    def open_split(split):
        import tensorflow_datasets as library

        try:
            raw = library.decode.DeserializeMethod.RAW_BYTES
            return builder.as_data_source(split=split, deserialize_method=raw)
        except Exception as error:  # ValueError or KeyError for an unknown split, RuntimeError for a damaged file
            raise DataError(f"tfds: {name}: {' '.join(str(error).split())}") from error

    def take_of(source):
        from google.protobuf import message
        from tensorflow_datasets.proto import tf_example_pb2

        def take(rows):
            x, labels = np.zeros((len(rows), *shape), np.uint8), np.zeros(len(rows), np.int32)
            inner = x[:, pad : shape[0] - pad, pad : shape[1] - pad]
            try:
                records = source.__getitems__([int(row) for row in rows])
            except Exception as error:  # array_record raises RuntimeError for damage
                raise DataError(f"tfds: {name}: its records cannot be read ({error})") from error
            for i, record in enumerate(records):
                try:
                    # only these two features are parsed: TFDS would decode all of them, at half the speed
                    feature = tf_example_pb2.Example.FromString(record).features.feature
                    pixels = from_bytes(feature[image].bytes_list.value[0], size, channels, crop)
                    found = feature[label].int64_list.value[0] if classes else 0
                except (ValueError, IndexError, message.DecodeError) as error:
                    raise DataError(f"tfds: {name}: record {rows[i]} cannot be read ({error})") from error
                if pixels.shape != inner.shape[1:]:
                    raise DataError(f"tfds: {name}: record {rows[i]} is {pixels.shape}, others {inner.shape[1:]}")
                if classes and not 0 <= found < classes:
                    raise DataError(f"tfds: {name}: record {rows[i]} has class {found}; expected 0 to {classes - 1}")
                inner[i], labels[i] = pixels, found
            return x, labels if classes else None

        return take

    def held():
        if held_split is None:
            return np.zeros((0, *shape), np.uint8), np.zeros(0, np.int32) if classes else None
        return decode(take_of(held_source), spread(len(held_source), HELD), shape, threads)

    def identify():
        from tensorflow_datasets.proto import tf_example_pb2

        looked_at = []
        for record in source.__getitems__([int(row) for row in spread(len(source), fingerprint.LOOKED_AT)]):
            feature = tf_example_pb2.Example.FromString(record).features.feature
            looked_at += [feature[image].bytes_list.value[0], *(feature[label].int64_list.value if classes else ())]
        return fingerprint.digest(["tfds", len(source), *looked_at])

    source = open_split(split)
    held_source = None if held_split is None else open_split(held_split)
    return Records(
        name=builder.name,
        size=len(source),
        shape=shape,
        take=take_of(source),
        held=held,
        classes=classes,
        in_memory=fits(len(source), shape, cache),
        threads=threads,
        class_names=names,
        identify=identify,
    )


def _builder(name: str, data_dir: str | None):
    """The builder of a prepared set. Raises DataError with the command that prepares it."""
    with needs("jdiff.data needs"):
        import tensorflow_datasets as library
    where = str(Path(data_dir).expanduser()) if data_dir else None
    try:
        with _quiet():
            parsed, _ = library.core.naming.parse_builder_name_kwargs(name)
            if parsed.namespace:
                raise DataError(f"tfds: {name!r} is of another registry, whose sets may be code; expected one of TFDS")
            _check_files(Path(where or library.core.constants.DATA_DIR) / parsed.name)
            builder = library.builder(name, data_dir=where)
            prepared = builder.is_prepared()
    except DataError:
        raise
    except Exception as error:  # TFDS raises a class of its own for an unknown name, AssertionError, ImportError
        reason = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        searched = where or "its default data_dir"
        raise DataError(f"tfds: {name!r} is neither known to TFDS nor prepared in {searched}: {reason}") from error
    directory = f", data_dir={where!r}" if where else ""
    command = (
        f'python -c "import tensorflow_datasets as tfds; tfds.builder({name!r}{directory}, '
        "file_format='array_record').download_and_prepare()\""
    )
    if not prepared:
        raise DataError(
            f"tfds: {name} is not prepared in {builder.data_dir}; where there is a network, and TensorFlow for this "
            f"once, run: {command}"
        )
    form = builder.info.file_format.value
    if form != "array_record":
        raise DataError(
            f"tfds: {name} is prepared as {form} in {builder.data_dir}, and is read as array_record; prepare it so in "
            f"another data_dir: {command}"
        )
    return builder


def _check_files(directory: Path) -> None:
    """Raise DataError if the files of a prepared set would make TFDS wait for ever, or import code that they name."""
    for path in sorted(directory.rglob("*")):
        if path.is_dir():
            continue
        try:
            foreign.check_file(path)
            kinds = _kinds(foreign.read_json(path)) if path.name == "features.json" else set()
        except (ValueError, RecursionError) as error:
            raise DataError(f"tfds: {path} cannot be read: {error}") from error
        for kind in sorted(kinds):
            if not kind.startswith("tensorflow_datasets."):
                raise DataError(f"tfds: {path} asks for {kind}, which is code and not of TFDS")


def _kinds(features) -> set[str]:
    """The names of Python classes in a features.json, of the current form and of the one before."""
    if isinstance(features, list):
        return set().union(*map(_kinds, features))
    if not isinstance(features, dict):
        return set()
    named = [features.get("pythonClassName"), features.get("type") if "content" in features else None]
    return {kind for kind in named if isinstance(kind, str)}.union(*map(_kinds, features.values()))


@contextlib.contextmanager
def _quiet():
    """Silence the warnings of TFDS: one line says what is wrong, and they would come beside it."""
    from absl import logging

    before = logging.get_verbosity()
    logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        logging.set_verbosity(before)


def _features(builder, image: str, label: str | None, size: int | None, channels: int | None):
    """((height, width), channels, names of the classes) of the samples. Raises DataError for other features."""
    from tensorflow_datasets import features as kinds

    features = builder.info.features
    images = [key for key, feature in features.items() if isinstance(feature, kinds.Image)]
    labels = [key for key, feature in features.items() if isinstance(feature, kinds.ClassLabel)]
    if image not in images:
        raise DataError(f"tfds: {builder.name} has no image {image!r}; image= is one of {', '.join(images) or 'none'}")
    if label is not None and label not in labels:
        raise DataError(
            f"tfds: {builder.name} has no class label {label!r}; label= is one of {', '.join([*labels, 'None'])}"
        )
    *sides, stored = features[image].shape
    if size is None and None in sides:
        raise DataError(f"tfds: the images of {builder.name} differ in size; give the size= they are resized to")
    channels = channels or (1 if stored == 1 else 3)
    if channels not in (1, 3) or features[image].np_dtype != np.uint8:
        raise DataError(f"tfds: {builder.name}: expected channels 1 or 3, uint8; got {channels}")
    names = () if label is None else tuple(features[label].names)
    return ((size, size) if size else tuple(sides)), channels, names
