"""The Python examples of the README and of docs/ run as they are printed."""

import re
import runpy
from pathlib import Path

import pytest

from jdiff.models import registry

ROOT = Path(__file__).parent.parent


def examples(path: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize("path", ["README.md", "docs/guidance.md", "docs/networks.md", "docs/own.md"])
def test_examples_run(path, monkeypatch, tmp_path):
    """One after the other, as a reader would; those of published files, which are not here, are left out."""
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    found = [code for code in examples(path) if "jdiff.convert." not in code]
    assert found
    script = tmp_path / "examples.py"
    script.write_text("\n".join(found))
    runpy.run_path(str(script))
