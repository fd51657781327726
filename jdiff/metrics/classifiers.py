"""What classifiers say of samples: the Inception score, and whether one can tell samples from data."""

import numpy as np

from jdiff.core.extras import needs
from jdiff.metrics.distances import Estimate
from jdiff.metrics.points import at_least, pair, whole


def inception_score(probabilities, splits: int = 10) -> Estimate:
    """exp E KL(p(y | x) | p(y)): high where each image is surely of one class, and all classes occur.

    No real images go into it.

    Args:
        probabilities: of the classes for each image, (N, classes), in an order that is as good as random.
        splits: how many parts the images are divided into, each with its own p(y).

    Returns:
        (the mean over parts, their standard deviation).

    Raises:
        ValueError: for rows that are no probabilities, or more parts than images.

    Reference:
        Salimans et al. 2016, arXiv:1606.03498, section 4.
    """
    p = np.asarray(probabilities, np.float64)
    if p.ndim != 2 or not len(p) or not (p >= 0).all() or not (np.abs(p.sum(1) - 1) < 1e-3).all():
        raise ValueError(f"inception_score: expected probabilities (N, classes) whose rows sum to 1, got {p.shape}")
    splits = whole("inception_score", "splits", splits, 1, len(p))
    scores = []
    for part in np.array_split(p, splits):
        log_ratio = np.log(np.maximum(part, 1e-300)) - np.log(np.maximum(part.mean(0), 1e-300))
        scores.append(np.exp((part * log_ratio).sum(1).mean()))
    return Estimate(float(np.mean(scores)), float(np.std(scores)))


def classifier_two_sample(a, b, *, folds: int = 5, seed: int = 0) -> Estimate:
    """How often a small network that learns to tell two sets apart is right: 0.5 where it cannot, up to 1.

    The network has two hidden layers. Each point is judged by one that was trained on other folds. As many points
    are taken of each set as the smaller one has.

    Args:
        a: points, (N, D).
        b: points, (M, D).
        folds: how many networks are trained.
        seed: the seed of folds and networks.

    Returns:
        (the mean accuracy of the folds, their standard deviation).

    Raises:
        ValueError: for other shapes, and more folds than points.
        MissingExtra: scikit-learn is not installed.

    Reference:
        Lopez-Paz & Oquab 2017, arXiv:1610.06545, section 3.
    """
    a, b = pair(a, b, "classifier_two_sample")
    folds = whole("classifier_two_sample", "folds", folds, 2)
    at_least("classifier_two_sample", folds, a=a, b=b)
    with needs("classifier_two_sample needs"):
        from sklearn.model_selection import StratifiedKFold, cross_val_score
        from sklearn.neural_network import MLPClassifier
        from sklearn.pipeline import make_pipeline
        from sklearn.preprocessing import StandardScaler

    n, random = min(len(a), len(b)), np.random.default_rng(seed)
    x = np.concatenate([points[random.permutation(len(points))[:n]] for points in (a, b)])
    width = min(10 * x.shape[1], 256)
    network = MLPClassifier((width, width), early_stopping=n >= 100, max_iter=500, random_state=seed)
    parts = StratifiedKFold(folds, shuffle=True, random_state=seed)
    scores = cross_val_score(make_pipeline(StandardScaler(), network), x, np.repeat([0, 1], n), cv=parts)
    return Estimate(float(scores.mean()), float(scores.std()))
