"""Files of weights: there and back, and what is refused."""

import argparse
import functools
import importlib
import json
import pickle
import sys
import types
import zipfile

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

from jdiff import convert
from jdiff.convert import Mismatch, diffusers, dit, files, resnet, weights
from jdiff.convert.table import AS_IS, CONV, DENSE, Entry, Layout, dense, norm, to_tensors, to_variables
from jdiff.convert.table import conv as conv_entries
from jdiff.models import InceptionV3, ResNet
from jdiff.models.dit import DiT
from jdiff.models.edm2 import EDM2UNet
from jdiff.models.unet import UNet
from jdiff.models.unet_presets import ADM, DDPM, SONG

MODULE = ResNet(depths=(1, 2), width=4, num_classes=3, in_channels=2, stem="small")
X = np.random.default_rng(0).normal(size=(2, 7, 5, 2)).astype(np.float32)


@pytest.fixture(scope="module")
def variables():
    return jax.device_get(random_variables(MODULE, X))


@pytest.fixture(scope="module")
def tensors(variables):
    return to_tensors(resnet.table(MODULE), variables)


def same(a, b):
    chex.assert_trees_all_equal(a, b)


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


def test_no_variable_is_lost():
    """What the table lacks is not left out, and what it has must be there."""
    ours = to_variables(TOY, THEIRS, SHAPES)
    with pytest.raises(
        ValueError, match="cannot be written: 1 missing: params/extra; 1 without a name .*: params/gain$"
    ):
        to_tensors([e if e.names != "gain" else e._replace(path=("params", "extra")) for e in TOY], ours)


# ---------------------------------------------------------------- diffusers without diffusers


@functools.cache
def shapes_of(module, *sizes, channels=3):
    cond = np.zeros(1, int) if module.num_classes else None
    return jax.eval_shape(module.init, jax.random.key(0), np.ones((1, *sizes, channels)), np.ones(1), cond)


def test_names_of_blocks_may_begin_with_unetres():
    module = KINDS["diffusers"]
    config = diffusers.config(module, shapes_of(module, 4, 4))
    for key in ("down_block_types", "up_block_types"):
        assert diffusers.build({}, config | {key: [f"UNetRes{name}" for name in config[key]]}) == diffusers.build(
            {}, config
        )


@pytest.mark.parametrize("channels,out,times", [(6, 3, 1 / 2), (4, 3, 3 / 4), (3, 6, 2), (49, 1, 1 / 49)])
def test_any_channels_in_and_out(channels, out, times):
    module = KINDS["diffusers"].clone(out_multiplier=times)
    config = diffusers.config(module, shapes_of(module, 4, 4, channels=channels))
    again = diffusers.build({}, config | {"in_channels": channels, "out_channels": out})
    assert type(config["out_channels"]) is int
    assert shapes_of(again, 4, 4, channels=channels)["params"]["out"]["kernel"].shape[-1] == out
    if channels != 49:  # whose product with 1/49 is a little less than 1
        assert (config["in_channels"], config["out_channels"], again.out_multiplier) == (channels, out, times)


@pytest.mark.parametrize(
    "key", ["block_out_channels", "norm_num_groups", "up_block_types", "in_channels", "out_channels"]
)
def test_a_config_that_says_nothing(key, tmp_path, monkeypatch):
    module = KINDS["diffusers"]
    config = diffusers.config(module, shapes_of(module, 4, 4)) | {key: None}
    monkeypatch.setattr(files, "read", lambda path: ({}, config))
    with pytest.raises(Mismatch, match=f"the config.json of a UNet2DModel says {key} None$"):
        convert.load(tmp_path, "diffusers")


