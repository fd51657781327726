"""One training run, however it is spread: devices, groups of devices, pmap, processes, slices. The same losses."""

import functools
import json
import os
import socket
import subprocess
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdiff
from jdiff import data, losses, parallel, runs, train
from jdiff.core.keys import split
from jdiff.denoisers.conditioning import drop_labels
from jdiff.train import checkpoint

ROOT = Path(__file__).parents[2]
STEPS, BATCH = 20, 32
CONFIG = f"""
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="tiny", data=Named("digits"), model=Named("unet_digits", {{"channels": 8, "heads": 2, "dropout": 0.1}}),
    schedule=Named("discrete", {{"table": "cosine", "T": 100}}), levels=Named("knots", {{"T": 100}}),
    train=Train(steps={STEPS}, batch={BATCH}, visit=1, save_every=10, flip=True), sample=Sample(steps=3, num=10),
)
"""
OBJECTIVE = dict(
    schedule=jdiff.discrete(jdiff.betas.cosine(100)), target=jdiff.targets.Eps(), levels=jdiff.levels.Knots(100)
)


@functools.cache
def parts():
    digits = data.digits()
    model = jdiff.create_model("unet_digits", channels=8, heads=2, num_classes=10)
    params = model.init(jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32))
    chunk = next(iter(digits.read(0, BATCH, [(0, STEPS)])))
    batches = (np.asarray(digits.to_model(chunk.x)), chunk.labels)

    def loss(params, key, x0, labels):
        k_loss, k_drop = split(key)
        return losses.denoising(model.apply, params, k_loss, x0, drop_labels(k_drop, labels, 0.1, 10), **OBJECTIVE)

    tx = optax.adamw(1e-3)
    return loss, tx, train.init_state(params, tx), batches


def trained(place_state=lambda s: s, place=lambda b: b, out=None, **keywords):
    """The losses of 20 steps in one loop."""
    loss, tx, state, batches = parts()
    loop = train.make_train_loop(train.make_train_step(loss, tx, 0.99, **keywords))
    options = {} if out is None else dict(out_shardings=out(state))
    _, metrics = jax.jit(loop, **options)(
        place_state(state), jax.random.key(1), place(batches), jnp.arange(STEPS), STEPS
    )
    return np.asarray(metrics["loss"])


@functools.cache
def alone():
    return trained()


def on_mesh(mesh, accumulate=1):
    def shardings(state):
        return parallel.fsdp(mesh, state, min_size=64) if "fsdp" in mesh.shape else parallel.replicated(mesh)

    return trained(
        lambda state: parallel.place(state, shardings(state)),
        lambda batches: parallel.shard_batch(mesh, batches, axis=1),
        lambda state: (shardings(state), parallel.replicated(mesh)),
        accumulate=accumulate,
    )


@pytest.mark.slow
def test_devices_groups_and_slices_agree():
    """1 device = 8 = 4 groups of 2 with the state divided = 4 slices, to 1e-5."""
    assert np.ptp(alone()) > 0.1  # it learns something
    for other in (on_mesh(parallel.mesh()), on_mesh(parallel.mesh(fsdp=2)), trained(accumulate=4)):
        np.testing.assert_allclose(other, alone(), rtol=1e-5)


@pytest.mark.slow
def test_pmap_agrees():
    loss, tx, state, (x, labels) = parts()
    step = jax.pmap(train.make_train_step(loss, tx, 0.99, axis_name="i"), axis_name="i", in_axes=(0, None, 0, 0))
    state, found = parallel.stack(state), []
    for i in range(STEPS):
        state, aux = step(state, jax.random.key(1), x[i].reshape(8, -1, *x.shape[2:]), labels[i].reshape(8, -1))
        found.append(float(aux["loss"][0]))
    np.testing.assert_allclose(found, alone(), rtol=1e-5)


def test_a_divided_state_takes_its_share_of_memory():
    """Over N devices, at most 1/N + 5% of the bytes of the state on each."""
    model = jdiff.create_model("unet_digits", num_classes=10)
    args = jax.random.key(0), jnp.zeros((1, 8, 8, 1)), jnp.zeros(1), jnp.zeros(1, jnp.int32)
    shapes = jax.eval_shape(lambda *args: train.init_state(model.init(*args), optax.adam(1e-3)), *args)
    state = jax.tree.map(lambda a: np.zeros(a.shape, a.dtype), shapes)
    whole = sum(a.nbytes for a in jax.tree.leaves(state))
    for count in (2, 4, 8):
        mesh = parallel.mesh(fsdp=count)
        placed = parallel.place(state, parallel.fsdp(mesh, state))
        held = dict.fromkeys(jax.devices(), 0)
        for shard in (shard for a in jax.tree.leaves(placed) for shard in a.addressable_shards):
            held[shard.device] += shard.data.nbytes
        assert max(held.values()) <= (1 / count + 0.05) * whole, (count, held)
        divided = [a for a in jax.tree.leaves(placed) if not a.is_fully_replicated]
        chex.assert_tree_is_sharded(divided, devices=list(mesh.devices.flat))


