"""Checkpoints under stress: each file damaged in turn, SIGKILL while saving, resume bit for bit, other devices."""

import os
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from jdiff import checkpoint, parallel, train
from jdiff.arrays import normal
from jdiff.checkpoint import CheckpointError

TX = optax.adam(1e-2)
PARAMS = {"a": {"kernel": jax.random.normal(jax.random.key(0), (64, 32)), "bias": jnp.ones(32)}, "b": [jnp.ones(3)]}
KEY = jax.random.key(1)


def at(step, params=PARAMS, tx=TX, extra=None):
    """A state at a step, its numbers a function of the step."""
    state = train.init_state(jax.tree.map(lambda a: a + step, params), tx, extra)
    return state.replace(step=jnp.asarray(step, jnp.int32))


def same(a, b):
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert x.dtype == y.dtype
        np.testing.assert_array_equal(x, y)
    assert jax.tree.structure(a) == jax.tree.structure(b)


@pytest.fixture(scope="module")
def two(tmp_path_factory):
    """A directory with checkpoints 1 and 2; copy it before you damage it."""
    directory = tmp_path_factory.mktemp("two")
    for step in (1, 2):
        checkpoint.save(directory, at(step))
    return directory


# ---------------------------------------------------------------- what is saved is restored


def test_round_trip_is_exact(tmp_path):
    """All dtypes and structures: dicts, lists, optax's named tuples, numbers; a state without extra collections too."""
    params = PARAMS | {"half": jnp.arange(5, dtype=jnp.bfloat16) / 3, "scalar": jnp.float32(jnp.pi)}
    tx = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(optax.linear_schedule(0.0, 1.0, 10)))
    for step, extra in ((5, {"mean": jnp.array([0.1, jnp.nan, -0.0]), "seen": jnp.int32(7)}), (6, None)):
        state = at(step, params, tx, extra)
        assert checkpoint.save(tmp_path / str(step), state) == step
        same(checkpoint.restore(tmp_path / str(step), at(0, params, tx, extra)), state)


def test_only_the_newest_are_kept(tmp_path):
    for step in (10, 20, 30):
        checkpoint.save(tmp_path, at(step), keep=2)
    assert checkpoint.steps(tmp_path) == [20, 30]
    same(checkpoint.restore(tmp_path, at(0)), at(30))
    same(checkpoint.restore(tmp_path, at(0), step=20), at(20))
    checkpoint.save(tmp_path, at(25), keep=1)  # of an earlier step than the newest: saved all the same
    assert checkpoint.steps(tmp_path) == [25, 30]
    checkpoint.set_aside(tmp_path, after=25)
    assert checkpoint.steps(tmp_path) == [25] and (tmp_path / "30.damaged").is_dir()
    for keep in (0, -1):
        with pytest.raises(ValueError, match="keep"):
            checkpoint.save(tmp_path, at(40), keep=keep)


def test_average_alone(two):
    """A sampling script has no optimiser: shapes are enough, and no device of the training run need exist."""
    for like in (jax.eval_shape(lambda: PARAMS), jax.tree.map(np.asarray, PARAMS)):
        step, average = checkpoint.restore_ema(two, like)
        assert step == 2
        same(average, at(2).ema)
        assert checkpoint.restore_ema(two, like, 1)[0] == 1


def test_pmapped_state_is_saved_once(tmp_path):
    state = at(3)
    step = jax.pmap(lambda s: s.replace(step=s.step + 1))
    assert checkpoint.save(tmp_path, step(parallel.stack(state))) == 4
    same(checkpoint.restore(tmp_path, state), state.replace(step=jnp.int32(4)))
    with pytest.raises(CheckpointError, match=r"parallel\.stack"):
        checkpoint.restore(tmp_path, parallel.stack(state))


def test_placement_is_that_of_like(tmp_path):
    """Saved from 8 devices, restored to one; saved from one, restored to 8, sharded; uncommitted stays uncommitted."""
    mesh = parallel.mesh()
    state = at(1)
    shardings = parallel.fsdp(mesh, state, min_size=1)
    sharded = parallel.place(state, shardings)
    checkpoint.save(tmp_path / "sharded", sharded)
    checkpoint.save(tmp_path / "single", state)
    for source in ("sharded", "single"):
        restored = checkpoint.restore(tmp_path / source, at(0))
        same(restored, state)
        assert not any(leaf.committed for leaf in jax.tree.leaves(restored))
        restored = checkpoint.restore(tmp_path / source, sharded)
        same(restored, state)
        assert jax.tree.map(lambda a: a.sharding, restored) == shardings
    assert sharded.params["a"]["kernel"].sharding.spec == jax.sharding.PartitionSpec("data")


