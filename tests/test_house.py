"""The house: its floors are folders; what may import flax.linen; what an import brings along."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "jdiff"

# a file imports from folders on lines above its own, or from its own folder
FLOORS = """
core
process
denoisers
losses guidance solvers
posterior
sampling
train
convert data metrics
export
config
runs
commands
""".strip().splitlines()
TOWER = ["models"]  # of the floors it knows `core` alone; from `convert data metrics` upwards all may use it


def files():
    """Each file of the package but its face, with the folder that it is in."""
    for path in sorted(PACKAGE.rglob("*.py")):
        if path.parent != PACKAGE:
            yield path, path.relative_to(PACKAGE).parts[0]


def name_of(path: Path) -> str:
    parts = path.relative_to(PACKAGE.parent).with_suffix("").parts
    return ".".join(parts[:-1] if parts[-1] == "__init__" else parts)


MODULES = {name_of(path): path for path, _ in files()}


def imports(path: Path) -> set[str]:
    """The modules of this package that a file imports, wherever in the file."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "jdiff":
            for alias in node.names:
                module = f"{node.module}.{alias.name}"
                found.add(module if module in MODULES else node.module)
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names if alias.name.split(".")[0] == "jdiff"}
    return found


def test_the_package_is_its_floors():
    """`ls jdiff` is the floor table: every folder is on it, and beside the folders there is only the face."""
    assert {path.name for path in PACKAGE.iterdir() if path.name != "__pycache__"} == {
        *" ".join(FLOORS).split(), *TOWER, "__init__.py", "__main__.py", "py.typed",
    }  # fmt: skip


@pytest.mark.parametrize("path,folder", list(files()), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_imports_only_downwards(path, folder):
    rank = {name: i for i, line in enumerate(FLOORS) for name in line.split()}
    for module in imports(path):
        assert module != "jdiff", f"{path} imports the face of the package, which imports it"
        other = module.split(".")[1]
        if folder in TOWER:
            allowed = other == "core" or other in TOWER[: TOWER.index(folder) + 1]
        elif other in TOWER:
            allowed = rank[folder] >= rank["data"]
        else:
            allowed = other == folder or rank[other] < rank[folder]
        assert allowed, f"{path} imports {module}, which is not below it"


def test_no_circle():
    """Files in a row such that each imports only those before it."""
    left = {name: imports(path) & set(MODULES) - {name} for name, path in MODULES.items()}
    for name, others in left.items():  # importing a file runs the face of its folder first
        others -= {name.rpartition(".")[0]}
    while left:
        free = [name for name, others in left.items() if not others & set(left)]
        assert free, f"a circle among {sorted(left)}"
        for name in free:
            del left[name]


@pytest.mark.parametrize("path,folder", list(files()), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_only_models_know_linen(path, folder):
    if folder != "models":
        assert "flax.linen" not in path.read_text() and "from flax import linen" not in path.read_text()


@pytest.mark.parametrize("path,folder", list(files()), ids=lambda v: v.name if isinstance(v, Path) else v)
def test_public_things_have_docstrings(path, folder):
    tree = ast.parse(path.read_text())
    assert ast.get_docstring(tree), f"{path} has no docstring"
    for node in tree.body:
        if isinstance(node, (ast.FunctionDef, ast.ClassDef)) and not node.name.startswith("_"):
            if any(isinstance(name, ast.Name) and name.id == "overload" for name in node.decorator_list):
                continue  # for type checkers; what it stands for has one
            assert ast.get_docstring(node), f"{path}: {node.name} has no docstring"


def test_import_is_light():
    """`import jdiff` brings jax, flax, optax and numpy along, and nothing that only scripts, data or tests need."""
    heavy = (
        "chex", "dacite", "diffrax", "equinox", "flax.nnx", "grain",
        "matplotlib", "optuna", "orbax", "PIL", "sklearn", "tensorboardX",
        "tensorflow_datasets", "torch", "tqdm", "tyro", "wandb",
    )  # fmt: skip
    code = f"import sys, jax, jdiff; dir(jdiff); print(*[name for name in {heavy} if name in sys.modules])"
    out = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=ROOT)
    assert (out.returncode, out.stdout.strip()) == (0, ""), out.stdout + out.stderr


def test_no_module_is_named_like_a_function():
    import types

    import jdiff

    for name in ("sample", "denoiser", "schedule", "sample_parallel", "q_sample", "prior", "discrete", "create_model"):
        assert isinstance(getattr(jdiff, name), types.FunctionType), name


def test_dir_shows_what_users_use():
    """Of jdiff and its folders: what `__all__` names, all of it there, no imports, and no module by accident."""
    import types

    import jdiff

    assert {*jdiff.__all__, "config", "data", "metrics", "runs", "__version__"} == set(dir(jdiff))
    modules = {name for name in dir(jdiff) if isinstance(getattr(jdiff, name), types.ModuleType)}
    assert not modules & {"core", "process", "denoisers", "sampling", "importlib"} and {"solvers", "data"} <= modules
    for folder in (
        jdiff.solvers,
        jdiff.guidance,
        jdiff.losses,
        jdiff.models,
        jdiff.train,
        jdiff.convert,
        jdiff.metrics,
    ):
        assert dir(folder) == sorted(set(folder.__all__)) and all(hasattr(folder, name) for name in folder.__all__)
    for folder in (jdiff.solvers, jdiff.guidance, jdiff.models, jdiff.metrics):
        assert not [name for name in dir(folder) if isinstance(getattr(folder, name), types.ModuleType)]
