"""Each metric moves the right way: under noise, blur, lost classes and memorised images. Real digits, no training."""

import functools

import numpy as np
import pytest

from jdiff import metrics


@functools.cache
def digits():
    """{what was done: points}: two halves of the digits, and what a bad model would make of the second."""
    from sklearn.datasets import load_digits

    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(images))[:1600]
    images, labels = images[order].reshape(-1, 8, 8) / 16, labels[order]
    real, held, of = images[:800], images[800:], labels[800:]
    blurred = sum(np.roll(held, shift, axis) for axis in (1, 2) for shift in (-1, 0, 1)) / 6
    few = held[of < 4]
    fakes = {
        "held": held,
        "noise": held + 0.5 * np.random.default_rng(1).normal(size=held.shape),
        "blur": blurred,
        "dropped": few[np.arange(len(held)) % len(few)] + 1e-3 * np.random.default_rng(2).normal(size=held.shape),
        "memorised": real[::-1],
    }
    return real.reshape(800, -1), {name: a.reshape(800, -1) for name, a in fakes.items()}


DISTANCES = {
    "frechet": metrics.frechet,
    "kernel_distance": lambda a, b: metrics.kernel_distance(a, b, subsets=10).value,
    "mmd": metrics.mmd,
    "energy_distance": metrics.energy_distance,
    "sliced_wasserstein": metrics.sliced_wasserstein,
}


@pytest.mark.parametrize("name", DISTANCES)
def test_distances(name):
    """Each is far above that of held-out images. Memorised images are nearer than these: no distance tells on them."""
    real, fakes = digits()
    found = {done: DISTANCES[name](real, fake) for done, fake in fakes.items()}
    for done in ("noise", "blur", "dropped"):
        assert found[done] > 2 * max(found["held"], 0), found
        assert found[done] > found["held"] + 5e-4, found
    assert found["memorised"] <= found["held"] + 1e-9, found


def test_neighbours():
    """Noise costs precision, blur and lost classes cost recall, all cost coverage; memorised images lose nothing."""
    real, fakes = digits()
    found = {
        done: (*metrics.precision_recall(real, fake), *metrics.density_coverage(real, fake))
        for done, fake in fakes.items()
    }
    precision, recall, density, coverage = range(4)
    held = found["held"]
    for done in ("noise", "blur", "dropped"):
        assert found[done][coverage] < 0.7 * held[coverage], found
    assert found["noise"][precision] < 0.1 * held[precision] and found["noise"][density] < 0.1 * held[density], found
    assert found["blur"][precision] < 0.9 * held[precision] and found["blur"][recall] < 0.1 * held[recall], found
    assert found["dropped"][recall] < 0.7 * held[recall], found
    assert found["dropped"][precision] > 0.9 * held[precision], found
    assert found["memorised"] == (1, 1, pytest.approx(found["memorised"][density]), 1), found


def test_the_nearest_neighbour_tells_on_copies():
    real, fakes = digits()
    near = {done: np.median(metrics.nearest_distance(fake, real)) for done, fake in fakes.items()}
    assert near["memorised"] < 1e-6 and near["noise"] > near["held"] > 0.5, near


@pytest.mark.slow
def test_a_classifier_tells_them_apart():
    real, fakes = digits()
    right = {done: metrics.classifier_two_sample(real[:400], fake[:400], folds=2).value for done, fake in fakes.items()}
    assert abs(right["held"] - 0.5) < 0.08 and right["memorised"] < 0.58, right
    assert right["noise"] > 0.9 and right["blur"] > 0.9 and right["dropped"] > 0.6, right


def test_inception_score():
    """Sharper classes score higher, lost ones lower; of copies it knows nothing."""
    random = np.random.default_rng(0)
    classes = np.eye(10)[random.integers(0, 10, 2000)]
    sure = 0.95 * classes + 0.005
    blurred = 0.5 * classes + 0.05
    few = sure[classes[:, :4].any(1)]
    score = {name: metrics.inception_score(p, 5).value for name, p in dict(sure=sure, blur=blurred, few=few).items()}
    assert score["sure"] > 1.5 * score["blur"] and score["sure"] > 1.5 * score["few"], score
