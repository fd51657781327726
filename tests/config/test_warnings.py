"""Warnings of a command: one line each, and none of what libraries will drop one day."""

import os
import warnings

import pytest

from jdiff import config as configs
from jdiff.train.checkpoint import CheckpointWarning


def test_a_warning_is_one_line(capsys):
    def main(words):
        warnings.warn("the first\n  of two lines", stacklevel=1)
        warnings.warn("will be dropped", DeprecationWarning, stacklevel=1)
        for _ in range(2):  # each is told, also where the text is the same
            warnings.warn("checkpoint 3 is damaged", CheckpointWarning, stacklevel=1)
        return 3

    before = warnings.showwarning, list(warnings.filters)
    with pytest.raises(SystemExit) as stop:
        configs.run_script(main, words=[])
    assert stop.value.code == 3 and (warnings.showwarning, list(warnings.filters)) == before
    assert capsys.readouterr().err.splitlines() == [
        "warning: the first of two lines", "warning: checkpoint 3 is damaged", "warning: checkpoint 3 is damaged",
    ]  # fmt: skip


def test_what_is_wrong_comes_after_the_warnings(capsys):
    def main(words):
        warnings.warn("take care", stacklevel=1)
        raise configs.ConfigError("no")

    before = warnings.showwarning
    with pytest.raises(SystemExit) as stop:
        configs.run_script(main, words=[])
    assert stop.value.code == 2 and warnings.showwarning is before
    assert capsys.readouterr().err == f"warning: take care{os.linesep}error: no{os.linesep}"


def test_of_several_processes_only_the_first_tells_of_checkpoints(capsys, monkeypatch):
    def main(words):
        warnings.warn("checkpoint 3 is damaged", CheckpointWarning, stacklevel=1)
        warnings.warn("of this process", stacklevel=1)
        return 0

    monkeypatch.setattr(configs.cli.jax, "process_index", lambda: 1)
    with pytest.raises(SystemExit):
        configs.run_script(main, words=[])
    assert capsys.readouterr().err == "warning: of this process\n"
