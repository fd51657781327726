"""What a run shows on its boards: each of them gets the same numbers and pictures."""

import json
import struct
import sys
import types

import chex
import numpy as np
import pytest
from fakes import fake_wandb

from jdiff.config import ConfigError
from jdiff.runs import boards, plot, watch


def events(directory):
    """The values in the event files of TensorBoard, as {(step, tag): value}."""
    from tensorboardX.proto.event_pb2 import Event

    found = {}
    for path in sorted(directory.glob("events*")):
        raw, at = path.read_bytes(), 0
        while at < len(raw):
            (length,) = struct.unpack_from("<Q", raw, at)
            event = Event.FromString(raw[at + 12 : at + 12 + length])
            at += 16 + length
            for value in event.summary.value:
                found[event.step, value.tag] = value
    return found


def test_each_board_gets_the_same(tmp_path, monkeypatch):
    """Numbers as in metrics.jsonl, the histogram, and the picture; what is not finite is no number in the JSON."""
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    log = watch.Log(
        tmp_path, 0, 20, 64,
        boards=[boards.TensorBoard(tmp_path, 0), boards.Wandb(tmp_path, "project", "run", {"seed": 3})],
    )  # fmt: skip
    log.visit(10, dict(loss=0.5, grad_norm=float("nan")), waited=0.0)
    edges, heights = np.linspace(0, 1, 4), np.array([1.0, np.nan, 2.0])
    log.histogram(10, "loss by log-SNR", edges, heights)
    plot.image_grid(tmp_path / "a.png", np.full((1, 64, 64, 3), 77, np.uint8))
    log.picture(tmp_path / "a.png", 10)
    log.rest()
    log.close()

    (entry,) = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert entry.pop("step") == 10 and entry.pop("grad_norm") is None
    shown = events(tmp_path / "tensorboard")
    chex.assert_trees_all_close({name: shown[10, name].simple_value for name in entry}, entry, rtol=1e-6)
    assert np.isnan(shown[10, "grad_norm"].simple_value)
    assert list(shown[10, "loss by log-SNR"].histo.bucket) == [1, 0, 2]
    assert (shown[10, "samples"].image.width, shown[10, "samples"].image.height) == (68, 68)

    (_, begun), *logs, finish = calls
    assert begun["project"] == "project" and begun["config"] == {"seed": 3} and finish == ("finish",)
    assert [call[:2] for call in logs] == [("log", 10)] * 3
    numbers, histogram, picture = (values for _, _, values in logs)
    assert np.isnan(numbers.pop("grad_norm")) and numbers == entry
    np.testing.assert_array_equal(histogram["loss by log-SNR"][0], [1, 0, 2])
    assert (picture["samples"][2:66, 2:66] == 77).all()


def test_a_run_that_goes_on_is_the_same_run_of_wandb(tmp_path, monkeypatch):
    calls = []
    monkeypatch.setitem(sys.modules, "wandb", fake_wandb(calls))
    for directory in (tmp_path / "a", tmp_path / "a", tmp_path / "b"):
        boards.Wandb(directory, "project", "run", {}).close()
    one, again, other = (call[1]["id"] for call in calls if call[0] == "init")
    assert one == again != other


def test_what_wandb_says_is_one_line(tmp_path, monkeypatch):
    module = types.ModuleType("wandb")

    def init(**keywords):
        raise RuntimeError("No API key configured.\nMore lines.")

    module.init, module.Settings = init, dict
    monkeypatch.setitem(sys.modules, "wandb", module)
    with pytest.raises(ConfigError, match="^--wandb project: No API key configured; or set WANDB_MODE=offline"):
        boards.Wandb(tmp_path, "project", "run", {})
