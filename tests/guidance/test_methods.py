"""Every method against a closed form, on labelled mixtures of Gaussians in float64: all schedules by one program."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, OneOf

import jdiff
from jdiff import guidance, targets
from jdiff.core.pytrees import noun

TARGETS = {"x0": None, "eps": targets.Eps(), "v": targets.V(), "velocity": targets.Velocity(), "edm": targets.EDM()}


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def data():
    """Two classes of two Gaussians each: (all of it, the class 0, the class 1)."""
    weights = np.array([0.1, 0.3, 0.4, 0.2])
    means = np.array([[0.8, -0.5], [-0.6, 0.7], [0.4, 0.9], [-1.0, -0.3]])
    covariances = np.array(
        [[[0.4, 0.1], [0.1, 0.3]], [[0.3, -0.1], [-0.1, 0.5]], [[0.2, 0.0], [0.0, 0.6]], [[0.5, 0.2], [0.2, 0.4]]]
    )
    mixture = jdiff.oracle.GaussianMixture
    return tuple(mixture(weights[k], means[k], covariances[k]) for k in (slice(None), slice(0, 2), slice(2, 4)))


def at(name):
    schedule = OneOf(tuple(MORE_SCHEDULES.values()), list(MORE_SCHEDULES).index(name))
    x = np.asarray(jax.random.normal(jax.random.key(0), (4, 2))) * float(schedule.sigma(0.6) + schedule.alpha(0.6))
    return schedule, x


@noun
class Bayes:
    """log p(y | x_t) of a class: what a perfect classifier of noisy data says."""

    of_class: jdiff.oracle.GaussianMixture
    of_all: jdiff.oracle.GaussianMixture
    schedule: jdiff.Schedule

    def __call__(self, x, t):
        return self.of_class.log_prob(self.schedule, x, t) - self.of_all.log_prob(self.schedule, x, t)


@noun
class Known(jdiff.Denoise):
    """What a denoiser says at one (x, t), evaluated once for all methods."""

    schedule: jdiff.Schedule
    prediction: jdiff.Prediction

    def predict(self, x, t):
        return self.prediction


def dot(a, b):
    return (a * b).sum(-1, keepdims=True)


@jax.jit
def everything(schedule, x, t, w):
    """{name: (what a method gives, what it should give)}, in x_0 and in eps."""
    everyone, first, second = data()
    mixtures = [mixture.denoise(schedule).predict(x, t) for mixture in (everyone, first, second)]
    u, c, d = (Known(schedule, prediction) for prediction in mixtures)
    x_u, x_c, x_d = (prediction.x0 for prediction in mixtures)
    noise = functools.partial(jdiff.eps_from, schedule, x=x, t=t)
    alpha, sigma = schedule.alpha(t), schedule.sigma(t)
    bayes = Bayes(first, everyone, schedule)
    guided = x_u + w * (x_c - x_u)
    out = {
        "cfg": (guidance.cfg(c, u, w), guided),
        "autoguidance": (guidance.autoguidance(c, u, w), guided),
        "autoguidance by itself": (guidance.autoguidance(c, c, w), x_c),
        "compose of one": (guidance.compose(u, [(c, w)]), guided),
        "compose of none": (guidance.compose(u, []), x_u),
        "compose": (guidance.compose(u, [(c, w), (d, -0.5)]), guided - 0.5 * (x_d - x_u)),
        "classifier is cfg": (guidance.classifier(u, bayes, w), guided),
        "classifier at 1": (guidance.classifier(u, bayes, 1.0), x_c),
        "classifier of nothing": (guidance.classifier(u, bayes, 0.0), x_u),
        "apg is cfg": (guidance.apg(c, u, w, parallel=1.0), guided),
        "apg of a wide limit": (guidance.apg(c, u, w, parallel=1.0, limit=1e6), guided),
        "rescale by 0": (guidance.rescale(guidance.cfg(c, u, w), c, 0.0), guided),
        "interval": (guidance.interval(guidance.cfg(c, u, w), c, 0.0, jnp.inf), guided),
        "cached": (guidance.cfg(c, guidance.cached(u, 2), w), guided),
        "tcfg at 1": (guidance.tcfg(c, u, 1.0), x_c),
        "zero star at 1": (guidance.zero_star(c, u, 1.0), x_c),
    }
    pairs = {name: (made.predict(x, t)[:2], (x0, noise(x0))) for name, (made, x0) in out.items()}

    # the score of a product of densities, of which nothing here is a denoiser
    scores = [m.score(schedule, x, t) for m in (everyone, first, second)]
    product = scores[0] + w * (scores[1] - scores[0]) - 0.5 * (scores[2] - scores[0])
    pairs["score of a product"] = jdiff.sde.score(out["compose"][0], schedule, x, t) * sigma, product * sigma

    plus = guidance.cfg_pp(c, u, w / 4).predict(x, t)
    pairs["cfg++"] = plus[:2], (x_u + w / 4 * (x_c - x_u), noise(x_u))

    for name, target in TARGETS.items():
        value = (lambda x0: x0) if target is None else (lambda x0, k=target: targets.aim(schedule, k, x0, noise(x0), t))
        a, b = value(x_c), value(x_u)
        made = {
            "apg": guidance.apg(c, u, w, target=target),
            "apg, parallel": guidance.apg(c, u, w, parallel=0.3, limit=0.05, target=target),
            "rescale": guidance.rescale(guidance.cfg(c, u, w), c, 0.7, target),
            "zero star": guidance.zero_star(c, u, w, target=target),
            "tcfg": guidance.tcfg(c, u, w, target=target),
        }
        difference, along = a - b, dot(a - b, a) / dot(a, a) * a
        size = jnp.sqrt(dot(difference, difference))
        limited = (difference - 0.7 * along) * jnp.minimum(1, 0.05 / size)
        plain = b + w * (a - b)
        best = dot(a, b) / dot(b, b) * b
        _, _, right = jnp.linalg.svd(jnp.stack([a, b], 1))
        common = dot(b, right[:, 0]) * right[:, 0]
        expected = {
            "apg": a + (w - 1) * (difference - along),
            "apg, parallel": a + (w - 1) * limited,
            "rescale": 0.3 * plain + 0.7 * plain * a.std(1, keepdims=True) / plain.std(1, keepdims=True),
            "zero star": best + w * (a - best),
            "tcfg": common + w * (a - common),
        }
        for method, denoise in made.items():
            x0, eps, _ = denoise.predict(x, t)
            got = x0 if target is None else targets.aim(schedule, target, x0, eps, t)
            pairs[f"{method} in {name}"] = got, expected[method]
            pairs[f"{method} in {name}, x_t"] = alpha * x0 + sigma * eps, x
    change = guidance.apg(c, u, w)(x, t) - x_c
    pairs["apg is orthogonal"] = dot(change, x_c) / jnp.sqrt(dot(change, change) * dot(x_c, x_c)), jnp.zeros((4, 1))
    return pairs


@pytest.mark.parametrize("name", MORE_SCHEDULES)
def test_every_method_is_its_closed_form(name):
    schedule, x = at(name)
    for t, w in ((0.5, 3.0), (0.8, 1.5)):
        for method, (got, expected) in everything(schedule, x, t * schedule.t_max, w).items():
            scale = max(1, max(float(np.abs(a).max()) for a in jax.tree.leaves(expected)))
            chex.assert_trees_all_close(got, expected, rtol=1e-8, atol=1e-8 * scale, custom_message=method)
