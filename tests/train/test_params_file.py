"""Files of parameters: what comes back is what went in, and damage is noticed (snapshots: test_posthoc.py)."""

import json

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.train import params_file
from jdiff.train.checkpoint import CheckpointError

PARAMS = {
    "params": {"dense": {"kernel": np.arange(6, dtype=np.float32).reshape(2, 3)}, "bias": [np.ones(3, jnp.bfloat16)]},
    "count": np.int32(7),
}


def test_round_trip(tmp_path):
    """In the structure and dtypes of what is asked for; NumPy has no bfloat16, so the file has float32."""
    path = tmp_path / "deep" / "a.npz"
    params_file.write_params(path, jax.tree.map(jnp.asarray, PARAMS), dict(about="a test"))
    chex.assert_trees_all_equal(params_file.load_params(path, PARAMS), PARAMS, strict=True)
    names = {
        "params/dense/kernel": PARAMS["params"]["dense"]["kernel"], "params/bias/0": np.ones(3, np.float32),
        "count": np.array(7, np.int32),
    }  # fmt: skip
    chex.assert_trees_all_equal(params_file.read(path), names, strict=True)
    with np.load(path) as archive:
        record = json.loads(archive["jdiff/record"].tobytes())
        assert set(archive.files) == {"jdiff/record", *(f"ema/{name}" for name in names)}
    assert record["about"] == "a test" and record["crc32"].keys() == names.keys()


def test_damage_is_noticed(tmp_path):
    """Any bit of the file, any cut: a clear error or, in bytes that mean nothing, the right values."""
    path = tmp_path / "a.npz"
    params_file.write_params(path, PARAMS)
    whole = path.read_bytes()
    right = params_file.read(path)
    noticed = 0
    list_of_members = whole.index(b"PK\x01\x02")
    bits = [(at, at % 8) for at in range(0, list_of_members, 5)]
    bits += [(at, bit) for at in range(list_of_members, len(whole)) for bit in range(at % 4, 8, 4)]
    for at, bit in bits:  # of the list of members, which no checksum covers, every fourth one
        flipped = bytearray(whole)
        flipped[at] ^= 1 << bit
        path.write_bytes(flipped)
        try:
            chex.assert_trees_all_equal(params_file.read(path), right, strict=True)
        except CheckpointError as error:
            noticed += 1
            assert str(path) in str(error) and "\n" not in str(error)
    assert noticed > len(bits) / 4
    for size in (0, 10, len(whole) // 2, len(whole) - 1):
        path.write_bytes(whole[:size])
        with pytest.raises(CheckpointError, match="is damaged"):
            params_file.read(path)


def test_errors(tmp_path):
    path = tmp_path / "a.npz"
    params_file.write_params(path, PARAMS)
    with pytest.raises(CheckpointError, match="is of another model: missing other"):
        params_file.load_params(path, PARAMS | {"other": np.ones(1)})
    with pytest.raises(CheckpointError, match="is of another model: unexpected count"):
        params_file.load_params(path, {"params": PARAMS["params"]})
    with pytest.raises(CheckpointError, match=r"params/bias/0 has shape \(3,\), expected \(2,\)"):
        params_file.load_params(path, PARAMS | {"params": PARAMS["params"] | {"bias": [np.ones(2)]}})
    with pytest.raises(CheckpointError, match="there is no .*none.npz"):
        params_file.read(tmp_path / "none.npz")
    with pytest.raises(OSError, match="cannot write .*b.npz"):
        params_file.write_params(path / "b.npz", PARAMS)
