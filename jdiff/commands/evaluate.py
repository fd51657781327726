"""Measure a trained run: `jdiff evaluate RUN_DIR [--num 500 --guidance 1 2 ...]`.

Of images with classes it measures three things. How often a judge, trained on the real training split, assigns the
label that was asked for. The Frechet distance to held-out images in the judge's features, and its ratio to that of
training images. The median distance of pixels to the nearest training image, over that of held-out images. The judge
is a support vector machine with 24 principal components as features, or with --judge a ResNet.

Of points on the plane it measures the sliced Wasserstein-2 distance to fresh points, over that between two fresh sets.
"""

import dataclasses
from pathlib import Path

import jax
import numpy as np

from jdiff import config as configs
from jdiff import metrics, runs
from jdiff.commands import options
from jdiff.core.extras import needs
from jdiff.data import load

FRESH_SETS = 8
MOST = 10_000_000  # samples


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure a trained run."""

    run_dir: str
    """A run directory made by jdiff train."""
    num: int = 500
    """Samples of images with classes, more than a judge has features; planes are measured on 10,000."""
    guidance: tuple[float, ...] = (1.0, 2.0)
    """Weights to measure."""
    judge: str | None = None
    """A ResNet's file, NAME.npz: made here, from the training split, if there is none yet."""
    seed: int = 1
    """Of the samples, and of the held-out images whose pixels they are compared with."""


def main(argv: list[str]) -> int:
    """Print how good the samples of a run are; return the exit status."""
    a, asked = options.parse(Arguments, argv, prog="jdiff evaluate", description="Measure a trained run.")
    configs.check_seed(a.seed)
    if not 2 <= a.num <= MOST:
        raise configs.ConfigError(f"--num must be from 2 to {MOST:,}, got {a.num}: the samples' covariance is measured")
    if a.judge is not None:
        check_judge(a.judge)
    run = runs.open_run(a.run_dir)
    samplings = [dataclasses.replace(asked, guidance=w) for w in a.guidance]
    for sampling in samplings:
        dataclasses.replace(run.config, sample=sampling)  # checks the numbers
    step, params = runs.restore_ema(run)
    key, data = jax.random.key(a.seed), run.dataset
    if not data.is_image:
        x, _ = runs.draw(run, params, key, 10_000, asked)
        print(plane_line(data.to_data(x), run.config))
        return 0

    check_images(data)
    judge, train, held = judge_and_features(a, data)
    if a.num <= held.shape[1]:
        raise configs.ConfigError(
            f"--num {a.num} is too few: the covariance of {held.shape[1]} features needs {held.shape[1] + 1} or more"
        )
    held_rows = data.held_x[pick(len(data.held_x), a.num, a.seed)]
    pixels, held_pixels = flat(data.to_model(data.x)), flat(data.to_model(held_rows))
    usual = np.median(metrics.nearest_distance(held_pixels, pixels))
    accuracy = np.mean(judge(data.held_x)[0] == data.held_labels)
    print(f"step {step:,}; classifier on real held-out images: {accuracy:.1%}", flush=True)
    for sampling in samplings:
        x, labels = runs.draw(run, params, key, a.num, sampling)
        images = data.to_data(x)
        found, features = judge(images)
        ours, theirs = metrics.frechet(features, held), metrics.frechet(train, held)
        near = np.median(metrics.nearest_distance(flat(data.to_model(images)), pixels))
        print(
            f"guidance {sampling.guidance:g}: as asked {np.mean(found == labels):.1%}, Frechet distance {ours:.3g}, "
            f"ratio {ours / theirs:.2f}, nearest-neighbour ratio {near / usual:.2f}",
            flush=True,
        )
    return 0


# -------------------------------------------------------------------- images


def check_images(data) -> None:
    """Raise ConfigError unless a set has two classes and two held-out images or more, by which to judge."""
    if not data.classes or not len(data.held_x):
        lacks = "classes" if len(data.held_x) else "held-out images"
        raise configs.ConfigError(f"{data.name} has no {lacks}, without which samples cannot be judged")
    if data.classes < 2 or len(data.held_x) < 2:
        has = f"{data.classes} classes and {len(data.held_x)} held-out images"
        raise configs.ConfigError(f"{data.name} has {has}; samples are judged by 2 or more of each")


def check_judge(path: str) -> None:
    """Raise ConfigError unless a judge can be read from this path or made there."""
    if Path(path).suffix != ".npz":
        raise configs.ConfigError(f"--judge {path}: expected the name of a ResNet's file, NAME.npz")
    if not Path(path).is_file():
        configs.check_writable(path)


def judge_and_features(a: Arguments, data):
    """(the judge: images as stored -> (labels, features); features of training images; features of held-out images)."""
    if a.judge is None:
        judge = pixels_judge(data)
    else:
        path = Path(a.judge)
        if not path.exists():
            print(f"training a ResNet to judge by, kept in {path}", flush=True)
            metrics.save_judge(path, metrics.fit_judge(data))
        resnet = metrics.load_judge(path, data)

        def judge(images):
            return resnet.look(data.to_model(images))

    rows = pick(len(data.x), max(len(data.held_x), 1437), 0)
    return judge, judge(data.x[rows])[1], judge(data.held_x)[1]


def pixels_judge(data, components: int = 24):
    """A judge that is a support vector machine for the labels, and principal components for the features."""
    with needs("judging images needs"):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

    train = flat(data.to_model(data.x))
    components = min(components, *train.shape, len(data.held_x) - 1)
    machine, pca = SVC(C=10, gamma="scale").fit(train, data.labels), PCA(components, random_state=0).fit(train)

    def judge(images):
        points = flat(data.to_model(images))
        return machine.predict(points), pca.transform(points)

    return judge


def pick(size: int, num: int, seed: int) -> np.ndarray:
    """Rows of a set of `size`, `num` of them or all, drawn without replacement: sets may be sorted by class."""
    return np.random.default_rng(seed).permutation(size)[:num]


def flat(images) -> np.ndarray:
    """The numbers of each image in one row."""
    return np.asarray(images, np.float64).reshape(len(images), -1)


# -------------------------------------------------------------------- planes


def plane_line(x, config: configs.Config) -> str:
    """What is measured of points, in words."""
    if config.data.name not in ("scurve", "moons", "circles", "swiss_roll"):
        raise configs.ConfigError(f"data set {config.data.name!r} cannot make fresh points to compare with")
    args = [config.data.args | dict(n=len(x), seed=1000 + i) for i in range(FRESH_SETS)]
    fresh = [load(config.data.name, **one).x for one in args]
    between = np.mean([metrics.sliced_wasserstein(p, q) for i, p in enumerate(fresh) for q in fresh[:i]])
    ours = np.mean([metrics.sliced_wasserstein(x, p) for p in fresh])
    return f"sliced W2 to fresh points {ours:.5f}, between fresh sets {between:.5f}, ratio {ours / between:.2f}"


if __name__ == "__main__":
    configs.run_script(main)
