"""Measure a trained run: `jdiff evaluate RUN_DIR [--num 500 --guidance 1 2 ...]`.

Of images it measures three things. How often a judge, trained on the real training split, assigns the label that was
asked for: for this there must be two classes or more. The Frechet distance to held-out images in the judge's features,
and its ratio to that of training images. The median distance of pixels to the nearest training image, over that of
held-out images. The judge is a support vector machine with 24 principal components as features, or with --judge a
ResNet. Where no images are held out, the Frechet distance is that to the training images, and no ratio is measured.

Of points on the plane it measures the sliced Wasserstein-2 distance to fresh points, over that between two fresh sets.
"""

import dataclasses
import textwrap
from pathlib import Path

import jax
import numpy as np

from jdiff import config as configs
from jdiff import metrics, runs
from jdiff.commands import options
from jdiff.core.extras import needs
from jdiff.data import load
from jdiff.runs.progress import Progress

LEGEND = {
    "as asked": "how often the judge sees in a sample the class that was asked for. The best is what it reaches on "
    "real images, above; more than that means that samples are plainer than real ones.",
    "Frechet distance": "how far samples are from real images, in the judge's features. 0 is best. Its size depends on "
    "the judge and on --num, so compare only what was measured with the same ones.",
    "ratio": "that distance over the distance of training images. 1 is best: samples are as near to held-out images as "
    "training images are. The larger it is, the more samples look different or miss a part of the data.",
    "nearest-neighbour ratio": "how far a sample is from its nearest training image, over the same of held-out images. "
    "About 1 is good. Well below 1 means that samples repeat training images; well above 1, that they are noisy.",
}
PLANE_LEGEND = {
    "sliced W2": "how far samples must be moved to become fresh points of the data, on average over directions.",
    "ratio": "that distance over the one between two fresh sets. 1 is best: samples are as near as fresh points are.",
}
FRESH_SETS = 8
MOST = 10_000_000  # samples
FEW = 100  # held-out images, below which distances to them are mostly chance


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Measure a trained run."""

    run_dir: str
    """A run directory made by jdiff train."""
    num: int = 500
    """Samples of images, more than a judge has features; planes are measured on 10,000."""
    guidance: tuple[float, ...] = ()
    """Weights to measure; 1 and 2 when left out, and 1 alone for a run without classes."""
    judge: str | None = None
    """A ResNet's file, NAME.npz: made here, from the training split, if there is none yet."""
    data_path: str | None = None
    """Where the data are now: they may have moved, and may be others, which a line says."""
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
    run = runs.open_run(a.run_dir, a.data_path)
    weights = a.guidance or ((1.0, 2.0) if run.facts.classes else (1.0,))
    samplings = [dataclasses.replace(asked, guidance=w) for w in weights]
    for sampling in samplings:
        dataclasses.replace(run.config, sample=sampling)  # checks the numbers
    step, params = runs.restore_ema(run)
    key, progress = jax.random.key(a.seed), Progress()
    if not run.facts.is_image:
        check_plane(run.config)
        x, _ = runs.draw(run, params, key, 10_000, asked, progress=progress)
        with progress.stage("comparing with fresh points"):
            line = plane_line(run.facts.to_data(x), run.config)
        print(line)
        explain(PLANE_LEGEND, list(PLANE_LEGEND))
        return 0

    try:
        data = run.dataset
    except configs.ConfigError as error:
        moved = "" if a.data_path else "; if the data have moved, --data-path says where they are"
        raise configs.ConfigError(f"{error}{moved}") from error
    held_out, lacking = len(data.held_x) > 1, lacks(run, data)
    with progress.stage("fitting the judge to the training images" if a.judge is None else f"the judge {a.judge}"):
        judge = pixels_judge(data, not lacking) if a.judge is None else resnet_judge(a.judge, data, progress)
    real = data.held_x if held_out else data.x
    reference = judge(real)[1]
    if a.num <= reference.shape[1]:
        features = reference.shape[1]
        raise configs.ConfigError(
            f"--num {a.num} is too few: the covariance of {features} features needs {features + 1} or more"
        )
    if held_out and len(data.held_x) < FEW:
        held = len(data.held_x)
        print(f"note: {held} held-out images are few: what is compared with them says little; {FEW} or more are better")
    first = f"step {step:,}; "
    if not lacking:
        of = "held-out" if held_out else "training"
        accuracy = np.mean(judge(real)[0] == (data.held_labels if held_out else data.labels))
        first += f"classifier on real {of} images: {accuracy:.1%}"
    else:
        first += f"not measured: as asked, because {lacking}"
    print(first, flush=True)
    if held_out:
        pixels = flat(data.to_model(data.x))
        held_pixels = flat(data.to_model(data.held_x[pick(len(data.held_x), a.num, a.seed)]))
        with progress.stage("measuring training and held-out images"):
            usual = np.median(metrics.nearest_distance(held_pixels, pixels))
            theirs = metrics.frechet(judge(data.x[pick(len(data.x), max(len(data.held_x), 1437), 0)])[1], reference)
    else:
        print("not measured: ratios, because no images are held out; the distance is that to the training images")
    for sampling in samplings:
        x, labels = runs.draw(run, params, key, a.num, sampling, progress=progress)
        images, figures = data.to_data(x), {}
        with progress.stage(f"judging samples of guidance {sampling.guidance:g}"):
            found, features = judge(images)
            ours = metrics.frechet(features, reference)
            if not lacking:
                figures["as asked"] = f"{np.mean(found == labels):.1%}"
            figures["Frechet distance"] = f"{ours:.3g}"
            if held_out:
                near = np.median(metrics.nearest_distance(flat(data.to_model(images)), pixels))
                figures |= {"ratio": f"{ours / theirs:.2f}", "nearest-neighbour ratio": f"{near / usual:.2f}"}
        shown = ", ".join(f"{name} {figure}" for name, figure in figures.items())
        print(f"guidance {sampling.guidance:g}: {shown}", flush=True)
    explain(LEGEND, list(figures))
    return 0


