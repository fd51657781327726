"""Samples of a run: the states on the way, and which settings reach the solver."""

import chex
import jax
import numpy as np
import pytest

import jdiff
from jdiff import config as configs
from jdiff import data, runs
from jdiff.config import Config, ConfigError, Named, Sample


@pytest.fixture(scope="module")
def run():
    """A run on the plane with a network of fresh parameters, whose last layer is not zero."""
    config = Config(
        name="a", data=Named("scurve", {"n": 50}), model=Named("mlp", {"features": 8, "layers": 1}),
        schedule=Named("vp"), sample=Sample(solver=Named("ddim"), steps=4, num=6),
    )  # fmt: skip
    points = data.scurve(50)
    model, regression = configs.build_model(config, 0), configs.build_regression(config)
    return runs.Run("no", config, data.facts_of(points), model, regression, configs.build_loss(config), lambda: points)


@pytest.fixture(scope="module")
def params(run):
    return jax.tree.map(lambda a: a + 0.1, run.init_params())


def test_the_path_begins_where_the_samples_began(run, params):
    """The solver is deterministic: from the first state it reaches all others, and the samples, again."""
    key, how = jax.random.key(3), run.config.sample
    x, labels, states = runs.draw(run, params, key, 6, how, batch=4, path=True)
    solver, times = configs.build_sampler(how, run.schedule)
    assert labels is None
    chex.assert_shape(states, (len(times), 6, 2))
    denoise = runs.make_denoiser(run, params, None, how)
    again, path = jdiff.sample(solver, denoise, run.schedule, states[0], times, path=True)
    chex.assert_trees_all_close((np.asarray(again), np.asarray(path)), (x, states[1:]), rtol=1e-5, atol=1e-6)
    assert 0.5 < states[0].std() < 1.5  # N(0, 1): of the prior, not of the data, whose deviation is below 0.2


def test_sample_i_does_not_depend_on_how_many_are_drawn(run, params):
    key, how = jax.random.key(3), run.config.sample
    many, _ = runs.draw(run, params, key, 6, how, batch=4)
    few, _ = runs.draw(run, params, key, 2, how)
    chex.assert_trees_all_close(few, many[:2], rtol=1e-5, atol=1e-6)


def test_what_a_run_without_classes_refuses(run, params):
    key = jax.random.key(0)
    with pytest.raises(ConfigError, match="this run has no classes"):
        runs.draw(run, params, key, 2, run.config.sample, [1])
    with pytest.raises(ConfigError, match="guidance 2.* needs classes"):
        runs.draw(run, params, key, 2, Sample(guidance=2.0))
