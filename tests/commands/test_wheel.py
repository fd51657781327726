"""The wheel carries the tool and the configs: what an installed `jdiff` finds, without a clone."""

import os
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
def test_wheel(tmp_path):
    pip = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(tmp_path), str(ROOT)]
    subprocess.run(pip, check=True, capture_output=True, text=True)
    (wheel,) = tmp_path.glob("jdiff-*.whl")
    with zipfile.ZipFile(wheel) as file:
        file.extractall(tmp_path / "installed")
    assert {path.name for path in (tmp_path / "installed").iterdir() if path.suffix != ".dist-info"} == {
        "jdiff", "jdiff_command.py",
    }  # fmt: skip
    env = os.environ | {"PYTHONPATH": str(tmp_path / "installed")}

    def jdiff(*words):
        command = [sys.executable, "-m", "jdiff", *words]
        return subprocess.run(command, capture_output=True, text=True, cwd=tmp_path, env=env)

    configs = sorted(path.stem for path in (ROOT / "configs").glob("*.py"))
    listed = jdiff("info", "configs").stdout.splitlines()
    assert [line for line in listed if not line.startswith(" ")] == configs
    assert "--model.args.channels" in jdiff("train", "digits", "--help").stdout
    missing = jdiff("train", "digts")
    assert missing.returncode == 2 and "did you mean 'digits'?" in missing.stderr
    where = [sys.executable, "-c", "import jdiff; print(jdiff.__file__)"]
    assert str(tmp_path) in subprocess.run(where, capture_output=True, text=True, cwd=tmp_path, env=env).stdout