def explain(legend: dict[str, str], figures: list[str]) -> None:
    """Print what each of the figures means, and which values are good."""
    lines = [
        textwrap.fill(f"{name}: {legend[name]}", 100, subsequent_indent="  ", break_on_hyphens=False)
        for name in figures
    ]
    print("", *lines, sep="\n")


# -------------------------------------------------------------------- images


def lacks(run: runs.Run, data) -> str:
    """Why it cannot be judged whether samples are of the classes asked for; "" where it can.

    Raises:
        ConfigError: there are fewer than two images to compare with.
    """
    if max(len(data.held_x), data.size) < 2:
        raise configs.ConfigError(f"{data.name} has one image; samples are compared with 2 or more")
    if data.class_names != run.facts.class_names:
        return f"the classes of {data.name} are not those of the training"
    return "" if data.classes > 1 else f"{data.name} has {'one class' if data.classes else 'no classes'}"


def check_judge(path: str) -> None:
    """Raise ConfigError unless a judge can be read from this path or made there."""
    if Path(path).suffix != ".npz":
        raise configs.ConfigError(f"--judge {path}: expected the name of a ResNet's file, NAME.npz")
    if not Path(path).is_file():
        configs.check_writable(path)


def resnet_judge(path: str, data, progress: Progress):
    """A judge that is a ResNet, trained where there is no such file: images as stored -> (labels, features)."""
    if data.classes < 2:
        raise configs.ConfigError(f"--judge {path}: a ResNet learns classes, and {data.name} has {data.classes}")
    if not Path(path).exists():
        progress.line(f"training a ResNet to judge by, kept in {path}")
        metrics.save_judge(path, metrics.fit_judge(data))
    resnet = metrics.load_judge(path, data)
    return lambda images: resnet.look(data.to_model(images))


def pixels_judge(data, with_classes: bool, components: int = 24):
    """A judge that has principal components for features, and a support vector machine or nothing for the labels."""
    with needs("judging images needs"):
        from sklearn.decomposition import PCA
        from sklearn.svm import SVC

    train = flat(data.to_model(data.x))
    most = len(data.held_x) - 1 if len(data.held_x) > 1 else len(train) - 1
    pca = PCA(min(components, *train.shape, most), random_state=0).fit(train)
    machine = SVC(C=10, gamma="scale").fit(train, data.labels) if with_classes else None

    def judge(images):
        points = flat(data.to_model(images))
        return None if machine is None else machine.predict(points), pca.transform(points)

    return judge


def pick(size: int, num: int, seed: int) -> np.ndarray:
    """Rows of a set of `size`, `num` of them or all, drawn without replacement: sets may be sorted by class."""
    return np.random.default_rng(seed).permutation(size)[:num]


def flat(images) -> np.ndarray:
    """The numbers of each image in one row."""
    return np.asarray(images, np.float64).reshape(len(images), -1)


# -------------------------------------------------------------------- planes


def check_plane(config: configs.Config) -> None:
    """Raise ConfigError unless the data set can make fresh points."""
    if config.data.name not in ("scurve", "moons", "circles", "swiss_roll"):
        raise configs.ConfigError(f"data set {config.data.name!r} cannot make fresh points to compare with")


def plane_line(x, config: configs.Config) -> str:
    """What is measured of points, in words."""
    args = [config.data.args | dict(n=len(x), seed=1000 + i) for i in range(FRESH_SETS)]
    fresh = [load(config.data.name, **one).x for one in args]
    between = np.mean([metrics.sliced_wasserstein(p, q) for i, p in enumerate(fresh) for q in fresh[:i]])
    ours = np.mean([metrics.sliced_wasserstein(x, p) for p in fresh])
    return f"sliced W2 to fresh points {ours:.5f}, between fresh sets {between:.5f}, ratio {ours / between:.2f}"


if __name__ == "__main__":
    configs.run_script(main)
