"""Configs: reloadable, checked, overridable."""

import os

import pytest

from jdiff import config as configs
from jdiff.config import Config, ConfigError, Named, Train


def make(**changes):
    return Config(**dict(name="a", data=Named("digits"), model=Named("unet_digits"), schedule=Named("vp")) | changes)


def test_json_round_trip():
    config = make(model=Named("unet", {"multipliers": (1, 2), "channels": 8}), train=Train(clip=None, steps=7))
    assert configs.from_json(configs.to_json(config)) == config
    for text in ("{", "[]", '{"name": "a"}', configs.to_json(config).replace('"steps": 7', '"steps": "seven"')):
        with pytest.raises(ConfigError, match="not a config of this version"):
            configs.from_json(text)


def test_parse_and_differences():
    old = make(schedule=Named("discrete", {"T": 10}))
    new = configs.parse(Config, ["--train.steps", "5", "--schedule.args.T", "20", "--train.clip", "None"], old)
    assert configs.differences(old, new) == ["schedule.args.T", "train.steps", "train.clip"]
    assert configs.differences(old, new, ignore=("train", "schedule.args.T")) == []
    switched = configs.parse(Config, ["--schedule.name", "vp"], old)
    assert switched.schedule == Named("vp")  # the table's length is no argument of vp


def test_every_name_builds():
    for table, build in (
        ("target", "TARGETS"), ("conditioning", "CONDITIONINGS"), ("levels", "LEVELS"), ("weight", "WEIGHTS"),
        ("schedule", "SCHEDULES"),
    ):  # fmt: skip
        for name in getattr(configs, build):
            args = {"T": 10} if name in ("index", "knots", "antithetic") else {}
            configs.check(make(**{table: Named(name, args)}))
    for name in configs.SOLVERS:
        configs.check(make(sample=configs.Sample(solver=Named(name))))


def test_setting():
    assert [configs.setting(text) for text in ("order=3", "s_noise=1.003", "start=single_step")] == [
        ("order", 3), ("s_noise", 1.003), ("start", "single_step"),
    ]  # fmt: skip
    with pytest.raises(ConfigError, match="'order' is no setting; expected name=value"):
        configs.setting("order")


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(schedule=Named("vpp")), r"unknown schedule 'vpp' \(did you mean 'vp'\?\); one of vp, subvp"),
        (dict(schedule=Named("vp", {"beta_mim": 1.0})), r"'vp' has no argument 'beta_mim' \(did you mean 'beta_min'"),
        (dict(schedule=Named("vp", {"beta_min": 30.0})), "beta_min must be below beta_max"),
        (dict(schedule=Named("discrete", {"table": "quadratic"})), "unknown beta table"),
        (dict(model=Named("unett")), "unknown model"),
        (dict(data=Named("digit")), "unknown data set"),
        (dict(train=Train(optimizer=Named("adma"))), "unknown optimizer"),
        (dict(train=Train(ema=Named("constant", {"decay": 2.0}))), "decay must be in"),
        (dict(sample=configs.Sample(grid=Named("discrete"))), "needs schedule 'discrete'"),
        (dict(sample=configs.Sample(solver=Named("ddim", {"churn": 40}))), "solver 'ddim' has no argument 'churn'"),
        (dict(sample=configs.Sample(solver=Named("lms", {"order": 0}))), "solver 'lms': LMS: order must be a whole"),
        (dict(sample=configs.Sample(solver=Named("unipc", {"variant": "bh3"}))), "one of bh1, bh2"),
    ],
)
def test_wrong_names_and_numbers(change, text):
    with pytest.raises(ConfigError, match=text) as caught:
        configs.check(make(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["steps", "batch", "visit", "save_every", "keep", "lr", "threads"])
def test_numbers_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"train.{field} must be positive"):
        make(train=Train(**{field: 0}))


def test_threads_leave_the_environment_alone_unless_asked(monkeypatch):
    monkeypatch.setenv("NPROC", "outer")  # so that it is restored
    monkeypatch.delenv("NPROC")
    configs.limit_threads(make())
    assert "NPROC" not in os.environ
    for threads in (2, 1):  # the first stays
        configs.limit_threads(make(train=Train(threads=threads)))
        assert os.environ["NPROC"] == "2"


def test_load_config(tmp_path):
    for text, message in (("x = 1", "exports no config"), ("1/0", "ZeroDivisionError"), ("config = 3", "no config")):
        path = tmp_path / "c.py"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            configs.load_config(path)
