"""Checkpoints under stress: each file damaged in turn, SIGKILL while saving, resume bit for bit, other devices."""

import asyncio
import contextlib
import json
import logging
import os
import re
import shutil
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
import tensorstore

from jdiff import parallel, train
from jdiff.core.keys import normal
from jdiff.train import checkpoint
from jdiff.train.checkpoint import CheckpointError

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
    arguments = [str(here), str(here.parents[1]), str(tmp_path / "a"), str(tmp_path / "b")]
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
        lost = file.name == "_CHECKPOINT_METADATA" and step == 2  # nothing to compare with
        assert len(said) == (step == 1 or lost), (file, said)
        if lost:
            assert said[0].endswith("is unverified: its checksums are missing")
        else:
            assert all("is damaged (" in s and s.endswith("going on from 1") for s in said)
        skipped += step == 1
        shutil.rmtree(directory)
    assert skipped >= 8  # three items of at least a manifest, an index and the numbers, less what lies inline
    assert capfd.readouterr().err == ""  # nothing of Orbax's own tracebacks


def move(directory, old, new):
    (directory / old).rename(directory / new)


def swap(a, b):
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


def edit(change):
    """Change the record of checkpoint 2 by `change(record)`."""

    def harm(directory):
        path = directory / "2" / "_CHECKPOINT_METADATA"
        about = json.loads(path.read_text())
        change(about["custom_metadata"])
        path.write_text(json.dumps(about))

    return harm


def as_old(record):
    """A record as it was before checkpoints held their step."""
    del record["step"], record["record_crc32"]


def without_sums(record):
    as_old(record)
    for path in [path for path in record["crc32"] if path.startswith("ema")]:
        del record["crc32"][path]


def copy_item(directory):
    shutil.rmtree(directory / "2" / "params")
    shutil.copytree(directory / "1" / "params", directory / "2" / "params")


def copy_item_unseen(directory):
    copy_item(directory)
    (directory / "2" / "_CHECKPOINT_METADATA").unlink()


def only_files(directory):
    shutil.rmtree(directory / "2")
    (directory / "2").mkdir()
    (directory / "2" / "commit_success.txt").write_text("")


EARLIER = "is unverified: it is of an earlier version, which took the step from the directory's name"
LOST = "is unverified: its checksums are missing"
OTHERS = ("\u00b2", "\u0663", "07", "-3", "1e3", "9" * 12)
CASES = {  # harm to a directory with checkpoints 1 and 2: (restored, restored average, what is said); None: an error
    "renamed": (lambda d: move(d, "2", "9"), 1, None, "9 .*it holds step 2, not 9: it was renamed"),
    "in another's place": (lambda d: shutil.rmtree(d / "1") or move(d, "2", "1"), None, None, "holds step 2, not 1"),
    "swapped": (lambda d: swap(d / "1", d / "2"), None, None, "holds step 1, not 2.*holds step 2, not 1"),
    "empty": (lambda d: (d / "7").mkdir(), 2, 2, "7 .*nothing is stored in it"),
    "emptied": (only_files, 1, 1, "2 .*nothing is stored in it"),
    "a file": (lambda d: (d / "7").write_text("7"), 2, 2, "7 .*it is not a directory"),
    "a link to nothing": (lambda d: (d / "7").symlink_to("nowhere"), 2, 2, "7 .*it is a link to nothing"),
    "other names": (lambda d: [(d / name).mkdir() for name in OTHERS], 2, 2, ""),
    "another's item": (copy_item, 1, 2, "2 .*params.* does not match its checksum"),
    "another's item, unseen": (copy_item_unseen, 2, 2, f"2 .*{LOST}"),
    "no record": (lambda d: (d / "2" / "_CHECKPOINT_METADATA").unlink(), 2, 2, f"2 .*{LOST}"),
    "no JSON": (lambda d: (d / "2" / "_CHECKPOINT_METADATA").write_bytes(b"\xff"), 2, 2, f"2 .*{LOST}"),
    "deep JSON": (lambda d: (d / "2" / "_CHECKPOINT_METADATA").write_text("[" * 10**5), 2, 2, f"2 .*{LOST}"),
    "other JSON": (lambda d: (d / "2" / "_CHECKPOINT_METADATA").write_text("[1]"), 2, 2, f"2 .*{LOST}"),
    "no sums": (edit(lambda r: (as_old(r), r.pop("crc32"))), 2, 2, f"2 .*{LOST}"),
    "some sums": (edit(without_sums), 2, 2, r"2 .*is unverified: 3 of \d+ arrays have no checksum to compare with"),
    "an old one": (edit(as_old), 2, 2, f"2 .*{EARLIER}"),
    "another step noted": (edit(lambda r: r.update(step=7)), 1, None, "2 .*its record does not match its checksum"),
    "another note": (edit(lambda r: r["note"].update(a=1)), 1, None, "2 .*its record does not match its checksum"),
    "no step noted": (edit(lambda r: r.pop("step")), 1, None, "2 .*its record does not match its checksum"),
}


