"""Files of weights: there and back, and what is refused."""

import json
import pickle
import zipfile

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import convert
from jdiff.convert import Mismatch, files, resnet
from jdiff.convert.table import AS_IS, CONV, DENSE, Entry, Layout, dense, norm, to_tensors, to_variables
from jdiff.convert.table import conv as conv_entries
from jdiff.models import ResNet

MODULE = ResNet(depths=(1, 2), width=4, num_classes=3, in_channels=2, stem="small")
X = jax.random.normal(jax.random.key(0), (2, 7, 5, 2))


@pytest.fixture(scope="module")
def variables():
    fresh = jax.jit(MODULE.init)(jax.random.key(1), X)
    return jax.tree.map(lambda a: a + jax.random.uniform(jax.random.key(a.size), a.shape), fresh)


@pytest.fixture(scope="module")
def tensors(variables):
    return to_tensors(resnet.table(MODULE), variables)


def same(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for p, q in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        np.testing.assert_array_equal(p, q)


# ---------------------------------------------------------------- the table

SOME = np.random.default_rng(0)


@pytest.mark.parametrize("layout,theirs,ours", [
    (AS_IS, (), ()), (AS_IS, (4,), (4,)), (DENSE, (3, 4), (4, 3)), (CONV, (5, 2, 3), (3, 2, 5)),
    (CONV, (5, 2, 3, 4), (3, 4, 2, 5)), (CONV, (5, 2, 3, 4, 6), (3, 4, 6, 2, 5)),
])  # fmt: skip
def test_layouts_are_inverse_to_each_other(layout, theirs, ours):
    w = SOME.normal(size=theirs)
    assert layout.ours(w).shape == ours
    np.testing.assert_array_equal(layout.theirs(layout.ours(w)), w)


JOINED = Layout(lambda *w: np.concatenate(w), lambda k: tuple(np.split(k, 2)))
TOY = [
    *dense(("a",), "first"),
    *conv_entries(("b", "c"), "second", bias=False),
    *norm(("n",), "third"),
    Entry(("params", "gain"), "gain", AS_IS),
    Entry(("stats", "both"), ("left", "right"), JOINED),
]
THEIRS = {
    "first.weight": SOME.normal(size=(3, 4)), "first.bias": SOME.normal(size=3),
    "second.weight": SOME.normal(size=(5, 2, 3, 3)), "third.weight": SOME.normal(size=4),
    "third.bias": SOME.normal(size=4), "gain": SOME.normal(size=()), "left": SOME.normal(size=2),
    "right": SOME.normal(size=2),
}  # fmt: skip
SHAPES = jax.tree.map(
    lambda shape: jax.ShapeDtypeStruct(shape, jnp.float32),
    {
        "params": {"a": {"kernel": (4, 3), "bias": (3,)}, "b": {"c": {"kernel": (3, 3, 2, 5)}},
                   "n": {"scale": (4,), "bias": (4,)}, "gain": ()},
        "stats": {"both": (4,)},
    },
    is_leaf=lambda s: isinstance(s, tuple),
)  # fmt: skip


def test_table_there_and_back():
    """Every number returns, those of rank 0 and those that we hold side by side too; float64 when asked."""
    ours = to_variables(TOY, THEIRS, SHAPES, dtype=np.float64)
    np.testing.assert_array_equal(ours["params"]["a"]["kernel"], THEIRS["first.weight"].T)
    np.testing.assert_array_equal(ours["stats"]["both"], [*THEIRS["left"], *THEIRS["right"]])
    back = to_tensors(TOY, ours)
    assert {name: array.shape for name, array in back.items()} == {n: a.shape for n, a in THEIRS.items()}
    same(back, THEIRS)
    assert {a.dtype for a in jax.tree.leaves(to_variables(TOY, THEIRS, SHAPES))} == {np.dtype("float32")}


def test_what_does_not_fit_is_listed():
    wrong = {**THEIRS, "first.weight": np.ones((4, 4)), "third.bias": np.ones((2, 2)), "extra.one": np.ones(1)}
    wrong |= {"count": np.ones(1), "second.weight": np.ones(3)}
    del wrong["gain"], wrong["right"]
    with pytest.raises(Mismatch) as error:
        to_variables(TOY, wrong, SHAPES, ignored=("cou*",))
    assert str(error.value) == (
        "2 missing: gain, right; 1 unexpected: extra.one; 3 shape: first.weight (4, 4) for params/a/kernel (4, 3), "
        "second.weight (3,) for params/b/c/kernel (3, 3, 2, 5), third.bias (2, 2) for params/n/bias (4,)"
    )
    with pytest.raises(Mismatch, match=r"20 unexpected: .* and 12 more"):
        to_variables(TOY, THEIRS | {f"x{i}": np.ones(1) for i in range(20)}, SHAPES)


def test_a_table_of_another_module_is_our_own_error():
    with pytest.raises(AssertionError, match="params/gain"):
        to_variables([e for e in TOY if e.names != "gain"], THEIRS, SHAPES)


# ---------------------------------------------------------------- files


@pytest.mark.parametrize("kind", ["safetensors", "npz", "folder", "shards"])
def test_load(kind, tmp_path, tensors, variables):
    pytest.importorskip("safetensors")
    path = tmp_path / f"weights.{kind}"
    if kind == "safetensors":
        files.write(path, tensors)
    elif kind == "npz":
        np.savez(path, **tensors)
    else:
        path.mkdir()
        names = sorted(tensors)
        halves = (
            {"a.safetensors": names[:9], "b.safetensors": names[9:]} if kind == "shards" else {"a.safetensors": names}
        )
        for file, part in halves.items():
            files.write(path / file, {name: tensors[name] for name in part})
        if kind == "shards":
            index = {"weight_map": {name: file for file, part in halves.items() for name in part}}
            (path / "model.safetensors.index.json").write_text(json.dumps(index))
    module, loaded = convert.load(path, "resnet")
    assert module == MODULE
    same(loaded, jax.tree.map(np.asarray, variables))


def test_export_and_reload(tmp_path, variables):
    pytest.importorskip("safetensors")
    convert.save(tmp_path / "out", "resnet", MODULE, variables)
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == [
        "config.json", "diffusion_pytorch_model.safetensors",
    ]  # fmt: skip
    module, loaded = convert.load(tmp_path / "out", "resnet")
    np.testing.assert_array_equal(jax.jit(module.apply)(loaded, X), jax.jit(MODULE.apply)(variables, X))
    assert json.loads((tmp_path / "out/config.json").read_text())["depths"] == [1, 2]
    with pytest.raises(ValueError, match="no noise level"):
        convert.save(tmp_path, "resnet", MODULE.clone(noise=True), variables)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16", "float64"])
def test_other_precisions_become_float32(dtype, tmp_path, tensors):
    pytest.importorskip("safetensors")
    cast = {name: np.asarray(jnp.asarray(a), getattr(jnp, dtype)) for name, a in tensors.items()}
    files.write(tmp_path / "a.safetensors", cast)
    _, loaded = convert.load(tmp_path / "a.safetensors", "resnet")
    assert {a.dtype for a in jax.tree.leaves(loaded)} == {np.dtype("float32")}
    same(loaded, convert.variables_of(MODULE, "resnet", {n: a.astype(np.float32) for n, a in cast.items()}))


def test_errors(tmp_path, tensors):
    pytest.importorskip("safetensors")
    with pytest.raises(ValueError, match="unknown architecture 'vgg'; one of adm, "):
        convert.load(tmp_path, "vgg")
    with pytest.raises(FileNotFoundError, match="does not exist"):
        convert.load(tmp_path / "none.safetensors", "resnet")
    with pytest.raises(FileNotFoundError, match="holds no file of weights"):
        convert.load(tmp_path, "resnet")
    (tmp_path / "a.txt").write_text("hello")
    with pytest.raises(Mismatch, match="by its name"):
        convert.load(tmp_path / "a.txt", "resnet")
    files.write(tmp_path / "a.safetensors", tensors)
    files.write(tmp_path / "b.safetensors", {n: t for n, t in tensors.items() if n != "layer2.0.bn1.bias"})
    with pytest.raises(Mismatch, match="holds a.safetensors, b.safetensors; give the path"):
        convert.load(tmp_path, "resnet")
    with pytest.raises(Mismatch, match="^1 missing: layer2.0.bn1.bias$"):
        convert.load(tmp_path / "b.safetensors", "resnet")
    with pytest.raises(Mismatch, match="not torchvision's ResNet"):
        files.write(tmp_path / "c.safetensors", {"w": np.ones(2)})
        convert.load(tmp_path / "c.safetensors", "resnet")
    (tmp_path / "config.json").write_text("{")
    with pytest.raises(Mismatch, match="not readable JSON"):
        convert.load(tmp_path / "a.safetensors", "resnet")


@pytest.mark.parametrize("kind", ["safetensors", "npz"])
@pytest.mark.parametrize("keep", [0, 1, 100, -10])
def test_damaged_files_are_refused(kind, keep, tmp_path, tensors):
    pytest.importorskip("safetensors")
    path = tmp_path / f"a.{kind}"
    files.write(path, tensors) if kind == "safetensors" else np.savez(path, **tensors)
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(Mismatch, match=f"a.{kind} is not a readable"):
        convert.load(path, "resnet")


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_objects_in_npz_are_refused(tmp_path):
    np.savez(tmp_path / "a.npz", w=np.array([Trap(tmp_path / "sprung")], object))
    with pytest.raises(Mismatch, match="not a readable"):
        files.read(tmp_path / "a.npz")
    assert not (tmp_path / "sprung").exists()


def test_a_failed_write_leaves_the_old_file(tmp_path):
    pytest.importorskip("safetensors")
    files.write(tmp_path / "a.safetensors", {"w": np.ones(2)})
    with pytest.raises(Exception, match="object"):
        files.write(tmp_path / "a.safetensors", {"w": np.array([None])})
    assert files.read(tmp_path / "a.safetensors")[0]["w"].shape == (2,)


# ---------------------------------------------------------------- files of torch


@pytest.fixture(scope="module")
def torch():
    return pytest.importorskip("torch", reason="files of torch.save: pip install jdiff[parity]")


@pytest.mark.parametrize("wrap", [lambda d: d, lambda d: {"state_dict": {f"module.{k}": v for k, v in d.items()}}])
@pytest.mark.parametrize("zipped", [True, False])
def test_torch_files(torch, wrap, zipped, tmp_path, tensors, variables):
    content = wrap({name: torch.nn.Parameter(torch.tensor(a)) for name, a in tensors.items()})
    torch.save(content, tmp_path / "a.pth", _use_new_zipfile_serialization=zipped)
    module, loaded = convert.load(tmp_path / "a.pth", "resnet")
    assert module == MODULE
    same(loaded, jax.tree.map(np.asarray, variables))


def test_torch_shards_and_bfloat16(torch, tmp_path):
    for i in (1, 2):
        torch.save({f"w{i}": torch.full((2,), 1 / 3, dtype=torch.bfloat16)}, tmp_path / f"model-{i}.bin")
    index = {"weight_map": {"w1": "model-1.bin", "w2": "model-2.bin"}}
    (tmp_path / "model.bin.index.json").write_text(json.dumps(index))
    content, _ = files.read(tmp_path)
    assert sorted(content) == ["w1", "w2"]
    np.testing.assert_array_equal(content["w2"], np.asarray(jnp.full(2, 1 / 3, jnp.bfloat16), np.float32))


@pytest.mark.parametrize("suffix", ["pkl", "pt"])
def test_a_pickle_that_runs_code_is_refused_and_not_run(torch, suffix, tmp_path):
    path = tmp_path / f"network.{suffix}"
    content = {"ema": Trap(tmp_path / "sprung")}
    path.write_bytes(pickle.dumps(content)) if suffix == "pkl" else torch.save(content, path)
    with pytest.raises(Mismatch, match=r"not unpickled .*torch.save\(net.state_dict\(\), 'weights.pt'\)"):
        files.read(path)
    assert not (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [b"", b"x", b"not weights at all", bytes(range(256)) * 4, b"\x80\x02}q"])
def test_torch_files_that_are_none(torch, content, tmp_path):
    (tmp_path / "a.pt").write_bytes(content)
    with pytest.raises(Mismatch, match="more than tensors, or is damaged"):
        files.read(tmp_path / "a.pt")


def test_damaged_and_odd_torch_files(torch, tmp_path):
    torch.save({"w": torch.ones(100)}, tmp_path / "a.pt")
    whole = (tmp_path / "a.pt").read_bytes()
    for keep in (4, 300, len(whole) - 30):
        (tmp_path / "a.pt").write_bytes(whole[:keep])
        with pytest.raises(Mismatch, match="damaged"):
            files.read(tmp_path / "a.pt")
    with zipfile.ZipFile(tmp_path / "b.pt", "w") as file:
        file.writestr("b/other", "hello")
    with pytest.raises(Mismatch, match="damaged"):
        files.read(tmp_path / "b.pt")
    torch.save(torch.ones(2), tmp_path / "c.pt")
    with pytest.raises(Mismatch, match="expected named tensors"):
        files.read(tmp_path / "c.pt")
