"""Write images as a set of TensorFlow Datasets, as array_record, without TensorFlow."""

import io
from collections.abc import Iterable
from pathlib import Path

import numpy as np

from jdiff.core.extras import needs
from jdiff.data.dataset import DataError


def write_tfds(name: str, data_dir, shape: tuple[int, int, int], classes: int, **splits: Iterable) -> Path:
    """Write `data_dir/name/1.0.0`, which `tfds(name, data_dir=data_dir)` reads.

    Args:
        name: the name of the set.
        data_dir: the directory of sets.
        shape: the shape of an image, (H, W, C).
        classes: the number of classes, 0 for none.
        **splits: for each split, an iterable of pairs (image uint8, label), or of images if there are no classes. They
            are stored without loss, as PNG, in the order given.

    Returns:
        The directory that was written.

    Raises:
        DataError: an image has another shape or dtype, or a label is none of the classes.
    """
    with needs("jdiff.data needs"):
        import tensorflow_datasets as library
        from PIL import Image

    def png(image):
        image = np.asarray(image)
        if image.shape != tuple(shape) or image.dtype != np.uint8:
            raise DataError(f"write_tfds: an image is {image.dtype} {image.shape}; expected uint8 {tuple(shape)}")
        file = io.BytesIO()
        Image.fromarray(image[:, :, 0] if shape[2] == 1 else image).save(file, "PNG")
        file.seek(0)
        return file

    def examples(samples):
        for i, sample in enumerate(samples):
            if not classes:
                yield i, dict(image=png(sample))
                continue
            image, label = sample
            if not 0 <= label < classes:
                raise DataError(f"write_tfds: label {label} is none of the classes 0 to {classes - 1}")
            yield i, dict(image=png(image), label=int(label))

    def info(self):
        features = dict(image=library.features.Image(shape=tuple(shape), encoding_format="png"))
        if classes:
            features["label"] = library.features.ClassLabel(num_classes=classes)
        features = library.features.FeaturesDict(features)
        return library.core.DatasetInfo(builder=self, features=features, disable_shuffling=True)

    members = dict(
        name=name,
        __doc__="Written by jdiff.",
        VERSION=library.core.Version("1.0.0"),
        _info=info,
        _split_generators=lambda self, manager: {split: examples(samples) for split, samples in splits.items()},
        _generate_examples=lambda self: (),
    )
    with library.core.registered.skip_registration():
        builder = type("Written", (library.core.GeneratorBasedBuilder,), members)
    built = builder(data_dir=str(data_dir), file_format="array_record")
    built.download_and_prepare()
    return Path(built.data_dir)