@pytest.mark.parametrize("case", CASES)
def test_a_checkpoint_is_what_it_says(two, tmp_path, case, capfd):
    """Not its directory's name decides what it is; what cannot be verified is used with a warning, not in silence."""
    harm, step, average, said = CASES[case]
    directory = shutil.copytree(two, tmp_path / "copy")
    harm(directory)
    for want, ask in (
        (step, lambda: checkpoint.restore(directory, at(0))),
        (average, lambda: checkpoint.restore_ema(directory, PARAMS)),
    ):
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            try:
                got = ask()
            except CheckpointError as error:
                assert want is None and re.search(said, str(error)) and "\n" not in str(error), error
                assert error.last_good == (None if step is None else 1)
                continue
        found = got[0] if isinstance(got, tuple) else int(got.step)
        assert found == want
        if "unseen" not in case:
            expected = at(found).ema if isinstance(got, tuple) else at(found)
            chex.assert_trees_all_equal(got[1] if isinstance(got, tuple) else got, expected, strict=True)
        texts = [str(w.message) for w in caught]
        assert all(w.category is checkpoint.CheckpointWarning for w in caught)
        silent = not said or case == "another's item" and isinstance(got, tuple)  # the average is as it was
        assert len(texts) == (not silent) and all(re.search(said, text) for text in texts), texts
    assert capfd.readouterr().err == ""


@pytest.mark.parametrize("thing", ["directory", "file", "link"])
def test_what_is_in_the_way_is_put_aside(two, tmp_path, thing):
    """A step can be saved where something else bears its name, and that is kept."""
    make = dict(
        directory=lambda path: path.mkdir(), file=lambda path: path.write_text("7"),
        link=lambda path: path.symlink_to("nowhere"),
    )[thing]  # fmt: skip
    for aside in (lambda directory: checkpoint.set_aside(directory, after=2), lambda directory: None):
        directory = shutil.copytree(two, tmp_path / str(aside))
        for name in ("7", "7.damaged"):
            make(directory / name)
        aside(directory)
        assert checkpoint.save(directory, at(7)) == 7
        chex.assert_trees_all_equal(checkpoint.restore(directory, at(0), step=7), at(7), strict=True)
        assert sum(path.name.startswith("7.damaged") for path in directory.iterdir()) == 2


def test_parts_of_an_array_have_checksums(tmp_path):
    """Those of several processes hold parts: compared part by part, or cut out of the whole; else it is not known."""
    value = np.arange(128.0, dtype=np.float32).reshape(16, 8)
    mesh = parallel.mesh()
    spec = lambda *axes: jax.sharding.NamedSharding(mesh, jax.sharding.PartitionSpec(*axes))  # noqa: E731
    parts = jax.device_put(value, spec("data"))
    noted = json.loads(json.dumps(checkpoint._checksum(parts)))
    assert len(noted) == 8
    wrong = np.where(value == 77, 78, value)
    for leaf, answer in (
        (value, True), (parts, True), (jax.device_put(value, spec(None, "data")), None),
        (wrong, False), (jax.device_put(wrong, spec("data")), False),
    ):  # fmt: skip
        assert checkpoint._matches(leaf, noted) is answer
        assert checkpoint._matches(leaf, None) is None


class Fails:
    def __del__(self):
        raise RuntimeError("Event loop is closed")


def late_result():
    """A result of TensorStore's that comes after the event loop which awaited it was closed."""
    promise, future = tensorstore.Promise.new()

    async def wait():
        await future

    loop = asyncio.new_event_loop()
    loop.set_exception_handler(lambda loop, context: None)  # of the task that never ends
    loop.create_task(wait())
    loop.run_until_complete(asyncio.sleep(0))
    loop.close()
    promise.set_result(1)


def test_only_late_results_are_kept_quiet(monkeypatch, caplog):
    """What other code fails at while a checkpoint is read or written is reported as ever, and all is put back."""
    heard = []
    monkeypatch.setattr(sys, "unraisablehook", heard.append)
    ours = sys.unraisablehook
    late_result()
    assert len(heard) == 1  # what it looks like by itself
    with checkpoint._quiet(), checkpoint._quiet():
        late_result()
        Fails()
        logging.getLogger("absl").error("of somebody else")
    assert caplog.messages == ["of somebody else"]
    assert sys.unraisablehook is ours and len(heard) == 2 and heard[1].object is Fails.__del__
    for _ in range(2):
        with contextlib.suppress(OSError), checkpoint._quiet():
            raise OSError
    late_result()  # also after a call that failed
    Fails()
    assert len(heard) == 3


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
        command = [sys.executable, "-c", SAVER, str(here), str(here.parents[1]), str(tmp_path / "run")]
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