# ---------------------------------------------------------------- the script, in one process and in two


def run(where, name, processes=1, devices=8, *words):
    """The losses that scripts/train.py noted, trained in `processes` of `devices` in all."""
    config = where / "tiny.py"
    config.write_text(CONFIG)
    flags = f"--xla_force_host_platform_device_count={devices // processes}"
    env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS=flags)
    command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(config), "--run-dir", str(where / name), *words]
    if processes > 1:
        with socket.socket() as probe:
            probe.bind(("localhost", 0))
            command += ["--coordinator", f"localhost:{probe.getsockname()[1]}", "--processes", str(processes)]
    started = [
        subprocess.Popen(
            command + (["--process-id", str(rank)] if processes > 1 else []),
            env=env, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True,
        )
        for rank in range(processes)
    ]  # fmt: skip
    try:
        said = [process.communicate(timeout=400) for process in started]
    finally:
        for process in started:
            process.kill()
    assert all(process.returncode == 0 for process in started), said
    assert "trained to step" in said[0][0]
    # only the first one speaks, but for JAX's own transport
    assert not any(word in out for out, _ in said[1:] for word in ("parameters", "loss", "trained"))
    return [json.loads(line)["loss"] for line in (where / name / "metrics.jsonl").read_text().splitlines()]


@pytest.mark.slow
def test_the_script_in_two_processes(tmp_path):
    """1 device = 2 processes of 4 = 10 steps in two processes, the state divided, continued on 1 device."""
    want = run(tmp_path, "one", 1, 1)
    assert len(want) == STEPS
    np.testing.assert_allclose(run(tmp_path, "two", 2, 8), want, rtol=1e-5)
    run(tmp_path, "half", 2, 8, "--train.steps", "10", "--train.fsdp", "8")
    np.testing.assert_allclose(run(tmp_path, "half", 1, 1), want, rtol=1e-5)


# ---------------------------------------------------------------- records, Grain, eight devices, stopped and resumed

RECORDS = """
from jdiff.config import Config, Named, Sample, Train
config = Config(
    name="records", data=Named("tfds", {{"name": "tiles", "data_dir": {where!r}, "cache": {cache}}}),
    model=Named("unet_digits", {{"channels": 8, "heads": 2}}), schedule=Named("flow"), target=Named("velocity"),
    train=Train(steps=8, batch=16, visit=2, save_every=4, fsdp={fsdp}), sample=Sample(steps=3, num=10),
)
"""


@pytest.mark.slow
@pytest.mark.parametrize("fsdp", [1, 2])
def test_twice_half_is_the_whole_with_grain_on_eight_devices(tmp_path, fsdp):
    """2N steps = N + restore + N, bit for bit, read by Grain from array_record, or from memory: the same batches."""
    rng = np.random.default_rng(0)
    tiles = [(rng.integers(0, 256, (8, 8, 1), np.uint8), i % 10) for i in range(60)]
    data.write_tfds("tiles", tmp_path, (8, 8, 1), 10, train=tiles, test=tiles[:10])

    def trained(name, cache, *words):
        config = tmp_path / "config.py"
        config.write_text(RECORDS.format(where=str(tmp_path), cache=cache, fsdp=fsdp))
        env = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=8")
        command = [sys.executable, str(ROOT / "scripts" / "train.py"), str(config), "--run-dir", str(tmp_path / name)]
        result = subprocess.run([*command, *words], env=env, capture_output=True, text=True, timeout=400)
        assert result.returncode == 0 and "8 devices" in result.stdout, (result.stdout, result.stderr)
        run = runs.open_run(tmp_path / name)
        return checkpoint.restore(run.checkpoints, runs.new_state(run))

    whole = trained("whole", 0)
    trained("halves", 0, "--train.steps", "4")
    for other in (trained("halves", 0), trained("cached", 2**30)):
        assert int(other.step) == 8
        chex.assert_trees_all_equal(other, whole, strict=True)
