"""mypy finds nothing wrong in the library, nor in the Python examples of the README and of docs/."""

import re

import pytest
from mypy import api
from test_docs import ROOT, examples

PAGES = [page for page in ("README.md", *(f"docs/{p.name}" for p in sorted(ROOT.glob("docs/*.md")))) if examples(page)]
# what a page takes for granted; one page uses a name for several things, one after the other
PREAMBLE = "# mypy: allow-redefinition\nimport jax\nimport jdiff\n\nkey = jax.random.key(0)\n"


def run(*paths) -> tuple[int, str]:
    """(status, output) of mypy on the library and on further files, with the project's settings."""
    settings = ["--config-file", str(ROOT / "pyproject.toml"), "--cache-dir", str(ROOT / ".mypy_cache")]
    out, errors, status = api.run([*settings, str(ROOT / "jdiff"), *map(str, paths)])
    return status, out + errors


def written(folder, page: str, *replacement: str):
    """A file in `folder` with the examples of a page, after `str.replace(*replacement)`, if there is one."""
    text = "\n".join(examples(page))
    path = folder / f"{page.replace('/', '_').removesuffix('.md')}_examples.py"
    path.write_text(PREAMBLE + (text.replace(*replacement) if replacement else text))
    return path


@pytest.fixture(autouse=True)
def _only_these_paths(monkeypatch):
    monkeypatch.delenv("MYPYPATH", raising=False)


@pytest.mark.slow
def test_types_are_right(tmp_path):
    assert "README.md" in PAGES
    status, output = run(*(written(tmp_path, page) for page in PAGES))
    assert status == 0, output


@pytest.mark.slow
def test_a_wrong_type_is_reported(tmp_path):
    """The schedule and the key of one call of the README are exchanged."""
    right, wrong = "jdiff.prior(schedule, jax.random.key(0)", "jdiff.prior(jax.random.key(0), schedule"
    assert right in "\n".join(examples("README.md"))
    status, output = run(written(tmp_path, "README.md", right, wrong))
    assert status == 1 and re.search(r"README_examples\.py:\d+: error: .* \[arg-type\]", output), output
