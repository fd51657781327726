"""The search of hyper-parameters: ranges, the grid around the best, and what a run was worth."""

import json
import math
from pathlib import Path

import numpy as np
import pytest

from jdiff import config as configs
from jdiff.runs.search import Choices, Range, parse_space, read_metric

CONFIG = Path(__file__).parents[2] / "configs" / "scurve.py"
LR, BATCH = "train.lr=1e-5:1e-1:log", "train.batch=64,128"


def test_read_metric(tmp_path):
    path = tmp_path / "metrics.jsonl"

    def given(*entries):
        path.write_text("".join(json.dumps(dict(step=step, loss=loss, fid=1.0)) + "\n" for step, loss in entries))
        return read_metric(path, "loss")

    assert given((100, 9.0), (900, 8.0), (950, 2.0), (1000, 1.0)) == (1.5, None)
    assert given((7, 3.0)) == (3.0, None)
    assert given((90, 1.0), (100, math.nan)) == (None, "loss is nan")
    assert given() == (None, "metrics.jsonl is empty")
    given((100, 1.0))
    assert read_metric(path, "fid") == (1.0, None)
    value, error = read_metric(path, "accuracy")
    assert value is None and "no 'accuracy' in metrics.jsonl" in error and "it has loss, fid" in error
    assert "cannot be read" in read_metric(tmp_path / "none", "loss")[1]
    given((90, 1.0), (100, 2.0))
    path.write_bytes(b'{"step": \xff}\n' + path.read_bytes())  # one damaged line costs no trial
    assert read_metric(path, "loss") == (2.0, None)


def test_parse_space():
    config = configs.load_config(CONFIG)
    texts = [LR, BATCH, "train.steps=10:1000:log", "train.warmup_steps=0:50", "train.clip=1:10", "seed=1,2,3"]
    assert parse_space(texts, config) == {
        "train.lr": Range(1e-5, 1e-1, log=True),
        "train.batch": Choices(("64", "128")),
        "train.steps": Range(10, 1000, log=True, whole=True),
        "train.warmup_steps": Range(0, 50, whole=True),
        "train.clip": Range(1, 10),  # a number that is not whole in the config
        "seed": Choices(("1", "2", "3")),
    }


@pytest.mark.parametrize(
    "texts,message",
    [
        ([], "nothing to search"),
        (["train.lr"], "expected SETTING=LOW:HIGH"),
        (["train.lr="], "expected SETTING=LOW:HIGH"),
        (["train.rl=1:2"], r"no setting 'train.rl' \(did you mean 'train.lr'\?\)"),
        ([LR, LR], "train.lr is given twice"),
        (["train.lr=1e-3"], "two different values or more, or a range"),
        (["train.lr=1,1"], "two different values"),
        (["train.lr=1,"], "two different values"),
        (["train.lr=a:b"], "expected two numbers"),
        (["train.lr=1:2:3"], "expected two numbers"),
        (["train.lr=1:log"], "expected two numbers"),
        (["train.lr=2:1"], "LOW below HIGH"),
        (["train.lr=1:inf"], "both finite"),
        (["train.lr=0:1:log"], "begins above 0"),
        (["train.batch=0.5:8"], "whole number, and so must both ends be"),
    ],
)
def test_errors_of_ranges(texts, message):
    with pytest.raises(configs.ConfigError, match=message):
        parse_space(texts, configs.load_config(CONFIG))


def test_grid_around_the_best():
    np.testing.assert_allclose(Range(0.0, 8.0).around(4.0, 4, 1, 2), [3, 5])
    np.testing.assert_allclose(Range(0.0, 8.0).around(4.0, 4, 1, 3), [3, 4, 5])
    np.testing.assert_allclose(Range(0.0, 8.0).around(4.0, 4, 2, 2), [2, 6])  # two ranges: 2 points along each
    np.testing.assert_allclose(Range(0.0, 8.0).around(7.5, 4, 1, 3), [6.5, 7.5, 8])
    np.testing.assert_allclose(Range(1e-4, 1.0, log=True).around(1e-2, 4, 1, 3), [10**-2.5, 1e-2, 10**-1.5])
    assert Range(1, 4, whole=True).around(2, 4, 1, 3) == [2]  # nothing in between
    assert Range(16, 256, log=True, whole=True).around(64, 4, 1, 2) == [45, 91]
    assert Choices(("a", "b")).around("b", 4, 1, 3) == ["b"]