# ---------------------------------------------------------------- resuming


def loss(params, key, data, cond):
    out = jnp.tanh(data @ params["a"]["kernel"] + params["a"]["bias"][None]) + params["b"][0].sum()
    return jnp.mean((out - normal(key, out.shape)) ** 2), {}


def make_loop():
    return jax.jit(train.make_train_loop(train.make_train_step(loss, TX, 0.9)), donate_argnums=0)


def run(loop, state, start, stop):
    """Steps start to stop, in visits of at most 4; the data's order is a function of the step."""
    data = jax.random.normal(jax.random.key(5), (40, 64))
    while start < stop:
        count = min(4, stop - start)
        index = (np.arange(4 * 8).reshape(4, 8) + 8 * start) % 40
        state, _ = loop(state, KEY, (data, None), index, count)
        start += count
    return state


def test_resume_is_exact(tmp_path):
    """10 steps are 3, a checkpoint in another directory of the world, and 7 more: bit for bit, with one program."""
    loop = make_loop()
    whole = run(loop, at(0), 0, 10)
    checkpoint.save(tmp_path, run(loop, at(0), 0, 3))
    restored = checkpoint.restore(tmp_path, at(0))
    assert int(restored.step) == 3
    same(run(loop, restored, 3, 10), whole)
    assert loop._cache_size() == 1


