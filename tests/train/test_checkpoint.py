"""Checkpoints: what comes back is what went in, also from a directory with a damaged newest one."""

import functools
import json
import os
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import config as configs
from jdiff import parallel, runs, train
from jdiff.config import Config, Named
from jdiff.runs.run import state_of
from jdiff.train import checkpoint

TX = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
PARAMS = {"params": {"w": np.arange(12, dtype=np.float32).reshape(3, 4), "b": np.ones(3, np.float32)}}

PLANE = Config(
    name="plane", data=Named("scurve", dict(n=256)), model=Named("mlp", dict(features=4)),
    schedule=Named("vp", dict(beta_max=20.0)),
)  # fmt: skip


def state_at(step, extra=None):
    state = train.init_state(jax.tree.map(lambda a: a + step, PARAMS), TX, extra)
    return state.replace(step=jnp.asarray(step, jnp.int32))


same = functools.partial(chex.assert_trees_all_equal, strict=True)


def damage(directory: Path, step: int) -> None:
    """Cut every file of a checkpoint's data in half."""
    for path in (directory / str(step)).rglob("*"):
        if path.is_file() and path.parent.name != str(step):
            os.truncate(path, path.stat().st_size // 2)


def test_round_trip_and_keep(tmp_path):
    for step in (1, 2, 3, 4):
        assert checkpoint.save(tmp_path, state_at(step), keep=3) == step
    assert checkpoint.steps(tmp_path) == [2, 3, 4]
    same(checkpoint.restore(tmp_path, state_at(0)), state_at(4))
    step, ema = checkpoint.restore_ema(tmp_path, PARAMS, step=3)
    assert step == 3
    same(ema, state_at(3).ema)


def test_extra_collections_and_pmapped_state(tmp_path):
    state = state_at(5, {"stats": jnp.arange(3.0)})
    checkpoint.save(tmp_path, parallel.unstack(parallel.stack(state)))  # saved as on one device
    same(checkpoint.restore(tmp_path, state_at(0, {"stats": jnp.zeros(3)})), state)


def test_a_damaged_newest_is_passed_over(tmp_path):
    for step in (1, 2, 3):
        checkpoint.save(tmp_path, state_at(step))
    damage(tmp_path, 3)
    with pytest.warns(UserWarning, match=r"checkpoint 3 in .* is damaged .*; going on from 2"):
        same(checkpoint.restore(tmp_path, state_at(0)), state_at(2))
    with pytest.raises(checkpoint.CheckpointError, match="the last good one is 2") as caught:
        checkpoint.restore_ema(tmp_path, PARAMS)
    assert caught.value.last_good == 2
    checkpoint.set_aside(tmp_path, after=2)
    assert checkpoint.steps(tmp_path) == [1, 2] and (tmp_path / "3.damaged").is_dir()
    checkpoint.save(tmp_path, state_at(3))  # the step can be saved again
    same(checkpoint.restore(tmp_path, state_at(0)), state_at(3))


def test_a_deleted_file_is_damage_too(tmp_path):
    for step in (1, 2):
        checkpoint.save(tmp_path, state_at(step))
    (tmp_path / "2" / "params" / "_METADATA").unlink()
    with pytest.warns(UserWarning, match="checkpoint 2"):
        same(checkpoint.restore(tmp_path, state_at(0)), state_at(1))


def test_errors(tmp_path):
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoints in"):
        checkpoint.restore(tmp_path / "nothing", state_at(0))
    checkpoint.save(tmp_path, state_at(1))
    with pytest.raises(checkpoint.CheckpointError, match="no checkpoint 7 .* there are 1"):
        checkpoint.restore_ema(tmp_path, PARAMS, step=7)
    other = {"params": {"w": jnp.zeros((2, 2)), "b": jnp.ones(3)}}
    with pytest.raises(checkpoint.CheckpointError, match=r"another model .*w has shape \(3, 4\), expected \(2, 2\)"):
        checkpoint.restore(tmp_path, train.init_state(other, TX))
    with pytest.raises(checkpoint.CheckpointError, match="missing ema.params.c"):
        checkpoint.restore_ema(tmp_path, {"params": {"c": jnp.zeros(2)}})
    damage(tmp_path, 1)
    with pytest.raises(checkpoint.CheckpointError, match="every checkpoint .* is damaged"):
        checkpoint.restore(tmp_path, state_at(0))


# ---------------------------------------------------------------- in the background


def test_a_writer_writes_what_save_does(tmp_path):
    """Saved at once or in the background, also when the state is donated away meanwhile: the same checkpoint."""
    bump = jax.jit(lambda state: jax.tree.map(lambda a: a + 1, state), donate_argnums=0)
    state = state_at(0)
    with checkpoint.Writer(tmp_path, keep=2, keep_every=4) as writer:
        for step in range(1, 8):
            state = bump(state)
            assert writer.save(state, dict(about=step)) == step
    assert checkpoint.steps(tmp_path) == [4, 6, 7]  # the newest two, and the multiple of four
    same(checkpoint.restore(tmp_path, state_at(0)), state)
    assert [checkpoint.read_note(tmp_path, step) for step in (6, 7, 8)] == [dict(about=6), dict(about=7), {}]
    checkpoint.save(tmp_path / "plain", state)
    same(checkpoint.restore(tmp_path / "plain", state_at(0)), state)


def test_older_ones_stay_until_the_newer_is_complete(tmp_path):
    with checkpoint.Writer(tmp_path, keep=1) as writer:
        writer.save(state_at(1))
        writer.wait()
        writer.save(state_at(2))
        assert 1 in checkpoint.steps(tmp_path)
    assert checkpoint.steps(tmp_path) == [2]


def test_writer_errors(tmp_path):
    with pytest.raises(ValueError, match="keep is a number of checkpoints, at least 1, or None for all; got 0"):
        checkpoint.Writer(tmp_path, keep=0)
    with pytest.raises(ValueError, match="keep_every is a number of steps, at least 1, or None; got 0"):
        checkpoint.save(tmp_path, state_at(1), keep_every=0)


FULL = """
import resource, signal, sys
import numpy as np, optax
from jdiff import train
from jdiff.runs.run import state_of
from jdiff.train import checkpoint
tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adam(1e-3))
params = {"params": {"w": np.ones((3, 4), np.float32), "b": np.ones(3, np.float32)}}
state = train.init_state(params, tx)
noise = np.random.default_rng(0).normal(size=(300, 1000))
large = state.replace(step=np.int32(2), params={f"w{i}": noise + i for i in range(20)})
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
resource.setrlimit(resource.RLIMIT_FSIZE, (2**20, resource.RLIM_INFINITY))
try:
    checkpoint.save(sys.argv[1], large)
except OSError as error:
    print(error)
resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
checkpoint.save(sys.argv[1], state.replace(step=np.int32(3)))
"""


def test_a_full_disk_harms_no_earlier_checkpoint(tmp_path):
    """A file system that takes no more bytes: one clear line, and what was there restores; then all goes on."""
    checkpoint.save(tmp_path, state_at(1))
    command = [sys.executable, "-c", FULL, str(tmp_path)]
    result = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    (line,) = result.stdout.splitlines()
    assert "cannot write checkpoint 2 in" in line and "earlier checkpoints are intact, the last is 1" in line, line
    assert result.stderr == ""  # TensorStore's threads are still at the other arrays when the first fails
    assert checkpoint.steps(tmp_path) == [1, 3]
    same(checkpoint.restore(tmp_path, state_at(0), step=1), state_at(1))


# ---------------------------------------------------------------- the config in the note


@pytest.fixture(scope="module")
def noted(tmp_path_factory):
    """A run with a checkpoint that notes its config, untrained, and its state."""
    run = runs.build(tmp_path_factory.mktemp("noted"), PLANE)
    state = state_of(run, jax.tree.map(lambda a: np.ones(a.shape, a.dtype), runs.like(run)))
    checkpoint.save(run.checkpoints, state, note=dict(config=configs.to_dict(PLANE)))
    return run, state


def changed(run, *names, value):
    """The run, with another value of a setting, by its names from the outermost."""
    config = configs.to_dict(run.config)
    at = config
    for name in names[:-1]:
        at = at[name]
    at[names[-1]] = value
    return runs.build(run.directory, configs.from_json(json.dumps(config)))


def test_a_run_is_what_its_checkpoint_notes(noted):
    """Whether the config was edited or lost: one that trains or samples otherwise is refused."""
    noted, state = noted
    same(runs.restore_ema(noted)[1], state.ema)
    edited = changed(noted, "schedule", "args", "beta_max", value=10.0)
    said = "checkpoint 0 in .* is of another run: schedule.args.beta_max was 20.0 and is now 10.0; put config.json back"
    for ask in (runs.restore_ema, runs.check_noted):
        with pytest.raises(configs.ConfigError, match=said):
            ask(edited)
    faster = changed(noted, "train", "lr", value=0.5)
    runs.restore_ema(faster)  # samples do not depend on it
    with pytest.raises(configs.ConfigError, match="train.lr was 0.001 and is now 0.5"):
        runs.check_noted(faster)
    runs.check_noted(faster, ignore=["train"])
    checkpoint.save(noted.checkpoints, state.replace(step=jnp.int32(1)))  # without a note
    with pytest.raises(configs.ConfigError, match="checkpoint 0 .* train.lr"):
        runs.check_noted(faster)
    runs.check_noted(runs.build(noted.directory / "new", PLANE))
    path = noted.checkpoints / "0" / "_CHECKPOINT_METADATA"
    path.write_text(path.read_text().replace('"lr": 0.001', '"rate_of_old": 0.001'))
    with pytest.warns(checkpoint.CheckpointWarning, match="noted in checkpoint 0 .* is not compared: .*rate_of_old"):
        runs.check_noted(faster)  # written by a version with other settings
