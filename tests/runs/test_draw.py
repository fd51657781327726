"""Samples of a run: the states on the way, and which settings reach the solver."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import config as configs
from jdiff import data, guidance, runs
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


# ---------------------------------------------------------------- guidance by settings


@pytest.fixture(scope="module")
def classes(tmp_path_factory):
    """(a run on digits with a small DiT, parameters that are not zero)."""
    config = Config(
        name="b", data=Named("digits"), model=Named("dit_small", {"width": 16, "depth": 2, "heads": 2, "patch": 2}),
        schedule=Named("vp"),
    )  # fmt: skip
    digits = data.digits()
    model, regression = configs.build_model(config, 10), configs.build_regression(config)
    run = runs.Run("no", config, data.facts_of(digits), model, regression, configs.build_loss(config), lambda: digits)
    rng = np.random.default_rng(0)
    return run, jax.tree.map(lambda a: a + 0.2 * rng.normal(size=a.shape).astype(a.dtype), run.init_params())


def test_each_guide_is_its_function(classes):
    """The settings of a sampling make the denoiser that the functions of jdiff.guidance make, in the order given."""
    run, params = classes
    labels, x = jnp.array([3, 7]), jax.random.normal(jax.random.key(0), (2, 8, 8, 1))
    # the network of this run, of a class and of none, and two worse ones
    none = jnp.full_like(labels, 10)
    c, u = (runs.make_denoiser(run, params, cond, Sample()) for cond in (labels, none))
    worse = {name: c.replace(apply=run.model.clone(**{name: (1,)}).apply) for name in ("perturbed", "skipped")}
    w, cfg = 3.0, guidance.cfg(c, u, 3.0)
    made = {
        "none": (Sample(), c),
        "cfg": (Sample(guidance=w), cfg),
        "negative": (Sample(guidance=-1.0), guidance.cfg(c, u, -1.0)),
        "batched": (Sample(guidance=w, guide=Named("cfg", {"batched": True})), cfg),
        "apg": (Sample(guidance=w, guide=Named("apg", {"limit": 2.5})), guidance.apg(c, u, w, limit=2.5)),
        "cfg_pp": (Sample(guidance=0.5, guide=Named("cfg_pp")), guidance.cfg_pp(c, u, 0.5)),
        "tcfg": (Sample(guidance=w, guide=Named("tcfg")), guidance.tcfg(c, u, w)),
        "zero_star": (
            Sample(guidance=w, guide=Named("zero_star", {"zero_above": 0.5})),
            guidance.zero_star(c, u, w, zero_above=0.5),
        ),
        "perturbed": (Sample(guidance=w, guide=Named("perturbed", {"at": 1})), guidance.cfg(c, worse["perturbed"], w)),
        "skipped": (Sample(guidance=w, guide=Named("skipped", {"at": (1,)})), guidance.cfg(c, worse["skipped"], w)),
        "all": (
            Sample(guidance=w, rescale=0.7, interval=(0.1, 1.0), clip=0.5),
            guidance.threshold(
                guidance.interval(guidance.rescale(cfg, c, 0.7), c, 0.1, 1.0), run.schedule, 0.5
            ),
        ),
        "outside": (Sample(guidance=w, interval=(5.0, 9.0)), c),
    }  # fmt: skip

    @jax.jit
    def both(t):
        return {name: [one.predict(x, t)[:2] for one in (runs.make_denoiser(run, params, labels, how), expected)]
                for name, (how, expected) in made.items()}  # fmt: skip

    found = both(jnp.float32(0.3))
    for name, (ours, theirs) in found.items():
        chex.assert_trees_all_close(ours, theirs, rtol=1e-5, atol=1e-5, custom_message=name)
    apart = ("none", "cfg", "negative", "apg", "cfg_pp", "tcfg", "zero_star", "perturbed", "skipped", "all")
    for i, name in enumerate(apart):
        for other in apart[:i]:
            assert np.abs(np.asarray(found[name][0][0] - found[other][0][0])).max() > 1e-3, (name, other)


def test_what_guides_refuse(classes, run):
    digits, weights = classes
    for who, how, text in (
        (digits, Sample(guidance=2.0, guide=Named("agp")), r"unknown guide 'agp' \(did you mean 'apg'\?\)"),
        (digits, Sample(guidance=2.0, guide=Named("apg", {"momentum": -2.0})), "momentum must be above -1"),
        (digits, Sample(guidance=2.0, guide=Named("cfg_pp"), solver=Named("ddim")), "w must be from 0 to 1; got 2"),
        (digits, Sample(guidance=0.5, guide=Named("cfg_pp")), "would lose a half of CFG"),
        (digits, Sample(guidance=2.0, guide=Named("perturbed")), "'perturbed' needs the argument 'at'"),
        (digits, Sample(guidance=2.0, guide=Named("perturbed", {"at": 7})), "7"),
        (digits, Sample(guidance=2.0, guide=Named("autoguidance", {"run": "nowhere"})), "nowhere is no run directory"),
        (digits, Sample(guidance=2.0, guide=Named("cfg", {"batched": True}), cache=2), "choose one of them"),
        (run, Sample(guidance=2.0, guide=Named("apg")), "guidance 2 needs classes"),
        (run, Sample(guide=Named("cfg_pp")), "guidance 1 needs classes"),
        (run, Sample(guidance=2.0, guide=Named("perturbed", {"at": 1})), "model 'mlp' has no such parts"),
    ):
        with pytest.raises(ConfigError, match=text) as caught:
            runs.draw(who, weights if who is digits else run.init_params(), jax.random.key(0), 2, how)
        assert "\n" not in str(caught.value)
