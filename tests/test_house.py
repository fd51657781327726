"""The house: floors, what may import flax.linen, what an import costs."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jdiff"

# a module may import those before it (and itself, for packages)
FLOORS = """
names files foreign arrays noise
schedules betas forward sde grid oracle
targets conditioning levels weights coupling
denoisers vlb losses guidance solvers
sampling adaptive callbacks picard
ema optim train parallel checkpoint posthoc signals lock peers
data metrics plot watch config runs
""".split()
TOWER = ["models", "convert"]  # of the floors they know `names`, `files` and `foreign` alone


def imports(path: Path) -> set[str]:
    """Top-level jdiff modules that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jdiff":
            parts = node.module.split(".")
            found |= {parts[1]} if len(parts) > 1 else {alias.name for alias in node.names}
        if isinstance(node, ast.Import):
            found |= {a.name.split(".")[1] for a in node.names if a.name.startswith("jdiff.")}
    return found


def files():
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent == PACKAGE and path.name == "__init__.py":
            continue
        yield path, path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def test_every_module_has_a_floor():
    assert {module for _, module in files()} == set(FLOORS) | set(TOWER)


@pytest.mark.parametrize("path,module", list(files()), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_imports_only_downwards(path, module):
    known = set(FLOORS) | set(TOWER)
    used = imports(path) & known
    if module in TOWER:
        assert used <= {"names", "files", "foreign", *TOWER[: TOWER.index(module) + 1]}
    else:
        below = set(FLOORS[: FLOORS.index(module) + 1])
        if FLOORS.index(module) >= FLOORS.index("data"):
            below |= set(TOWER)
        assert used <= below, f"{path} imports {used - below} from above"


@pytest.mark.parametrize("path,module", list(files()), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_only_models_know_linen(path, module):
    if module != "models":
        assert "flax.linen" not in path.read_text() and "from flax import linen" not in path.read_text()


@pytest.mark.parametrize("path,module", list(files()), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_public_things_have_docstrings(path, module):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_import_is_light():
    code = (
        "import time, jax; t = time.perf_counter(); import jdiff; d = time.perf_counter() - t; import sys;"
        "heavy = [m for m in ('matplotlib', 'sklearn', 'tensorflow_datasets', 'orbax', 'tqdm', 'torch', 'tyro') "
        "if m in sys.modules]; assert not heavy, heavy; print(d)"
    )
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert out.returncode == 0, out.stderr


def test_no_module_is_named_like_a_function():
    import types

    import jdiff

    for name in ("sample", "denoiser", "sample_parallel", "q_sample", "prior", "discrete", "create_model"):
        assert isinstance(getattr(jdiff, name), types.FunctionType), name
