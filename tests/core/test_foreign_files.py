"""Files that others made: each hostile, damaged or odd one is refused with one line, and nothing in it is executed."""

import argparse
import bz2
import io
import json
import os
import pickle
import shutil
import signal
import stat
import struct
import sys
import types
import warnings
import zipfile
import zlib
from pathlib import Path

import chex
import jax
import numpy as np
import pytest
from PIL import Image

from jdiff import config as configs
from jdiff import convert, data, runs
from jdiff.config import Config, ConfigError, Named
from jdiff.convert import Mismatch, dit, files, table
from jdiff.data import DataError
from jdiff.models.dit import DiT

SMALL = np.arange(12, dtype=np.float32).reshape(3, 4)
PIXELS = np.random.default_rng(0).integers(0, 256, (6, 8, 8, 3), np.uint8)
TERA = 40 * 10**12


@pytest.fixture(autouse=True)
def limit():
    """What waits for ever fails after some seconds."""

    def stop(*_):
        raise AssertionError("it waits for ever")

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, 60, 5)
    yield
    signal.setitimer(signal.ITIMER_REAL, 0)
    signal.signal(signal.SIGALRM, before)


@pytest.fixture
def torch():
    return pytest.importorskip("torch", reason="files of torch.save: pip install jdiff[parity]")


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, folder):
        self.path = folder / "sprung"

    def __reduce__(self):
        return open, (str(self.path), "w")


class System(Trap):
    """Unpickling it runs a command."""

    def __reduce__(self):
        return os.system, (f"touch {self.path}",)


class Evaluated(Trap):
    """Unpickling it evaluates Python."""

    def __reduce__(self):
        return eval, (f"open({str(self.path)!r}, 'w')",)


def pickled(folder, protocol=4, kind=Trap):
    return pickle.dumps({"w": kind(folder)}, protocol)


def npy(array=SMALL):
    file = io.BytesIO()
    np.save(file, array)
    return file.getvalue()


def header(text, version=1):
    """The beginning of a .npy whose header is `text`."""
    text = (text + "\n").encode()
    return b"\x93NUMPY" + bytes([version, 0]) + struct.pack("<H" if version == 1 else "<I", len(text)) + text


def claims(shape, descr="<f4", version=1):
    return header(f"{{'descr': {descr!r}, 'fortran_order': False, 'shape': {shape}}}", version)


def archive(members, compression=zipfile.ZIP_DEFLATED):
    """A zip file, in which a name may stand twice."""
    file = io.BytesIO()
    with warnings.catch_warnings(action="ignore"), zipfile.ZipFile(file, "w", compression) as made:
        for name, content in members:
            made.writestr(name, content)
    return file.getvalue()


def says(content, size):
    """The archive, whose list of members says that the first takes `size` bytes unpacked (below 4 GiB)."""
    at = content.index(b"PK\x01\x02") + 24
    return content[:at] + struct.pack("<I", size) + content[at + 4 :]


def bomb(size=2**31):
    """An .npz of some bytes that says it takes 2 GiB; it would end early, but that is known after reading it."""
    return says(archive([("x.npy", claims((size - 128,), "|u1") + bytes(60_000))]), size)


