"""Data sets of the literature by name, with the split, crop and size that papers use."""

from jdiff.data.dataset import DataError
from jdiff.data.from_tfds import tfds
from jdiff.data.records import CACHE, Records
from jdiff.data.registry import register_dataset


@register_dataset
def mnist(data_dir: str | None = None, size: int = 28, cache: int = CACHE, threads: int = 4) -> Records:
    """70,000 handwritten digits, 28x28 grey, 10 classes; size 32 pads them with black. LeCun et al. 1998."""
    return tfds("mnist", data_dir=data_dir, pad=_padding(size), cache=cache, threads=threads)


@register_dataset
def fashion_mnist(data_dir: str | None = None, size: int = 28, cache: int = CACHE, threads: int = 4) -> Records:
    """70,000 pictures of clothes, 28x28 grey, 10 classes; size 32 pads them with black. Xiao et al. (1708.07747)."""
    return tfds("fashion_mnist", data_dir=data_dir, pad=_padding(size), cache=cache, threads=threads)


@register_dataset
def cifar10(data_dir: str | None = None, cache: int = CACHE, threads: int = 4) -> Records:
    """60,000 photographs, 32x32, 10 classes. Krizhevsky 2009."""
    return tfds("cifar10", data_dir=data_dir, cache=cache, threads=threads)


@register_dataset
def celeba(
    data_dir: str | None = None, size: int = 64, crop: int = 140, cache: int = CACHE, threads: int = 4
) -> Records:
    """202,599 faces of 178x218: the central 140x140 resized, as in score-SDE (2011.13456). Liu et al. (1411.7766)."""
    settings = dict(held_split="validation", label=None, size=size, crop=crop)
    return tfds("celeb_a", data_dir=data_dir, cache=cache, threads=threads, **settings)


@register_dataset
def imagenet64(data_dir: str | None = None, size: int = 64, cache: int = CACHE, threads: int = 8) -> Records:
    """ImageNet's 1,281,167 photographs of 1,000 classes, their central squares resized. Russakovsky et al. (1409.0575).

    It is TFDS's imagenet2012, whose archives must be put into its download directory by hand.
    """
    settings = dict(held_split="validation", size=size)
    return tfds("imagenet2012", data_dir=data_dir, cache=cache, threads=threads, **settings)


def _padding(size: int) -> int:
    if size not in (28, 32):
        raise DataError(f"size is 28, or 32 for two black pixels on every side; got {size}")
    return (size - 28) // 2
