"""The program of a user, `user_script.py`: it runs, and two type checkers find nothing wrong in it."""

import json
import subprocess
import sys
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
import user_script
from mypy import api

import jdiff

HERE = Path(__file__).parent
SCRIPT, ROOT = HERE / "user_script.py", HERE.parent.parent


@pytest.mark.slow
def test_it_runs():
    """The loss falls from 0.5, that of a network that returns 0; with nothing left out, its solver is DDIM."""
    out = user_script.main()
    assert np.mean(out["losses"][-50:]) < 0.4
    assert out["path"].shape == (4, 8, 2)
    chex.assert_tree_all_finite(out)
    schedule, x = user_script.Power(), np.linspace(-1, 1, 6, dtype=np.float32).reshape(3, 2)
    denoise, times = jdiff.oracle.Gaussian([0.5, 0.0], np.eye(2)).denoise(schedule), jdiff.grid.uniform(5)
    run = jax.jit(lambda solver: jdiff.sample(solver, user_script.Shrunk(denoise), schedule, x, times))
    np.testing.assert_allclose(run(user_script.Bridge()), run(jdiff.solvers.DDIM()), rtol=1e-4, atol=1e-5)
    by_numbers = ((run(user_script.Bridge(0.21)) ** 2).sum() - (run(user_script.Bridge(0.19)) ** 2).sum()) / 0.02
    slope = jax.grad(lambda solver: (run(solver) ** 2).sum())(user_script.Bridge(0.2)).left_out
    np.testing.assert_allclose(slope, by_numbers, rtol=1e-2)


@pytest.mark.slow
def test_mypy_finds_nothing_wrong():
    strict = ["--strict", "--no-warn-return-any"]  # `denoise.schedule` is Any
    out, errors, status = api.run(["--config-file", str(ROOT / "pyproject.toml"), *strict, str(SCRIPT)])
    assert status == 0, out + errors


WRONG = {
    "jdiff.sample(solver, denoise,": "jdiff.sample(denoise, solver,",  # arguments exchanged
    "Power().replace(power=2.0)": "jdiff.VP().powers",  # no such attribute
    "last, path = ": "last, path, more = ",  # sample(path=True) returns two arrays
    "trained, losses = train(schedule, target": "trained, losses = train(schedule, schedule",
}


@pytest.mark.slow
def test_pyright_finds_nothing_wrong_but_what_is(tmp_path):
    """As its users get it, with nobody's settings: all files in one run."""
    pytest.importorskip("pyright")
    (tmp_path / "pyrightconfig.json").write_text(json.dumps({"extraPaths": [str(ROOT)]}))
    text = SCRIPT.read_text()
    (tmp_path / "right.py").write_text(text)
    for i, (right, wrong) in enumerate(WRONG.items()):
        assert right in text
        (tmp_path / f"wrong_{i}.py").write_text(text.replace(right, wrong, 1))
    command = [sys.executable, "-m", "pyright", "--outputjson", "--pythonpath", sys.executable, str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=tmp_path)
    found = json.loads(done.stdout)["generalDiagnostics"]
    errors = {(Path(d["file"]).stem, d["range"]["start"]["line"]) for d in found}
    expected = {(f"wrong_{i}", text[: text.index(right)].count("\n")) for i, right in enumerate(WRONG)}
    assert expected <= errors and not any(name == "right" for name, _ in errors), found