def test_what_diffusers_cannot_express_is_refused(tmp_path):
    module = KINDS["diffusers"]
    for sizes in ((4,), (4, 4, 4)):
        with pytest.raises(ValueError, match=f"UNet2DModel takes images, .* signals of {len(sizes)} dimensions"):
            convert.save(tmp_path, "diffusers", module, shapes_of(module, *sizes))
    for fields, text in ((dict(augment_dim=9), "augment_dim=9"), (dict(multipliers=(2, 2)), r"multipliers=\(2, 2\)")):
        with pytest.raises(ValueError, match=text):
            convert.save(tmp_path, "diffusers", module.clone(**fields), shapes_of(module, 4, 4))
    assert not list(tmp_path.iterdir())


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
    assert module == MODULE
    chex.assert_trees_all_equal(loaded, variables, strict=True)
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
    for text, said in (("{", "not readable JSON"), ("[1]", "config.json holds a list; expected names and values")):
        (tmp_path / "config.json").write_text(text)
        with pytest.raises(Mismatch, match=said):
            convert.load(tmp_path / "a.safetensors", "resnet")
    for text, said in (
        ("[]", "index.json holds a list"),
        ("{}", "no .weight_map."),
        ('{"weight_map": [1]}', "no .weight"),
    ):
        (tmp_path / "config.json").write_text("{}")
        (tmp_path / "model.safetensors.index.json").write_text(text)
        with pytest.raises(Mismatch, match=said):
            convert.load(tmp_path, "resnet")


def test_overrides_are_fields(tmp_path):
    """And are looked at before the file is."""
    for architecture, field, text in (
        (
            "adm",
            "hedas",
            r"'adm' has no field 'hedas' \(did you mean 'heads'\?\); one of adaptive, .*, wave_multiplier$",
        ),
        ("adm", "num_head_channel", "did you mean 'num_head_channels'"),
        ("score_sde", "centred", "did you mean 'centered'"),
        ("dit", "parent", "has no field 'parent'"),
    ):
        with pytest.raises(ValueError, match=text):
            convert.load(tmp_path / "none.safetensors", architecture, **{field: 3})


# one network of each kind, in the words of its architecture
KINDS = {
    "adm": UNet(**ADM | dict(channels=32, multipliers=(1, 2), blocks=1, head_channels=32, null_class=False)),
    "diffusers": UNet(**DDPM | dict(channels=32, multipliers=(1, 2), blocks=1)),
    "dit": DiT(width=16, depth=1, heads=2, patch=2, num_classes=3, channels=4, label_scale=1.0),
    "edm": UNet(**SONG | dict(channels=32, multipliers=(1, 2), blocks=1, pyramid_in="residual", augment_dim=9)),
    "edm2": EDM2UNet(channels=32, multipliers=(1, 2), blocks=1, attention=(1,), resolution=8, in_channels=3),
    "inception": InceptionV3(num_classes=3),
    "resnet": MODULE,
    "score_sde": UNet(**DDPM | dict(channels=32, multipliers=(1, 2), blocks=1, decoder_attention="last")),
}


@pytest.mark.parametrize("architecture", convert.ARCHITECTURES)
def test_any_part_of_a_file_may_be_missing(architecture, monkeypatch):
    """Whatever is left out or is no tensor, the answer is a module that lists it, or `Mismatch`."""
    kind, module = importlib.import_module(f"jdiff.convert.{architecture}"), KINDS[architecture]
    expected = jax.eval_shape(module.init, jax.random.key(0), *kind.example(module, {}))
    whole = to_tensors(kind.table(module), jax.tree.map(lambda s: np.zeros(s.shape, np.float32), expected))
    config = {} if architecture == "edm" else json.loads(json.dumps(kind.config(module, expected)))

    def load(tensors, **overrides):
        monkeypatch.setattr(files, "read", lambda path: (tensors, config))
        return convert.load("a.safetensors", architecture, **overrides)[0]

    assert type(load(whole)) is type(module)
    odd = {}
    with monkeypatch.context() as patch:
        patch.setattr(weights, "variables_of", lambda *args: args)
        for name in whole:
            rest = {k: w for k, w in whole.items() if k != name}
            for tensors in (rest, rest | {name: np.float32(1)}, rest | {name: "text"}, {name: whole[name]}):
                try:
                    load(tensors)
                    odd.setdefault(name, rest)
                except Mismatch as error:
                    assert str(error)
    for tensors in ({}, {"model": 3}, {"ema": {"shadow_params": 1}, "state_dict": [1]}, {"a": {"b": np.ones(2)}}):
        with pytest.raises(Mismatch):
            load(tensors)
    name, rest = min(odd.items())  # one that tells no shape: the list has its name
    with pytest.raises(Mismatch, match=f"^1 missing: .*{name.rpartition('.')[2]}"):
        load(rest)


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


