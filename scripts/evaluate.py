"""Measure a trained run: `python scripts/evaluate.py RUN_DIR [--num 500 --guidance 1 2 ...]`.

Images with classes: how often a classifier trained on the real training split assigns the asked label; the Frechet
distance in 24 principal components against held-out images, over that of the training images; the median distance
to the nearest training image, over that of held-out images. Planes: sliced Wasserstein-2 to fresh points, over the
distance between two fresh sets.
"""

import dataclasses
import sys
from typing import Annotated

import jax
import numpy as np
import tyro

from jdiff import checkpoint, metrics, runs
from jdiff import config as configs
from jdiff.data import scurve_points

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
    train, held = (flat(data.to_model(images)) for images in (data.x, data.held_x))
    judge, accuracy = classifier(train, data.labels, held, data.held_labels)
    print(f"step {step:,}; classifier on real held-out images: {accuracy:.1%}")
    for w in a.guidance:
        x, labels = runs.draw(run, params, key, a.num, dataclasses.replace(run.config.sample, guidance=w))
        x = flat(data.to_model(data.to_data(x)))
        ratio, near = image_ratios(x, train, held)
        right = float(np.mean(judge(x) == labels))
        print(f"guidance {w:g}: as asked {right:.1%}, Frechet ratio {ratio:.2f}, nearest-neighbour ratio {near:.2f}")
    return 0


def flat(images) -> np.ndarray:
    return np.asarray(images, np.float64).reshape(len(images), -1)


def classifier(x, labels, held, held_labels):
    """(x -> labels, held-out accuracy) of a support vector machine."""
    from sklearn.svm import SVC

    machine = SVC(C=10, gamma="scale").fit(x, labels)
    return machine.predict, float(machine.score(held, held_labels))


def image_ratios(x, train, held, components: int = 24) -> tuple[float, float]:
    """(Frechet distance to held-out over the training set's, median nearest distance over the held-out's)."""
    from sklearn.decomposition import PCA

    pca = PCA(components, random_state=0).fit(train)
    ours, theirs = (metrics.frechet(pca.transform(s), pca.transform(held)) for s in (x, train))
    near = [np.median(metrics.nearest_distance(s, train)) for s in (x, held)]
    return ours / theirs, float(near[0] / near[1])


def plane_line(x, config) -> str:
    fresh = [scurve_points(len(x), 1000 + i, config.data.args.get("noise", 0.1)) for i in range(FRESH_SETS)]
    between = np.mean([metrics.sliced_wasserstein(p, q) for i, p in enumerate(fresh) for q in fresh[:i]])
    ours = np.mean([metrics.sliced_wasserstein(x, p) for p in fresh])
    return f"sliced W2 to fresh points {ours:.5f}, between fresh sets {between:.5f}, ratio {ours / between:.2f}"


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except (configs.ConfigError, checkpoint.CheckpointError, OSError) as error:
        configs.fail(error)
