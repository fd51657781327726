"""Libraries of an extra that is not installed."""

import sys

import pytest

from jdiff import config as configs
from jdiff.core.extras import MissingExtra, needs
from jdiff.runs import boards, plot, watch


@pytest.mark.parametrize(
    "library,use,said",
    [
        ("tyro", lambda path: configs.parse(configs.Train, []), "the command line is read with tyro"),
        ("dacite", lambda path: configs.from_json("{}"), "config.json is read with dacite"),
        ("tqdm", lambda path: watch.Log(path, 0, 1, 0), "the log of a run needs tqdm"),
        ("tensorboardX", lambda path: boards.TensorBoard(path, 0), "the log of a run needs tensorboardX"),
        ("PIL", lambda path: plot.image_grid(path / "x.png", None, 1), "pictures need pillow"),
        ("matplotlib", lambda path: plot.plane_figure(path / "x.png", [], []), "figures need matplotlib"),
    ],
)
def test_one_line_names_the_extra(monkeypatch, tmp_path, library, use, said):
    for name in [name for name in sys.modules if name.split(".")[0] == library]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, library, None)
    with pytest.raises(MissingExtra) as caught:
        use(tmp_path)
    assert str(caught.value) == f"{said}: pip install 'jdiff[train]'"
    assert not list(tmp_path.iterdir())


def test_an_error_of_another_kind_is_left_alone():
    with pytest.raises(ZeroDivisionError), needs("this needs"):
        _ = 1 / 0


def test_a_script_says_it_and_ends_with_status_2(monkeypatch, capsys):
    def main(argv):
        with needs("this script needs", "sweep"):
            import optuna  # noqa: F401

    monkeypatch.setitem(sys.modules, "optuna", None)
    with pytest.raises(SystemExit) as caught:
        configs.run_script(main)
    assert caught.value.code == 2
    assert capsys.readouterr().err == "error: this script needs optuna: pip install 'jdiff[sweep]'\n"


def test_wandb_has_an_extra_of_its_own(monkeypatch):
    monkeypatch.setitem(sys.modules, "wandb", None)
    with pytest.raises(MissingExtra) as caught:
        boards.check_wandb()
    assert str(caught.value) == "--wandb needs wandb: pip install 'jdiff[wandb]'"