def lies():
    """An .npz that says in both places that it takes 40 TB."""
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w") as made, made.open("x.npy", "w", force_zip64=True) as member:
        member.write(claims((TERA // 4,)))
    content = file.getvalue()
    at = content.index(b"PK\x01\x02")
    length = struct.unpack("<H", content[at + 28 : at + 30])[0]
    extra = struct.pack("<HHQ", 1, 8, TERA)
    name_end = at + 46 + length
    old = struct.unpack("<H", content[at + 30 : at + 32])[0]
    entry = bytearray(content[at:name_end]) + extra
    entry[24:28], entry[30:32] = b"\xff" * 4, struct.pack("<H", len(extra))
    tail = bytearray(content[name_end + old :])
    tail[12:16] = struct.pack("<I", len(entry))  # the size of the list
    return content[:at] + bytes(entry) + bytes(tail)


def flipped(content, at, bit=0):
    changed = bytearray(content)
    changed[at] ^= 1 << bit
    return bytes(changed)


def safetensors(head, body=b"", length=None):
    head = head if isinstance(head, bytes) else json.dumps(head).encode()
    return struct.pack("<Q", len(head) if length is None else length) + head + body


def tensor(start=0, end=8, shape=(2,), dtype="F32"):
    return dict(dtype=dtype, shape=list(shape), data_offsets=[start, end])


def png(width=8, height=8):
    """A PNG that says its size, and has the pixels of none."""

    def chunk(kind, content):
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    size = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", size) + chunk(b"IDAT", zlib.compress(b"\0" * 100)) + chunk(b"IEND", b"")
    )


# ---------------------------------------------------------------- whatever is no file


def fifo(path):
    os.mkfifo(path)


ODD = {
    "a fifo": fifo,
    "a device": lambda path: path.symlink_to("/dev/zero"),
    "a socket": lambda path: os.mknod(path, stat.S_IFSOCK | 0o600),
    "a folder": lambda path: path.mkdir(),
    "a link to itself": lambda path: path.symlink_to(path.name),
    "a link to nothing": lambda path: path.symlink_to("nothing"),
    "a link to a fifo": lambda path: (fifo(path.with_name("pipe")), path.symlink_to("pipe")),
}


def beside_config(path):
    """Good weights, with `path` as their config.json."""
    np.savez(path.with_name("weights.npz"), x=SMALL)
    return files.read(path.with_name("weights.npz"))


def in_index(path):
    """A folder with an index and `path` as the file that it lists."""
    path.with_name("model.bin.index.json").write_text(json.dumps({"weight_map": {"w": path.name}}))
    return files.read(path.parent)


def images(path):
    """All images of the folder around `path`, among which it is."""
    Image.fromarray(PIXELS[0]).save(path.with_name("0.png"))
    return data.folder(str(path.parent), 8).x


OPEN = {  # where a file of a name is looked for, and what must come of one that is bad
    "weights.npz": (files.read, (Mismatch, FileNotFoundError)),
    "weights.safetensors": (files.read, (Mismatch, FileNotFoundError)),
    "weights.pt": (files.read, (Mismatch, FileNotFoundError)),
    "shard.bin": (in_index, Mismatch),
    "model.safetensors.index.json": (lambda path: files.read(path.parent), (Mismatch, FileNotFoundError)),
    "config.json": (beside_config, Mismatch),
    "data.npz": (lambda path: data.arrays(str(path)), DataError),
    "data.npy": (lambda path: data.arrays(str(path)), DataError),
    "picture.png": (images, DataError),
    "run/config.json": (lambda path: runs.open_run(path.parent), ConfigError),
}


def refused(path, folder, kinds=None):
    """The one line with which what is at `path` is refused."""
    name = path.relative_to(folder).as_posix()
    reader, errors = OPEN[name]
    with pytest.raises(kinds or errors) as error:
        reader(path)
    text = str(error.value)
    assert text.isprintable() and len(text) < 1500, text
    assert path.name in text or path.parent.name in text, text
    assert not (folder / "sprung").exists()
    return text


# a folder of any name is looked into for images
@pytest.mark.parametrize("name,kind", [(n, k) for n in OPEN for k in ODD if (n, k) != ("picture.png", "a folder")])
def test_what_is_no_file_is_refused_and_not_waited_for(name, kind, tmp_path):
    if name == "weights.pt":
        pytest.importorskip("torch")
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    ODD[kind](path)
    try:
        refused(path, tmp_path)
    finally:
        for pipe in (path, path.with_name("pipe")):
            if pipe.is_fifo():  # whoever waits for it goes on
                os.close(os.open(pipe, os.O_RDWR | os.O_NONBLOCK))


def test_an_image_of_endless_size_is_not_read(tmp_path):
    with (tmp_path / "picture.png").open("wb") as file:
        file.write(png())
        file.truncate(2**40)
    assert "bytes; expected at most" in refused(tmp_path / "picture.png", tmp_path)


# ---------------------------------------------------------------- JSON

DEEP = {n: "[" * n + "]" * n for n in (500, 1000, 100_000)}
TEXTS = {
    "binary": bytes(range(256)),
    "latin-1": '{"name": "\xe9"}'.encode("latin-1"),
    "utf-16": '{"name": "a"}'.encode("utf-16"),
    "a pickle": pickle.dumps({"name": "a"}),
    "nothing": b"",
    "text": b"hello",
    "a list": b"[1]",
    "null": b"null",
    "a number": b"3",
    "cut short": b'{"name": "a", "seed": ',
    "deep by 1000": ('{"name": ' + DEEP[1000] + "}").encode(),
    "deep by 100,000": ('{"name": ' + DEEP[100_000] + "}").encode(),
    "deep objects": (b'{"name": ' * 100_000),
    "NaN": b'{"seed": NaN}',
    "a name twice": b'{"seed": 1, "seed": 2}',
    "a number of 5,000 digits": b'{"seed": ' + b"9" * 5000 + b"}",
    "control characters": b'{"\\u001b[2J\\n\\r\\u0000": 1, "weight_map": 3}',
}


READ_AS_JSON = [(n, k) for n in OPEN if n.endswith(".json") for k in TEXTS]
READ_AS_JSON.remove(("config.json", "control characters"))  # beside weights any names may stand


@pytest.mark.parametrize("name,kind", READ_AS_JSON)
def test_json_that_is_none(kind, name, tmp_path):
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    path.write_bytes(TEXTS[kind])
    refused(path, tmp_path)


RUN = json.loads(configs.to_json(Config("a", Named("digits"), Named("unet_digits"), Named("vp"))))
SETTINGS = {
    "a name that is none": dict(data=dict(name=3, args={})),
    "arguments that are none": dict(model=dict(name="unet_digits", args=[1])),
    "a part that is none": dict(train=[]),
    "text for a number": dict(seed="0"),
    "a setting too many": dict(extra=1),
    "64 bits and more": dict(seed=2**63),
    "more than a float can hold": dict(train=RUN["train"] | dict(lr=10**400)),
    "an argument nested too deep": dict(model=dict(name="unet_digits", args=dict(a=json.loads(DEEP[500])))),
    "code for a name": dict(model=dict(name="__import__('os').system('touch sprung')", args={})),
    "a file for a name": dict(schedule=dict(name="../../evil.py", args={})),
    "a path for a set": dict(data=dict(name="arrays", args=dict(path="/dev/zero"))),
    "sets of other registries": dict(data=dict(name="tfds", args=dict(name="huggingface:a/b", data_dir="none"))),
}


@pytest.mark.parametrize("kind", SETTINGS)
def test_configs_of_runs_that_have_no_meaning(kind, tmp_path):
    with pytest.raises(ConfigError) as error:
        (tmp_path / "config.json").write_text(json.dumps(RUN | SETTINGS[kind]))
        runs.open_run(tmp_path)
    assert str(error.value).isprintable() and len(str(error.value)) < 1500
    assert not list(Path().glob("sprung")) and not (tmp_path / "sprung").exists()


def test_a_good_config_is_read_from_its_file(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(RUN))
    assert configs.from_json(tmp_path / "config.json") == configs.from_json(json.dumps(RUN))
    (tmp_path / "config.json").write_text(json.dumps(RUN | dict(seed="0")))
    with pytest.raises(ConfigError, match=f"^{tmp_path / 'config.json'} is not a config of this version: .*seed"):
        configs.from_json(tmp_path / "config.json")


LISTED = {
    "above": {"w": "../weights.npz"},
    "absolute": {"w": "/etc/passwd"},
    "below": {"w": "sub/weights.npz"},
    "the folder above": {"w": ".."},
    "the folder": {"w": "."},
    "nothing": {"w": ""},
    "not there": {"w": "b.safetensors"},
    "of two lines": {"w": "a\n\x1b[31m.npz"},
    "a zero": {"w": "weights.npz\0"},
    "a number": {"w": 1},
    "a list": {"w": ["weights.npz"]},
    "the good one and another": {"v": "weights.npz", "w": "../weights.npz"},
    "no file": {},
    "no map": [],
}


@pytest.mark.parametrize("kind", LISTED)
def test_an_index_lists_files_of_its_own_folder(kind, tmp_path):
    folder = tmp_path / "model"
    (folder / "sub").mkdir(parents=True)
    for directory in (tmp_path, folder, folder / "sub"):
        np.savez(directory / "weights.npz", w=SMALL)
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": LISTED[kind]}))
    with pytest.raises(Mismatch, match="index.json") as error:
        files.read(folder)
    assert str(error.value).isprintable()


def test_links_to_weights_are_followed(tmp_path):
    """As in the caches of those who publish weights."""
    (tmp_path / "blobs").mkdir()
    (tmp_path / "snapshot").mkdir()
    np.savez(tmp_path / "blobs" / "a.npz", w=SMALL)
    (tmp_path / "snapshot" / "weights.npz").symlink_to("../blobs/a.npz")
    (tmp_path / "snapshot" / "model.bin.index.json").write_text('{"weight_map": {"w": "weights.npz"}}')
    chex.assert_trees_all_equal(files.read(tmp_path / "snapshot"), ({"w": SMALL}, {}), strict=True)


# ---------------------------------------------------------------- .npz and .npy

NPZ = {
    "objects": lambda f: archive([("x.npy", npy(np.array([Trap(f)], object)))]),
    "objects, unsaid": lambda f: archive([("x.npy", claims((1,), "|O") + pickled(f))]),
    "a pickle": pickled,
    "a pickle in it": lambda f: archive([("x.npy", pickled(f))]),
    "a .npy": lambda f: npy(np.array([Trap(f)], object)),
    "code for a header": lambda f: archive([("x.npy", header(f"open({str(f / 'sprung')!r}, 'w')"))]),
    "code in a header": lambda f: archive([("x.npy", claims(f"(open({str(f / 'sprung')!r}, 'w'),)"))]),
    "an empty member": lambda f: archive([("x.npy", b"")]),
    "a text": lambda f: archive([("x.npy", b"hello")]),
    "no header": lambda f: archive([("x.npy", b"\x93NUMPY\x01\x00")]),
    "a header nested too deep": lambda f: archive([("x.npy", header("(" * 5000 + ")" * 5000))]),
    "a header of 1 MB": lambda f: archive([("x.npy", claims("(3, 4)" + " " * 10**6, version=2) + bytes(48))]),
    "another version": lambda f: archive([("x.npy", claims((3, 4)).replace(b"NUMPY\1", b"NUMPY\3") + bytes(48))]),
    "strings": lambda f: archive([("x.npy", npy(np.array([["a", "b"]])))]),
    "records": lambda f: archive([("x.npy", npy(np.zeros((3, 4), [("a", "<f4"), ("b", "<i4")])))]),
    "too few numbers": lambda f: archive([("x.npy", claims((3, 5)) + bytes(48))]),
    "too many numbers": lambda f: archive([("x.npy", claims((3, 4)) + bytes(49))]),
    "a negative length": lambda f: archive([("x.npy", claims((-3, -4)) + bytes(48))]),
    "lengths past 64 bits": lambda f: archive([("x.npy", claims((2**62, 4)) + bytes(16))]),
    "a header of 40 TB": lambda f: archive([("x.npy", claims((TERA // 4,)))]),
    "40 TB in both places": lambda f: lies(),
    "a bomb of 2 GiB": lambda f: bomb(),
    "an array twice": lambda f: archive([("x.npy", npy()), ("x.npy", npy(SMALL + 1))]),
    "an array twice, once without ending": lambda f: archive([("x.npy", npy()), ("x", npy(SMALL + 1))]),
    "cut short": lambda f: archive([("x.npy", npy())])[:-30],
    "a bit flipped": lambda f: flipped(archive([("x.npy", npy())], zipfile.ZIP_STORED), 180),
    "locked": lambda f: flipped(archive([("x.npy", npy())]), archive([("x.npy", npy())]).index(b"PK\1\2") + 8),
    "bz2": lambda f: bz2.compress(npy()),
    "nothing": lambda f: b"",
}
BOMBS = ("a bomb of 2 GiB", "40 TB in both places")


@pytest.mark.parametrize("name", ["weights.npz", "data.npz"])
@pytest.mark.parametrize("kind", NPZ)
def test_npz(kind, name, tmp_path):
    (tmp_path / name).write_bytes(NPZ[kind](tmp_path))
    text = refused(tmp_path / name, tmp_path)
    assert ("unpacked; expected at most 1,073,741,824, or 100 times its own" in text) == (kind in BOMBS)


NPY = {
    "objects": lambda f: npy(np.array([Trap(f)], object)),
    "a pickle": pickled,
    "code for a header": NPZ["code for a header"],
    "code in a header": lambda f: claims(f"(open({str(f / 'sprung')!r}, 'w'),)"),
    "cut short": lambda f: npy(SMALL)[:-1],
    "a header of 40 TB": lambda f: claims((TERA // 8, 2)),
    "lengths past 64 bits": lambda f: claims((2**62, 4)) + bytes(64),
    "a negative length": lambda f: claims((-3, -4)) + bytes(48),
    "strings": lambda f: npy(np.array([["a", "b"]])),
    "complex numbers": lambda f: npy(SMALL + 1j),
    "nothing": lambda f: b"",
}


@pytest.mark.parametrize("kind", NPY)
def test_npy(kind, tmp_path):
    (tmp_path / "data.npy").write_bytes(NPY[kind](tmp_path))
    with warnings.catch_warnings(action="error"):
        refused(tmp_path / "data.npy", tmp_path)


def test_zeros_are_no_bomb_unless_they_are_many(tmp_path):
    """What a file of any size may take is stated, and may be changed; a file of 100 times less may hold anything."""
    zeros = np.zeros((500, 16, 16), np.uint8)
    np.savez_compressed(tmp_path / "data.npz", x=zeros)
    size = (tmp_path / "data.npz").stat().st_size
    assert 100 * size < zeros.nbytes
    chex.assert_trees_all_equal(data.arrays(str(tmp_path / "data.npz")).x, zeros[..., None], strict=True)
    text = f"has {size:,} bytes and takes 128,128 unpacked; expected at most 1,000, or 100 times its own: give a larger"
    with pytest.raises(DataError, match=text):
        data.arrays(str(tmp_path / "data.npz"), cache=1000)
    data.arrays(str(tmp_path / "data.npz"), cache=128_128)
    np.savez(tmp_path / "data.npz", x=zeros)  # as large as it says
    data.arrays(str(tmp_path / "data.npz"), cache=1000)


def test_an_array_that_is_not_asked_for_is_not_looked_at(tmp_path):
    (tmp_path / "data.npz").write_bytes(
        archive([("x.npy", npy()), ("about.npy", npy(np.array([Trap(tmp_path)], object))), ("y.npy", bomb())])
    )
    chex.assert_trees_all_equal(np.asarray(data.arrays(str(tmp_path / "data.npz"), labels=False).x), SMALL, strict=True)
    assert not (tmp_path / "sprung").exists()


# ---------------------------------------------------------------- safetensors

HEADERS = {
    "no JSON": safetensors(b"hello", bytes(8)),
    "binary": safetensors(bytes(range(256)), bytes(8)),
    "a list": safetensors([1], bytes(8)),
    "a pickle": pickle.dumps({"w": 1}),
    "nothing": b"",
    "8 bytes": struct.pack("<Q", 2),
    "a header of 2^63 bytes": safetensors({"w": tensor()}, bytes(8), 2**63),
    "a header of 40 TB": safetensors({"w": tensor()}, bytes(8), TERA),
    "a header longer than the file": safetensors({"w": tensor()}, bytes(8), 1000),
    "a header nested deep": safetensors(DEEP[100_000].encode(), bytes(8)),
    "a tensor of 40 TB": safetensors({"w": tensor(0, TERA, (TERA // 4,))}, bytes(8)),
    "offsets out of the file": safetensors({"w": tensor(8, 16)}, bytes(8)),
    "offsets backwards": safetensors({"w": tensor(8, 0)}, bytes(8)),
    "offsets below 0": safetensors({"w": tensor(-8, 0)}, bytes(8)),
    "overlapping": safetensors({"v": tensor(), "w": tensor(4, 12)}, bytes(12)),
    "the same place": safetensors({"v": tensor(), "w": tensor()}, bytes(8)),
    "a hole": safetensors({"v": tensor(), "w": tensor(16, 24)}, bytes(24)),
    "more than it says": safetensors({"w": tensor()}, bytes(16)),
    "less than it says": safetensors({"w": tensor()}, bytes(7)),
    "another size than its shape's": safetensors({"w": tensor(shape=(3,))}, bytes(8)),
    "lengths past 64 bits": safetensors({"w": tensor(shape=(2**62, 2**62))}, bytes(8)),
    "a negative length": safetensors({"w": tensor(shape=(-2,))}, bytes(8)),
    "an unknown kind of number": safetensors({"w": tensor(dtype="F33")}, bytes(8)),
    "a name twice": safetensors(
        f'{{"w": {json.dumps(tensor())}, "w": {json.dumps(tensor(8, 16))}}}'.encode(), bytes(16)
    ),
    "a name twice in the same place": safetensors(
        f'{{"w": {json.dumps(tensor())}, "w": {json.dumps(tensor())}}}'.encode(), bytes(8)
    ),
}


@pytest.mark.parametrize("kind", HEADERS)
def test_safetensors(kind, tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "weights.safetensors").write_bytes(HEADERS[kind])
    refused(tmp_path / "weights.safetensors", tmp_path, Mismatch)


def test_the_headers_above_are_bad_by_one_thing_each(tmp_path):
    pytest.importorskip("safetensors")
    (tmp_path / "a.safetensors").write_bytes(safetensors({"w": tensor()}, SMALL[0, :2].tobytes()))
    chex.assert_trees_all_equal(files.read(tmp_path / "a.safetensors")[0], {"w": SMALL[0, :2]}, strict=True)


# ---------------------------------------------------------------- files of torch


@pytest.mark.parametrize("kind", [Trap, System, Evaluated])
@pytest.mark.parametrize("form", ["archive", "legacy", *(f"pickle {n}" for n in range(pickle.HIGHEST_PROTOCOL + 1))])
def test_pickles_that_run_code(torch, form, kind, tmp_path, recwarn):
    path = tmp_path / "weights.pt"
    if form in ("archive", "legacy"):
        content = {"w": torch.ones(2), "about": kind(tmp_path)}
        torch.save(content, path, _use_new_zipfile_serialization=form == "archive")
    else:
        path.write_bytes(pickled(tmp_path, int(form[-1]), kind))
    assert "is not unpickled" in refused(path, tmp_path, Mismatch)
    assert not recwarn.list


def laughs(torch):
    """A hundred bytes a level, and twice the tensors at each."""
    content = {"w": torch.ones(1)}
    for _ in range(60):
        content = {"a": content, "b": content}
    return content


def holds_itself(torch):
    content = {}
    content["w"] = content
    return content


def nested(torch):
    content = {"w": torch.ones(1)}
    for _ in range(300):
        content = {"w": [content]}
    return content


def views(torch):
    shared = torch.zeros(2**18)
    return {f"w{i}": shared[i:] for i in range(2000)}


TENSORS = {
    "a view of 40 TB": lambda torch: {"w": torch.ones(1).expand(TERA // 4)},
    "2,000 views of 1 MB": views,
    "sparse": lambda torch: {"w": torch.ones(2, 2).to_sparse()},
    "a sparse one of 40 TB": lambda torch: {"w": torch.sparse_coo_tensor([[0]], [1.0], (TERA // 4,))},
    "without numbers": lambda torch: {"w": torch.ones(2, device="meta")},
    "quantized": lambda torch: {"w": torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)},
    "itself": holds_itself,
    "no names": lambda torch: torch.ones(2),
}


@pytest.mark.parametrize("kind", TENSORS)
def test_tensors_that_are_none(torch, kind, tmp_path):
    with warnings.catch_warnings(action="ignore"):
        torch.save(TENSORS[kind](torch), tmp_path / "weights.pt")
    assert (tmp_path / "weights.pt").stat().st_size < 10**7
    refused(tmp_path / "weights.pt", tmp_path, Mismatch)


def test_what_is_shared_is_read_once(torch, tmp_path):
    """2^60 tensors in 6 kB would take for ever one by one."""
    torch.save(laughs(torch), tmp_path / "a.pt")
    found = files.read(tmp_path / "a.pt")[0]
    for _ in range(60):
        assert found["a"] is found["b"]
        found = found["a"]
    chex.assert_trees_all_equal(found, {"w": np.ones(1, np.float32)}, strict=True)


ARCHIVES = {
    "a bomb of 2 GiB": lambda whole: says(archive([("a/data.pkl", bytes(10**5))]), 2**31),
    "a member twice": lambda whole: archive([("a/data.pkl", b"."), ("a/data.pkl", b".")]),
    "no pickle": lambda whole: archive([("a/other", b"hello")]),
    "cut short": lambda whole: whole[: len(whole) // 2],
    "a bit of its numbers": lambda whole: flipped(whole, whole.index(struct.pack("<f", 1.0) * 8) + 3, 6),
}


@pytest.mark.parametrize("kind", ARCHIVES)
def test_archives_of_torch(torch, kind, tmp_path):
    torch.save({"w": torch.ones(100)}, tmp_path / "weights.pt")
    (tmp_path / "weights.pt").write_bytes(ARCHIVES[kind]((tmp_path / "weights.pt").read_bytes()))
    text = refused(tmp_path / "weights.pt", tmp_path, Mismatch)
    assert ("unpacked; expected at most" in text) == (kind in BOMBS)


def test_a_flipped_bit_is_noticed_or_changes_nothing(torch, tmp_path):
    """Torch does not compare the checksums of its archives."""
    numbers = torch.arange(64, dtype=torch.float32)
    torch.save({"w": numbers}, tmp_path / "weights.pt")
    whole = (tmp_path / "weights.pt").read_bytes()
    first = whole.index(numbers.numpy().tobytes())
    noticed = 0
    for at in [*range(0, len(whole), 29), *range(first, first + 256, 5)]:
        (tmp_path / "weights.pt").write_bytes(flipped(whole, at, at % 8))
        try:
            found = files.read(tmp_path / "weights.pt")[0]
        except (Mismatch, OSError):
            noticed += 1
        else:
            assert not first <= at < first + 256
            chex.assert_trees_all_equal(found, {"w": numbers.numpy()}, strict=True)
    assert noticed > 52


def test_torch_that_is_too_old_is_not_given_a_file(tmp_path, monkeypatch):
    (tmp_path / "weights.pt").write_bytes(pickled(tmp_path))
    monkeypatch.setitem(sys.modules, "torch", types.SimpleNamespace(__version__="2.9.1", load=lambda *_: 1 / 0))
    with pytest.raises(ImportError, match="needs PyTorch 2.10 or newer"):
        files.read(tmp_path / "weights.pt")


def test_plain_settings_beside_tensors_still_open(torch, tmp_path):
    content = {"w": torch.ones(2), "args": argparse.Namespace(lr=1e-4), "list": [torch.zeros(1), (1, "a", None)]}
    torch.save(content, tmp_path / "a.pt")
    found = files.read(tmp_path / "a.pt")[0]
    assert found["args"].lr == 1e-4 and found["list"][1] == [1, "a", None]


# ---------------------------------------------------------------- networks


@pytest.mark.parametrize("kind", ["text", "whole numbers", "complex numbers"])
def test_weights_are_floating_numbers(kind):
    lines = [table.Entry(("params", "w"), "w", table.AS_IS)]
    w = {"text": np.full(3, "a"), "whole numbers": np.arange(3), "complex numbers": np.ones(3) * 1j}[kind]
    expected = {"params": {"w": np.ones(3, np.float32)}}
    with pytest.raises(Mismatch, match=f"^1 of other numbers: w {w.dtype} for params/w float32$"):
        table.to_variables(lines, {"w": w}, expected)


SAID = {
    "blocks": dict(layers_per_block=10**9),
    "blocks past 64 bits": dict(layers_per_block=10**30),
    "channels": dict(block_out_channels=[10**9, 10**9]),
    "levels": dict(block_out_channels=[32] * 10**5),
    "groups": dict(norm_num_groups=10**9),
    "channels of images": dict(in_channels=10**9),
    "text for blocks": dict(layers_per_block="2"),
    "text for channels": dict(block_out_channels=["32", "32"]),
    "an object for a block": dict(down_block_types=[{}, {}]),
}


@pytest.mark.parametrize("kind", SAID)
def test_a_config_of_a_network_that_none_has(kind, tmp_path):
    """Which would keep us busy for ever, and is refused before anything of it is made."""
    config = dict(
        in_channels=3, out_channels=3, block_out_channels=[32, 32], down_block_types=["DownBlock2D"] * 2,
        up_block_types=["UpBlock2D"] * 2, layers_per_block=1, norm_num_groups=32,
    )  # fmt: skip
    (tmp_path / "config.json").write_text(json.dumps(config | SAID[kind]))
    np.savez(tmp_path / "weights.npz", w=SMALL)
    with pytest.raises(Mismatch) as error:
        convert.load(tmp_path, "diffusers")
    assert str(error.value).isprintable()


def test_a_block_of_a_huge_number_is_one_block(tmp_path):
    module = DiT(width=16, depth=1, heads=2, patch=2, num_classes=3, channels=4, label_scale=1.0)
    shapes = jax.eval_shape(module.init, jax.random.key(0), *dit.example(module, {}))
    whole = table.to_tensors(dit.table(module), jax.tree.map(lambda s: np.zeros(s.shape, s.dtype), shapes))
    np.savez(tmp_path / "weights.npz", **whole | {"blocks.999999999999.mlp.fc1.bias": SMALL})
    with pytest.raises(Mismatch, match="missing: .*1 unexpected: blocks.999999999999.mlp.fc1.bias"):
        convert.load(tmp_path / "weights.npz", "dit", heads=2)


# ---------------------------------------------------------------- images, and sets of them


def saved():
    file = io.BytesIO()
    Image.fromarray(PIXELS[1]).save(file, "PNG")
    return file.getvalue()


PICTURES = {
    "a bomb of 400,000,000 pixels": lambda f: png(20_000, 20_000),
    "a bomb of 4e18 pixels": lambda f: png(2**31 - 1, 2**31 - 1),
    "no pixels": lambda f: png(0, 0),
    "cut short": lambda f: saved()[:150],
    "a wrong checksum": lambda f: flipped(saved(), 60),
    "a text": lambda f: b"hello",
    "nothing": lambda f: b"",
    "a pickle": pickled,
    "PostScript": lambda f: b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 8 8\n(sprung) (w) file\n",
    "SVG": lambda f: b'<svg xmlns="http://www.w3.org/2000/svg"><image href="file:///etc/passwd"/></svg>',
    "an archive": lambda f: archive([("a", b"b")]),
}


@pytest.mark.parametrize("kind", PICTURES)
def test_pictures(kind, tmp_path):
    (tmp_path / "picture.png").write_bytes(PICTURES[kind](tmp_path))
    refused(tmp_path / "picture.png", tmp_path)
    with pytest.warns(UserWarning, match="1 of 2 images in .* cannot be read and are left out"):
        assert data.folder(str(tmp_path), 8, corrupt="skip").size == 1


def test_the_limit_of_pixels_is_ours(monkeypatch):
    """Many a program switches Pillow's off."""
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", None)
    with pytest.raises(ValueError, match="too large: it has 400,000,000 pixels, expected at most 178,956,970"):
        data.images.from_bytes(png(20_000, 20_000))


def pictures(folder, n=12):
    for i in range(n):
        path = folder / ("cats", "dogs")[i % 2] / f"{i:02d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(PIXELS[i % 6]).save(path)
    return folder


LINKS = {
    "up": [("cats/up", "..")],
    "to its own folder": [("cats/here", ".")],
    "to each other": [("cats/other", "../dogs"), ("dogs/other", "../cats")],
    "of many, to the root": [(f"{kind}/{i}", "..") for kind in ("cats", "dogs") for i in range(5)],
    "beside": [("aaa", "cats")],
    "from elsewhere and back": [("more", "../elsewhere")],
}


@pytest.mark.parametrize("kind", LINKS)
def test_every_folder_is_read_once(kind, tmp_path):
    root = pictures(tmp_path / "set")
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "elsewhere" / "back").symlink_to(root)
    expected = data.folder(str(root), 8)
    for name, target in LINKS[kind]:
        (root / name).symlink_to(target)
    with pytest.warns(UserWarning, match="^folder: .* to folders read before left out, the first"):
        found = data.folder(str(root), 8)
    assert (found.size, found.classes) == (12, 2)
    chex.assert_trees_all_equal((found.x, found.labels), (expected.x, expected.labels), strict=True)


def test_a_linked_folder_is_read(tmp_path):
    pictures(tmp_path / "there")
    (tmp_path / "set").mkdir()
    for kind in ("cats", "dogs"):
        (tmp_path / "set" / kind).symlink_to(tmp_path / "there" / kind)
    with warnings.catch_warnings(action="error"):
        found, expected = data.folder(str(tmp_path / "set"), 8), data.folder(str(tmp_path / "there"), 8)
    chex.assert_trees_all_equal((found.x, found.labels), (expected.x, expected.labels), strict=True)


# ---------------------------------------------------------------- labels

LABELS = {
    "one of 10^6": (np.array([0, 1, 2, 10**6]), "go up to 1,000,000, and 4 of these classes occur; .*classes=1000001"),
    "of 2^31": (np.array([0, 1, 2, 2**31]), "expected whole numbers from 0"),
    "of 64 bits": (np.array([0, 1, 2, 2**64 - 1], np.uint64), "expected whole numbers from 0"),
    "negative": (np.array([0, 1, 2, -1]), "expected whole numbers from 0"),
    "floats": (np.array([0.0, 1, 2, 3]), "expected whole numbers from 0"),
    "one-hot": (np.eye(4, dtype=int), "expected whole numbers from 0"),
    "too few": (np.array([0, 1, 2]), "expected whole numbers from 0"),
    "none": (np.array(0), "expected whole numbers from 0"),
    "text": (np.array(["a", "b", "c", "d"]), "not numbers"),
}


@pytest.mark.parametrize("kind", LABELS)
def test_labels_that_are_none(kind, tmp_path):
    labels, text = LABELS[kind]
    np.savez(tmp_path / "data.npz", x=PIXELS[:4], labels=labels)
    with pytest.raises(DataError, match=text) as error:
        data.arrays(str(tmp_path / "data.npz"))
    assert str(error.value).isprintable()
    assert data.arrays(str(tmp_path / "data.npz"), labels=False).classes == 0


def test_classes_may_be_said(tmp_path):
    np.savez(tmp_path / "data.npz", x=PIXELS[:4], labels=np.array([0, 3, 3, 999]))
    path = str(tmp_path / "data.npz")
    assert data.arrays(path).classes == 1000  # as many as in ImageNet are common
    assert data.arrays(path, classes=2000).classes == 2000
    with pytest.raises(DataError, match="go up to 999; classes=10 expects 0 to 9"):
        data.arrays(path, classes=10)
    with pytest.raises(DataError, match="classes=10, and .* no labels"):
        data.arrays(path, classes=10, labels=False)
    np.savez(tmp_path / "data.npz", x=PIXELS[:4], labels=np.array([0, 1, 2, 10**6]))
    assert data.arrays(path, classes=10**6 + 1).classes == 10**6 + 1


# ---------------------------------------------------------------- sets of TensorFlow Datasets


def cut(path):
    path.write_bytes(path.read_bytes()[:70_000])


def change(path, old, new):
    assert old in path.read_text()
    path.write_text(path.read_text().replace(old, new))


def replaced(make):
    return lambda path: (path.unlink(), make(path))


RECORDS, FEATURES = "small-train.array_record-00000-of-00001", "features.json"
IMAGE = "tensorflow_datasets.core.features.image_feature.Image"
SETS = {
    "cut short": (RECORDS, cut),
    "not there": (RECORDS, Path.unlink),
    "a bit flipped": (RECORDS, lambda path: path.write_bytes(flipped(path.read_bytes(), 300))),
    "a fifo": (RECORDS, replaced(fifo)),
    "features from a fifo": (FEATURES, replaced(fifo)),
    "features nested deep": (FEATURES, lambda path: path.write_text(DEEP[100_000])),
    "features of code": (FEATURES, lambda path: change(path, IMAGE, "evil.Image")),
    "fewer classes than its records": (FEATURES, lambda path: change(path, '"numClasses": "3"', '"numClasses": "2"')),
    "info that is none": ("dataset_info.json", lambda path: path.write_bytes(bytes(range(256)))),
}


@pytest.fixture(scope="module")
def small(tmp_path_factory):
    directory = tmp_path_factory.mktemp("tfds")
    labels = np.arange(6) % 3
    data.write_tfds("small", directory, (8, 8, 3), 3, train=zip(PIXELS, labels, strict=True), test=[(PIXELS[0], 0)])
    return directory


@pytest.mark.parametrize("kind", SETS)
def test_prepared_sets(kind, small, tmp_path, monkeypatch):
    (tmp_path / "evil.py").write_text(f"open({str(tmp_path / 'sprung')!r}, 'w')")
    monkeypatch.syspath_prepend(tmp_path)
    shutil.copytree(small / "small", tmp_path / "small")
    name, damage = SETS[kind]
    damage(tmp_path / "small" / "1.0.0" / name)
    with pytest.raises(DataError) as error:
        data.tfds("small", data_dir=str(tmp_path)).x  # noqa: B018
    assert str(error.value).isprintable() and "small" in str(error.value)
    assert not (tmp_path / "sprung").exists()


def test_sets_of_other_registries_are_not_asked_for(tmp_path):
    with pytest.raises(DataError, match="'huggingface:a__b' is of another registry"):
        data.tfds("huggingface:a__b", data_dir=str(tmp_path))