def test_a_library_that_is_missing_or_old_is_named(tmp_path, monkeypatch):
    for name in ("a.safetensors", "b.pt"):
        (tmp_path / name).write_bytes(b"whatever")
    monkeypatch.setitem(sys.modules, "safetensors.numpy", None)
    with pytest.raises(ImportError, match=r"need safetensors: pip install 'jdiff\[convert\]'$"):
        convert.load(tmp_path / "a.safetensors", "resnet")
    with pytest.raises(ImportError, match="need safetensors"):
        files.write(tmp_path / "c.safetensors", {"w": np.ones(1)})
    monkeypatch.setitem(sys.modules, "torch", None)
    with pytest.raises(ImportError, match="reading b.pt needs PyTorch; pip install torch, or use .safetensors$"):
        convert.load(tmp_path / "b.pt", "resnet")
    for version in ("1.13.1", "2.5.1+cu121", "2.9.0a0+git123"):
        monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__=version))
        with pytest.raises(ImportError, match=r"b.pt safely needs PyTorch 2.10 or newer, and this is .*'torch>=2.10'"):
            convert.load(tmp_path / "b.pt", "resnet")


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
    with pytest.raises(Mismatch, match=r"not unpickled; .*torch.save\(net.state_dict\(\), 'weights.pt'\)"):
        files.read(path)
    assert not (tmp_path / "sprung").exists()


class Settings:
    """A class of a training script."""


def test_settings_beside_the_weights(torch, tmp_path):
    """DiT's training keeps its arguments, plain values in a Namespace; what else is code is named, in one line."""
    tensors = {"w": torch.ones(2)}
    content = {"model": tensors, "ema": {"w": torch.zeros(2)}, "opt": {"state": {0: {"step": torch.tensor(3.0)}}}}
    torch.save(content | {"args": argparse.Namespace(model="DiT-XL/2", lr=1e-4)}, tmp_path / "a.pt")
    found = files.read(tmp_path / "a.pt")[0]
    assert sorted(found) == ["args", "ema", "model", "opt"] and found["args"].lr == 1e-4
    np.testing.assert_array_equal(found["ema"]["w"], [0, 0])
    for kept in (Settings(), argparse.Namespace(more=Settings())):
        torch.save(content | {"args": kept}, tmp_path / "b.pt")
        with pytest.raises(Mismatch) as error:
            files.read(tmp_path / "b.pt")
        assert str(error.value) == (
            f"{tmp_path / 'b.pt'} holds {__name__}.Settings, which is code, and is not unpickled; save its tensors "
            "alone where its code is trusted: torch.save(net.state_dict(), 'weights.pt')"
        )


def test_a_training_checkpoint_of_dit(torch, tmp_path):
    """Its averages, though its arguments, which are no tensors, lie beside."""
    module = KINDS["dit"]
    ema, model = (random_variables(module, *dit.example(module, {}), seed=i) for i in (0, 1))
    content = {
        name: {k: torch.tensor(np.array(w)) for k, w in to_tensors(dit.table(module), v).items()}
        for name, v in (("model", model), ("ema", ema))
    }
    torch.save(content | {"opt": {"state": {}}, "args": argparse.Namespace(lr=1e-4)}, tmp_path / "0050000.pt")
    loaded, variables = convert.load(tmp_path / "0050000.pt", "dit", heads=2)
    assert loaded == module
    same(variables, jax.tree.map(np.asarray, ema))


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
    torch.jit.save(torch.jit.script(torch.nn.Linear(1, 1)), tmp_path / "d.pt")
    with pytest.raises(Mismatch, match="TorchScript") as error:
        files.read(tmp_path / "d.pt")
    assert "Re-running" not in str(error.value) and "\n" not in str(error.value)
    torch.save(torch.ones(2), tmp_path / "c.pt")
    with pytest.raises(Mismatch, match="expected named tensors"):
        files.read(tmp_path / "c.pt")
