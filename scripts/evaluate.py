"""Measure a trained run: `python scripts/evaluate.py RUN_DIR [--num 500 --guidance 1 2 ...]`.

Images with classes: how often a classifier trained on the real training split assigns the asked label; the Frechet
distance to held-out images in the classifier's features, over that of training images; the median distance of pixels
to the nearest training image, over that of held-out images. The classifier is a support vector machine, its features 24
principal components; with --judge a ResNet. Planes: sliced Wasserstein-2 to fresh points, over the distance between two
fresh sets.
"""

import dataclasses
import sys
from pathlib import Path
from typing import Annotated

import jax
import numpy as np
import tyro

from jdiff import checkpoint, metrics, runs
from jdiff import config as configs
from jdiff.data import DataError, load

FRESH_SETS = 8


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure a trained run."""

    run_dir: Annotated[str, tyro.conf.Positional]
    """A run directory made by scripts/train.py."""
    num: int = 500
    """Samples of images with classes; planes are measured on 10,000."""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """Weights to measure."""
    judge: str | None = None
    """A ResNet's file, NAME.npz: made here, from the training split, if there is none yet."""
    seed: int = 1
    """Of the samples."""


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="scripts/evaluate.py")
    run = runs.open_run(a.run_dir)
    step, params = runs.restore_ema(run)
    key, data = jax.random.key(a.seed), run.dataset
    if not data.is_image:
        x, _ = runs.draw(run, params, key, 10_000, run.config.sample)
        print(plane_line(data.to_data(x), run.config))
        return 0
    if not data.classes or not len(data.held_x):
        lacks = "classes" if len(data.held_x) else "held-out images"
        raise configs.ConfigError(f"{data.name} has no {lacks}, without which samples cannot be judged")
    look, train, held = judge(a, data)
    pixels, held_pixels = flat(data.to_model(data.x)), flat(data.to_model(data.held_x[: a.num]))
    usual = np.median(metrics.nearest_distance(held_pixels, pixels))
    accuracy = np.mean(look(data.held_x)[0] == data.held_labels)
    print(f"step {step:,}; classifier on real held-out images: {accuracy:.1%}", flush=True)
    for w in a.guidance:
        x, labels = runs.draw(run, params, key, a.num, dataclasses.replace(run.config.sample, guidance=w))
        images = data.to_data(x)
        seen, features = look(images)
        ours, theirs = (metrics.frechet(part, held) for part in (features, train))
        near = np.median(metrics.nearest_distance(flat(data.to_model(images)), pixels))
        print(
            f"guidance {w:g}: as asked {np.mean(seen == labels):.1%}, Frechet distance {ours:.3g}, ratio "
            f"{ours / theirs:.2f}, nearest-neighbour ratio {near / usual:.2f}",
            flush=True,
        )
    return 0


def judge(a: Arguments, data):
    """(images as stored -> (labels, features), features of the training set, and of the held-out)."""
    if a.judge is None:
        look = pixels_judge(data)
    else:
        path = Path(a.judge)
        if not path.exists():
            print(f"training a ResNet to judge by, kept in {path}", flush=True)
            metrics.save_judge(path, metrics.fit_judge(data))
        resnet = metrics.load_judge(path, data)

        def look(images):
            return resnet.look(data.to_model(images))

    picks = np.random.default_rng(0).permutation(len(data.x))[: max(len(data.held_x), 1437)]
    return look, look(data.x[picks])[1], look(data.held_x)[1]


def pixels_judge(data, components: int = 24):
    """A support vector machine, and principal components."""
    from sklearn.decomposition import PCA
    from sklearn.svm import SVC

    train = flat(data.to_model(data.x))
    machine, pca = SVC(C=10, gamma="scale").fit(train, data.labels), PCA(components, random_state=0).fit(train)

    def look(images):
        points = flat(data.to_model(images))
        return machine.predict(points), pca.transform(points)

    return look


def flat(images) -> np.ndarray:
    return np.asarray(images, np.float64).reshape(len(images), -1)


def plane_line(x, config) -> str:
    if config.data.name not in ("scurve", "moons", "circles", "swiss_roll"):
        raise configs.ConfigError(f"data set {config.data.name!r} cannot make fresh points to compare with")
    how = [config.data.args | dict(n=len(x), seed=1000 + i) for i in range(FRESH_SETS)]
    fresh = [load(config.data.name, **args).x for args in how]
    between = np.mean([metrics.sliced_wasserstein(p, q) for i, p in enumerate(fresh) for q in fresh[:i]])
    ours = np.mean([metrics.sliced_wasserstein(x, p) for p in fresh])
    return f"sliced W2 to fresh points {ours:.5f}, between fresh sets {between:.5f}, ratio {ours / between:.2f}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (configs.ConfigError, checkpoint.CheckpointError, DataError, OSError) as error:
        configs.fail(error)
