"""Every config of the project: reloadable, and its parts fit, on a set of the shape of its own."""

import dataclasses
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from helpers import Diagonal

import jdiff
from jdiff import config as configs
from jdiff import data, runs

CONFIGS = sorted((Path(__file__).parents[2] / "configs").glob("*.py"))
SHAPES = {
    "mnist": (28, 28, 1), "fashion_mnist": (28, 28, 1), "cifar10": (32, 32, 3), "tfds": (64, 64, 3),
    "celeba": (64, 64, 3), "imagenet64": (64, 64, 3), "folder": (64, 64, 3),
}  # fmt: skip
CLASSES = {"mnist": 10, "fashion_mnist": 10, "cifar10": 10, "tfds": 10, "imagenet64": 1000}


def rehearsed(config, monkeypatch):
    """The run of a config on black images, after its parts were traced together."""
    name = config.data.name
    if name in SHAPES:
        x, classes = np.zeros((4, *SHAPES[name]), np.uint8), CLASSES.get(name, 0)
        labels = np.zeros(4, np.int32) if classes else None
        monkeypatch.setattr(configs, "build_data", lambda _: data.Dataset(name, x, labels, x, labels, classes))
    config = dataclasses.replace(config, train=dataclasses.replace(config.train, batch=2))
    run = runs.build("nowhere", config)
    runs.rehearse(run)
    return run


@pytest.mark.parametrize(
    "path",
    [pytest.param(p, marks=pytest.mark.slow if "cifar" in p.stem or "64" in p.stem else ()) for p in CONFIGS],
    ids=lambda path: path.stem,
)
def test_the_parts_fit(path, monkeypatch):
    config = configs.load_config(path)
    assert configs.from_json(configs.to_json(config)) == config and config.name == path.stem
    run = rehearsed(config, monkeypatch)
    assert run.dataset.classes == getattr(run.model, "num_classes", 0)


SMALL = """
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="a", data=Named("digits"), model=Named("unet_digits", {"channels": 8}),
    schedule=Named("discrete", {"table": "cosine", "T": 100}), levels=Named("knots", {"T": 100}),
)
"""


@pytest.mark.parametrize(
    "changes,text",
    [
        (dict(model=("unet_digits", {"multipliers": (1, 2, 2, 2, 2)})), "do not fit: .*multiples of 16"),
        (dict(model=("mlp", {})), "do not fit"),
        (dict(sample=("ddpm", {"variance": "learned"})), "do not fit"),
        (dict(loss=("hybrid", {}), levels=("loss_aware", {})), "with T"),
        (
            dict(loss=("hybrid", {}), levels=("uniform", {})),
            "it needs levels knots or antithetic or loss_aware, with T",
        ),
        (dict(loss=("uncertain", {})), "needs an uncertainty head"),
        (dict(levels=("knots", {"T": 50})), "levels 'knots' has T = 50, the schedule's table 100"),
        (dict(loss=("hybrid", {}), schedule=("flow", {})), "needs schedule 'discrete'"),
    ],
)
def test_parts_that_do_not_fit_are_one_line(tmp_path, monkeypatch, changes, text):
    (tmp_path / "a.py").write_text(SMALL)
    config = configs.load_config(tmp_path / "a.py")
    for field, (name, args) in changes.items():
        new = configs.Named(name, args)
        new = configs.Sample(solver=new, grid=configs.Named("discrete")) if field == "sample" else new
        config = dataclasses.replace(config, **{field: new})
    with pytest.raises(configs.ConfigError, match=text) as caught:
        rehearsed(config, monkeypatch)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("name", ["dit_small", "vit_small"])
def test_more_channels_out_or_in(tmp_path, monkeypatch, name):
    """Learned variance and an earlier estimate, together: twice the channels in, and out of the data's."""
    (tmp_path / "a.py").write_text(SMALL)
    small = dict(width=16, depth=1, heads=2, patch=4)
    config = dataclasses.replace(
        configs.load_config(tmp_path / "a.py"), model=configs.Named(name, small), loss=configs.Named("hybrid"),
        self_conditioning=0.5,
    )  # fmt: skip
    rehearsed(config, monkeypatch)
    rehearsed(dataclasses.replace(config, loss=configs.Named("denoising")), monkeypatch)


def test_a_set_without_its_labels():
    digits = data.without_labels(data.digits())
    assert digits.classes == 0 and digits.labels is None and digits.held_labels is None
    chunk = next(iter(digits.read(0, 4, [(0, 2)])))
    assert chunk.labels is None
    np.testing.assert_array_equal(chunk.x, next(iter(data.digits().read(0, 4, [(0, 2)]))).x)
    records = data.Records(
        "r", 4, (1, 1, 1), lambda rows: (np.asarray(rows, np.uint8).reshape(-1, 1, 1, 1), np.asarray(rows, np.int32)),
        lambda: (np.zeros((1, 1, 1, 1), np.uint8), np.zeros(1, np.int32)), classes=4,
    )  # fmt: skip
    bare = data.without_labels(records)
    assert bare.classes == 0 and next(iter(bare.read(0, 2, [(0, 1)]))).labels is None and bare.held_labels is None


@pytest.mark.slow
@pytest.mark.parametrize("solver", configs.SOLVERS)
def test_every_solver_on_every_grid(solver):
    """Each pair that a config can name samples N(0.3, 0.4): no sample is far from the data; one program a solver."""
    table = jdiff.discrete(jdiff.betas.linear(1000))
    x = jdiff.prior(table, jax.random.key(0), (256, 1))
    sample = jax.jit(
        chex.assert_max_traces(
            lambda solver, times, x, key: jdiff.sample(solver, Diagonal(table), table, x, times, key), n=1
        )
    )
    for grid in configs.GRIDS:
        args = dict(sigmas=[9.0, 6.0, 4.0, 2.5, 1.5, 1.0, 0.6, 0.4, 0.25, 0.15, 0.1, 0.05]) if grid == "sigmas" else {}
        how = configs.Sample(solver=configs.Named(solver), grid=configs.Named(grid, args), steps=12)
        x0 = np.asarray(sample(*configs.build_sampler(how, table), x, jax.random.key(1)))
        assert np.isfinite(x0).all() and abs(x0.mean() - 0.3) < 0.5 and 0.1 < x0.std() < 2, (grid, x0.mean(), x0.std())
