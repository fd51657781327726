"""Look at data before training on them: `jdiff inspect CONFIG [--data.args.path DIR ...]`, or `jdiff inspect DIR`.

It prints how many samples there are and of which classes, the sizes of the files' images, range, mean and standard
deviation, and duplicates, and draws a picture with a row for each class. Notes say what stands in the way of training.
"""

import dataclasses
from pathlib import Path

import numpy as np

from jdiff import config as configs
from jdiff.data import Records
from jdiff.data.fingerprint import digest
from jdiff.data.order import spread
from jdiff.runs import plot

LOOKED_AT = 4096  # samples of a set that is not kept in memory
ROWS, COLUMNS = 20, 10  # of the picture
CLASSES = 12  # that are listed


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Look at the data of a config."""

    config: str
    """A config file, or the name of a config of jdiff; or a folder of images, which configs/folder.py reads."""
    out: str = "data.png"
    """Where to draw some of the samples, a .png."""


@dataclasses.dataclass(frozen=True)
class Seen:
    """The samples that were looked at."""

    x: np.ndarray
    """(n, ...), as they are stored."""
    labels: np.ndarray | None
    """Their classes (n,), or None."""
    all: bool
    """Whether these are all of the training samples."""


def main(argv: list[str]) -> int:
    """Print what is to be known of the data of a config, and draw some; return the exit status."""
    if argv and "/" in argv[0] and not argv[0].endswith(".py") and not Path(argv[0]).exists():
        raise configs.ConfigError(f"there is no folder {argv[0]}; expected one with images, or a config")
    if argv and argv[0] not in configs.config_files() and Path(argv[0]).is_dir():
        argv = ["folder", "--data.args.path", *argv]
    about = "Look at the data of a config: counts, classes, sizes, numbers, duplicates, and a picture of some."
    a, config = configs.parse_with_config(Arguments, argv, prog="jdiff inspect", description=about)
    out = Path(a.out)
    if out.suffix != ".png":
        raise configs.ConfigError(f"--out {a.out}: expected a name that ends in .png")
    configs.check_writable(out)
    data = configs.build_data(config)
    seen = look(data)
    for title, text in facts(data, seen) + training(config, data):
        print(f"{title:<12}{text}", flush=True)
    (sheet if data.is_image else plane)(out, data, seen)
    print(f"{'picture':<12}{out}")
    for note in notes(config, data, seen):
        print(f"note: {note}")
    return 0


def look(data) -> Seen:
    """All training samples of a set that is kept in memory, else 4,096 of them: evenly spaced, or the first ones."""
    if data.in_memory:
        return Seen(data.x, data.labels, True)
    if isinstance(data, Records):
        return Seen(*data.take(spread(data.size, LOOKED_AT)), data.size <= LOOKED_AT)
    chunk = next(data.read(0, 1, [(0, min(LOOKED_AT, data.size))]))
    return Seen(chunk.x[:, 0], None if chunk.labels is None else chunk.labels[:, 0], False)


# -------------------------------------------------------------------- what is printed


def facts(data, seen: Seen) -> list[tuple[str, str]]:
    """(title, text) of each line about the data."""
    what = "images" if data.is_image else "points"
    of = "" if seen.all else f", of {len(seen.x):,} samples"
    lines = [("data", f"{data.name}: {what} of shape {sides(data.shape)}")]
    held = len(data.held_x)
    lines.append(("samples", f"{data.size:,} to train on, {held:,} held out of {data.size + held:,}"))
    lines.append(("classes", classes(data, seen) + (of or ", to train on" if data.classes else "")))
    if isinstance(data, Records) and data.original is not None:
        lines.append(("files", file_sizes(data.original)))
    low, high = seen.x.min(), seen.x.max()
    model = np.asarray(data.to_model(seen.x[spread(len(seen.x), LOOKED_AT)]), np.float64)
    mean, std = model.mean(), model.std()
    lines.append(("numbers", f"{low:.4g} to {high:.4g} as stored{of}"))
    lines.append(("as trained", f"{model.min():.4g} to {model.max():.4g}, mean {mean:.4g}, std (sigma_data) {std:.4g}"))
    lines.append(("duplicates", duplicates(data, seen) + of))
    return lines


def sides(shape) -> str:
    """A shape in words, as 32x32x3."""
    return "x".join(map(str, shape))


def classes(data, seen: Seen) -> str:
    """The classes and how many samples of each there are, in words."""
    if seen.labels is None:
        return "none"
    counts = np.bincount(seen.labels, minlength=data.classes)
    words = [f"{name}: {count:,}" for name, count in zip(data.class_names, counts, strict=True)]
    more = f", and {len(words) - CLASSES:,} more" if len(words) > CLASSES else ""
    return f"{data.classes:,} ({', '.join(words[:CLASSES])}{more})"


def file_sizes(original: np.ndarray) -> str:
    """The heights and widths of the images in the files (n, 2), in words."""
    by_area = original[np.argsort(original.prod(1), kind="stable")]
    low, median, high = (sides(by_area[i]) for i in (0, len(by_area) // 2, -1))
    if low == high and (by_area == by_area[0]).all():
        return f"{len(original):,} images, all of {low} (height x width)"
    return f"{len(original):,} images, from {low} to {high} (height x width), the median {median}"


def duplicates(data, seen: Seen) -> str:
    """How many samples are the same as an earlier one, or as a held-out one, in words."""
    words, held = ([digest([row.tobytes()]) for row in rows] for rows in (seen.x, data.held_x))
    again, leaked = len(words) - len(set(words)), len(set(held) & set(words))
    both = [f"{again:,} are the same as another one"] * bool(again)
    both += [f"{leaked:,} held-out ones are among those to train on"] * bool(leaked)
    return "; ".join(both) or "none"


def training(config: configs.Config, data) -> list[tuple[str, str]]:
    """(title, text) of the line about the training that the config asks for."""
    t = config.train
    passes = t.steps * t.batch / data.size
    times = f"{passes:,.0f}" if passes >= 10 else f"{passes:.2g}"
    return [("training", f"{t.steps:,} steps of {t.batch}: each sample is seen {times} times")]


def notes(config: configs.Config, data, seen: Seen) -> list[str]:
    """What stands in the way of training, or of measuring what was trained."""
    found, batch = [], config.train.batch
    arguments = configs.arguments(configs.CHOICES["datasets"], config.data.name)
    if batch > data.size:
        found.append(
            f"{data.size:,} samples are too few for train.batch {batch}: use --train.batch {data.size} or less"
        )
    if len(data.held_x) < 2 and "held_out" in arguments:
        found.append("jdiff evaluate compares samples with held-out ones: --data.args.held_out 0.1 holds a tenth out")
    if seen.labels is not None:
        counts = np.bincount(seen.labels, minlength=data.classes)
        if counts.min() * 10 <= counts.max():
            rarest, commonest = data.class_names[counts.argmin()], data.class_names[counts.argmax()]
            found.append(f"class {rarest} has {counts.min():,} samples, and {commonest} has {counts.max():,}")
    if isinstance(data, Records) and data.original is not None:
        smaller = int((data.original.min(1) < min(data.shape[:2])).sum())
        if smaller:
            found.append(f"{smaller:,} of the images are smaller than {sides(data.shape[:2])}, and are enlarged")
    return found


# -------------------------------------------------------------------- the picture


def sheet(path: Path, data, seen: Seen) -> None:
    """Draw images: rows for each of the first classes, or rows of ten."""
    if seen.labels is None:
        plot.image_grid(path, seen.x[spread(len(seen.x), ROWS * COLUMNS // 2)], COLUMNS)
        return
    found = [np.flatnonzero(seen.labels == label) for label in range(min(data.classes, ROWS))]
    rows = np.concatenate([of_class[spread(len(of_class), COLUMNS)] for of_class in found])
    plot.class_grid(path, seen.x[rows], seen.labels[rows], data.class_names)


def plane(path: Path, data, seen: Seen) -> None:
    """Draw points."""
    plot.plane_figure(path, [(0.0, seen.x)], [])


if __name__ == "__main__":
    configs.run_script(main)
