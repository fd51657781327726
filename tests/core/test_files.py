"""Files that appear whole or not at all."""

import os

import pytest

from jdiff.core import files


def test_a_file_appears_whole_or_not_at_all(tmp_path):
    path = tmp_path / "deep" / "a.txt"
    files.write(path, lambda file: file.write(b"one"))

    def broken(file):
        file.write(b"half")
        assert files.leftovers(path.parent) and path.read_bytes() == b"one"
        raise KeyError("no more")

    with pytest.raises(KeyError):
        files.write(path, broken)
    assert path.read_bytes() == b"one" and os.listdir(path.parent) == ["a.txt"]
    usual = tmp_path / "usual"
    usual.write_bytes(b"")
    assert path.stat().st_mode == usual.stat().st_mode  # as the user's mask has it


def test_what_a_killed_write_leaves_is_found(tmp_path):
    """So that it can be removed: also what versions left that wrote by tempfile; nothing else is taken for it."""
    left = ["tmp0123abcd.png", "tmpa_z0k9qx.png", "tmp0123abcd"]
    for name in [*left, "tmp.png", "tmp0123abcd.tar.gz", "tmpfile.png", "0000100.png", "final.png"]:
        (tmp_path / name).write_bytes(b"")
    assert {path.name for path in files.leftovers(tmp_path)} == set(left)
    assert files.leftovers(tmp_path / "none") == []


@pytest.mark.parametrize("writer", ["files.write", "params_file.write_params", "plot.image_grid"])
def test_links_are_not_followed(tmp_path, writer, monkeypatch):
    """Neither one at the path, nor one at a name that a temporary file might have."""
    import numpy as np

    from jdiff.runs import plot
    from jdiff.train import params_file

    write = {
        "files.write": lambda path: files.write(path, lambda file: file.write(b"new")),
        "params_file.write_params": lambda path: params_file.write_params(path, {"a": np.ones(2)}),
        "plot.image_grid": lambda path: plot.image_grid(path, np.zeros((1, 4, 4, 1), np.uint8), 1),
    }[writer]
    victim, path = tmp_path / "victim", tmp_path / "a.npz"
    victim.write_bytes(b"old")
    monkeypatch.setattr(files.secrets, "token_hex", lambda n: "00000000")  # a name that was guessed
    for name in ("a.npz", "a.npz.tmp", "a.tmp"):
        (tmp_path / name).symlink_to(victim)
    write(path)
    assert victim.read_bytes() == b"old" and not path.is_symlink() and path.stat().st_size
    (tmp_path / "tmp00000000.npz").symlink_to(victim)
    with pytest.raises(OSError, match=r"cannot write .*a\.npz: File exists"):
        write(path)
    assert victim.read_bytes() == b"old"


def test_the_error_names_the_path(tmp_path):
    (tmp_path / "file").write_bytes(b"")
    (tmp_path / "folder" / "full").mkdir(parents=True)

    def full(file):
        raise OSError(28, "No space left on device")

    for path, fill, why in (
        (tmp_path / "file" / "a", lambda file: None, "(File exists|Not a directory)"),
        (tmp_path / "folder", lambda file: None, "Is a directory"),
        (tmp_path / "a", full, "No space left on device"),
    ):
        with pytest.raises(OSError, match=rf"^cannot write {path}: {why}$"):
            files.write(path, fill)
    assert sorted(os.listdir(tmp_path)) == ["file", "folder"]