RESUME = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_resume as t
state = t.checkpoint.restore(sys.argv[3], t.at(0))
t.checkpoint.save(sys.argv[4], t.run(t.make_loop(), state, int(state.step), 10))
"""


def test_resume_in_another_process_is_exact(tmp_path):
    loop = make_loop()
    checkpoint.save(tmp_path / "a", run(loop, at(0), 0, 3))
    here = Path(__file__).parent
    arguments = [str(here), str(here.parent), str(tmp_path / "a"), str(tmp_path / "b")]
    subprocess.run([sys.executable, "-c", RESUME, *arguments], check=True, capture_output=True)
    same(checkpoint.restore(tmp_path / "b", at(0)), run(loop, at(0), 0, 10))


# ---------------------------------------------------------------- damage


def harm_delete(path):
    path.unlink()


def harm_cut(path):
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def harm_flip(path):
    raw = bytearray(path.read_bytes())
    raw[len(raw) * 2 // 3] ^= 0x10
    path.write_bytes(raw)


@pytest.mark.parametrize("harm", [harm_delete, harm_cut, harm_flip])
def test_any_file_may_be_damaged(two, tmp_path, harm, capfd):
    """Each file of the newest step in turn: what comes back is right, of step 2, or of step 1 with a warning."""
    skipped = 0
    for file in sorted(p.relative_to(two) for p in (two / "2").rglob("*") if p.is_file()):
        directory = tmp_path / "copy"
        shutil.copytree(two, directory)
        harm(directory / file)
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            restored = checkpoint.restore(directory, at(0))
        step = int(restored.step)
        same(restored, at(step))
        said = [str(w.message) for w in caught if "checkpoint 2 in" in str(w.message)]
        assert len(said) == (step == 1), (file, said)
        assert all("is damaged (" in s and s.endswith("going on from 1") for s in said)
        skipped += step == 1
        shutil.rmtree(directory)
    assert skipped >= 8  # three items of at least a manifest, an index and the numbers, less what lies inline
    assert capfd.readouterr().err == ""  # nothing of Orbax's own tracebacks


def test_damage_where_one_step_was_asked_for(two, tmp_path):
    directory = shutil.copytree(two, tmp_path / "copy")
    harm_cut(directory / "2" / "ema" / "manifest.ocdbt")
    for ask in (
        lambda: checkpoint.restore(directory, at(0), step=2),
        lambda: checkpoint.restore_ema(directory, PARAMS, 2),
        lambda: checkpoint.restore_ema(directory, PARAMS),  # samples are not drawn from an older model unasked
    ):
        with pytest.raises(
            CheckpointError, match=r"checkpoint 2 in .* is damaged \(.*\); the last good one is 1$"
        ) as e:
            ask()
        assert e.value.last_good == 1
    same(checkpoint.restore(directory, at(0), step=1), at(1))


def test_all_damaged(two, tmp_path):
    directory = shutil.copytree(two, tmp_path / "copy")
    for step in ("1", "2"):
        shutil.rmtree(directory / step / "params")
    with pytest.raises(CheckpointError, match=r"every checkpoint in .* is damaged \(step 2: .*params.*; step 1: .*\)"):
        checkpoint.restore(directory, at(0))
    assert checkpoint.restore_ema(directory, PARAMS)[0] == 2  # the average is as it was


def test_nothing_there(two, tmp_path):
    for directory in (tmp_path, tmp_path / "missing"):
        assert checkpoint.steps(directory) == []
        with pytest.raises(CheckpointError, match="no checkpoints in .*; train first"):
            checkpoint.restore(directory, at(0))
        with pytest.raises(CheckpointError, match="no checkpoints in|no checkpoint 5 in"):
            checkpoint.restore_ema(directory, PARAMS, 5)
    with pytest.raises(CheckpointError, match="no checkpoint 5 in .*; there are 1, 2"):
        checkpoint.restore(two, at(0), step=5)


@pytest.mark.parametrize(
    "like, difference",
    [
        (lambda: at(0, {"c": jnp.ones(2)}), r"missing ema.c and 3 more"),
        (lambda: at(0, {"a": PARAMS["a"]}), r"unexpected ema.b.0 and 3 more"),
        (
            lambda: at(0, PARAMS | {"b": [jnp.ones(4)]}),
            r"(params|ema|opt_state).*b.0 has shape \(3,\), expected \(4,\)",
        ),
        (lambda: at(0, tx=optax.sgd(0.1)), r"unexpected opt_state.0.count and 6 more"),
        (lambda: at(0, tx=optax.sgd(0.1, momentum=0.9)), r"missing opt_state.0.trace.a.bias and 2 more"),
        (lambda: at(0, extra={"mean": jnp.ones(2)}), r"missing extra.mean"),
    ],
)
def test_another_model_is_an_error_not_damage(two, like, difference):
    with pytest.raises(CheckpointError, match=rf"checkpoint 2 in .* is of another model or optimizer: {difference}$"):
        checkpoint.restore(two, like())


def test_an_unwritable_directory(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError):
        checkpoint.save(tmp_path / "file" / "run", at(1))


# ---------------------------------------------------------------- killed

SAVER = """
import sys
sys.path[:0] = sys.argv[1:3]
import test_resume as t
big = {"w": t.jax.random.normal(t.jax.random.key(0), (3000, 1000))}
step = max(t.checkpoint.steps(sys.argv[3]), default=0)
while True:
    step += 1
    print(step, flush=True)
    t.checkpoint.save(sys.argv[3], t.at(step, big), keep=2)
"""


@pytest.mark.slow
def test_killed_while_saving(tmp_path):
    """SIGKILL at 12 moments of a run that does nothing but save: the newest finished checkpoint restores, exactly."""
    big = {"w": jax.random.normal(jax.random.key(0), (3000, 1000))}
    here = Path(__file__).parent
    unfinished = 0
    for trial in range(12):
        command = [sys.executable, "-c", SAVER, str(here), str(here.parent), str(tmp_path / "run")]
        process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=dict(os.environ))
        for _ in range(2):
            started = int(process.stdout.readline())
        time.sleep(0.02 + 0.03 * trial)
        process.send_signal(signal.SIGKILL)
        process.wait()
        names = [p.name for p in (tmp_path / "run").iterdir()]
        unfinished += any(not name.isdigit() for name in names)
        with warnings.catch_warnings():
            warnings.simplefilter("error", UserWarning)  # a finished one is whole: nothing to walk past
            restored = checkpoint.restore(tmp_path / "run", at(0, big))
        assert int(restored.step) >= started - 1
        same(restored, at(int(restored.step), big))
    assert unfinished, "no trial hit a save"
