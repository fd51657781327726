"""Placement: meshes, shards and copies, and that the training step is the same function under all of them."""

import functools
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
from jax.sharding import AxisType, PartitionSpec

from jdiff import parallel, train
from jdiff.core.keys import BatchKey, positions

P = PartitionSpec
TX = optax.sgd(1e-2, momentum=0.9)
KEY = jax.random.key(1)
RNG = np.random.default_rng(0)
PARAMS = {
    "w": np.float32(RNG.normal(size=(24, 48)) / 5), "v": np.ones((48, 8), np.float32), "b": np.ones(8, np.float32),
}  # fmt: skip
DATA = np.float32(RNG.normal(size=(32, 24)))


def loss(params, key, data, cond):
    """A loss with noise by position: a sine of the row in the global batch, which compiles in no time."""
    rows, _ = positions(key, len(data))
    out = jnp.tanh((data + jnp.sin(7.0 * rows)[:, None]) @ params["w"]) @ params["v"] + params["b"].sum()
    each = jnp.mean((out - 1) ** 2, axis=1)
    return each.mean(), {"each": each}


@functools.cache
def one_device():
    """(state, aux) after three steps on one device."""
    state, step = train.init_state(PARAMS, TX), jax.jit(train.make_train_step(loss, TX, 0.9))
    for _ in range(3):
        state, aux = step(state, KEY, DATA)
    return state, aux


assert_close = functools.partial(chex.assert_trees_all_close, rtol=1e-5, atol=1e-5)


# ---------------------------------------------------------------- placement


def test_mesh_is_auto():
    mesh = parallel.mesh()
    assert mesh.size == 8 and mesh.axis_types == (AxisType.Auto,)
    assert parallel.mesh(jax.devices()[:2], "model").shape == {"model": 2}


def test_shard_batch():
    mesh = parallel.mesh()
    batch = {"x": DATA, "key": jax.random.split(KEY, 32)}
    sharded = parallel.shard_batch(mesh, batch)
    chex.assert_tree_is_sharded(sharded, devices=jax.devices())
    for i, shard in enumerate(sharded["x"].addressable_shards):
        np.testing.assert_array_equal(shard.data, DATA[4 * i : 4 * i + 4])
    assert sharded["key"].sharding.spec == P("data")
    with pytest.raises(ValueError, match="a batch of 30 does not divide over 8 devices"):
        parallel.shard_batch(mesh, DATA[:30])
    with pytest.raises(ValueError, match="found a number"):
        parallel.shard_batch(mesh, {"x": DATA, "scale": jnp.ones(())})


@pytest.mark.parametrize("devices", [1, 8])
def test_copies_may_be_donated(devices):
    """device_put shares memory where it can; a replicated state that is donated must not take its source along."""
    state = train.init_state(PARAMS, TX)
    mesh = parallel.mesh(jax.devices()[:devices])
    step = jax.jit(train.make_train_step(loss, TX, 0.9), donate_argnums=0)
    for copy in (parallel.replicate(mesh, state), parallel.place(state, parallel.fsdp(mesh, state))):
        step(copy, KEY, parallel.shard_batch(mesh, DATA))
        assert copy.params["w"].is_deleted()
        chex.assert_trees_all_equal(state.params, PARAMS)


def test_stack_and_unstack():
    tree = {"a": jnp.arange(3.0), "b": jnp.int32(2)}
    stacked = jax.pmap(lambda t: t)(parallel.stack(tree))
    chex.assert_shape((stacked["a"], stacked["b"]), [(8, 3), (8,)])
    chex.assert_trees_all_equal(parallel.unstack(stacked), tree, strict=True)
    chex.assert_shape(parallel.stack(tree, jax.devices()[:2])["a"], (2, 3))


def test_fsdp_takes_the_largest_axis_that_divides():
    mesh = parallel.mesh()
    tree = {
        "both": (8, 16), "first": (16, 8), "odd": (9, 40), "none": (9, 7), "small": (8,), "number": (), "even": (8, 8),
    }  # fmt: skip
    specs = {
        name: parallel.fsdp(mesh, jax.ShapeDtypeStruct(shape, jnp.float32), min_size=9).spec
        for name, shape in tree.items()
    }
    assert specs == {
        "both": P(None, "data"), "first": P("data"), "odd": P(None, "data"), "none": P(), "small": P(), "number": P(),
        "even": P("data"),
    }  # fmt: skip


def test_a_mesh_of_two_axes():
    mesh = parallel.mesh(fsdp=2)
    assert mesh.shape == {"data": 4, "fsdp": 2}
    sharded = parallel.shard_batch(mesh, DATA)
    assert {shard.data.shape for shard in sharded.addressable_shards} == {(4, 24)}  # over all eight devices
    stack = parallel.shard_batch(mesh, DATA.reshape(2, 16, 24), axis=1)
    assert {shard.data.shape for shard in stack.addressable_shards} == {(2, 2, 24)}
    spec = parallel.fsdp(mesh, jax.ShapeDtypeStruct((6, 4), jnp.float32), min_size=9).spec
    assert spec == P("fsdp")
    with pytest.raises(ValueError, match="8 devices do not divide into groups of fsdp = 3"):
        parallel.mesh(fsdp=3)
    with pytest.raises(ValueError, match="a batch of 2 does not divide over 8 devices"):
        parallel.shard_batch(mesh, DATA[:8].reshape(4, 2, 24), axis=1)


def test_initialize_wants_all_or_nothing(monkeypatch):
    for name in ("SLURM_PROCID", "OMPI_COMM_WORLD_SIZE", "TPU_WORKER_HOSTNAMES", "KUBERNETES_SERVICE_HOST"):
        monkeypatch.delenv(name, raising=False)
    assert parallel.initialize() is False
    with pytest.raises(ValueError, match="all three"):
        parallel.initialize("localhost:1234")
    with pytest.raises(ValueError, match="expected a coordinator HOST:PORT and an id from 0 to 1"):
        parallel.initialize("localhost", 2, 2)


@pytest.mark.parametrize(
    "environment",
    [
        dict(SLURM_PROCID="0", SLURM_NTASKS="2"), dict(OMPI_COMM_WORLD_SIZE="4"), dict(TPU_WORKER_HOSTNAMES="a,b"),
        dict(KUBERNETES_SERVICE_HOST="10.0.0.1", JOB_COMPLETION_INDEX="0"),
    ],
)  # fmt: skip
def test_launchers_are_recognised(environment, monkeypatch):
    called = []
    monkeypatch.setattr(jax.distributed, "initialize", lambda *args, **limits: called.append(args))
    for name, value in environment.items():
        monkeypatch.setenv(name, value)
    parallel.initialize()
    assert called == [()]


def test_values_of_one_process():
    mesh = parallel.mesh(fsdp=4)
    tree = parallel.place(PARAMS, parallel.fsdp(mesh, PARAMS, min_size=1))
    chex.assert_trees_all_equal(parallel.host(tree), PARAMS, strict=True)
    assert all(isinstance(leaf, np.ndarray) for leaf in jax.tree.leaves(parallel.host(tree)))
    assert parallel.anywhere(True) and not parallel.anywhere(False)


# ---------------------------------------------------------------- one function, however it is run


@pytest.mark.parametrize("accumulate", [1, 4])
def test_fsdp_trains_like_one_device(accumulate):
    mesh = parallel.mesh()
    state = train.init_state(PARAMS, TX)
    shardings = parallel.fsdp(mesh, state, min_size=1)
    state = parallel.place(state, shardings)
    chex.assert_shape(state.opt_state[0].trace["w"].addressable_shards[0].data, (24, 6))  # an eighth of the memory
    step = chex.assert_max_traces(train.make_train_step(loss, TX, 0.9, accumulate=accumulate), n=1)
    step = jax.jit(step, donate_argnums=0, out_shardings=(shardings, None))
    for _ in range(3):
        state, aux = step(state, KEY, parallel.shard_batch(mesh, DATA))
    assert jax.tree.map(lambda a: a.sharding, state) == shardings
    chex.assert_tree_is_sharded((state.params, state.ema), devices=jax.devices())
    assert_close((state, aux), one_device(), strict=True)


@pytest.mark.parametrize("accumulate", [1, 2])
@pytest.mark.parametrize("check", [True, False])
def test_shard_map_trains_like_one_device(accumulate, check):
    """The mean gradient, not the sum over devices that shard_map makes of gradients of replicated parameters."""
    mesh = parallel.mesh()
    local = train.make_train_step(loss, TX, 0.9, axis_name="data", accumulate=accumulate)
    aux_specs = {"each": P("data"), "loss": P(), "grad_norm": P()}
    step = jax.jit(
        jax.shard_map(
            lambda state, data: local(state, KEY, data), mesh=mesh, in_specs=(P(), P("data")),
            out_specs=(P(), aux_specs), check_vma=check,
        )
    )  # fmt: skip
    state = train.init_state(PARAMS, TX)
    for _ in range(3):
        state, aux = step(state, DATA)
    assert_close((state, aux), one_device(), strict=True)


def test_pmap_runs_the_loop():
    """The loop of many steps inside a pmap, each device taking its own rows of the data that all hold."""
    loop = train.make_train_loop(train.make_train_step(loss, TX, 0.9, axis_name="data"))
    loop = jax.pmap(loop, axis_name="data", in_axes=(0, None, None, 1, None), out_axes=(0, None))
    index = np.broadcast_to(np.arange(32).reshape(1, 8, 4), (5, 8, 4))
    state, metrics = loop(parallel.stack(train.init_state(PARAMS, TX)), KEY, (DATA, None), index, 3)
    want, aux = one_device()
    assert_close(state, parallel.stack(want), strict=True)
    assert_close({name: values[2] for name, values in metrics.items()}, {name: aux[name] for name in metrics})


def test_pmap_tells_each_loss_its_rows_and_averages_collections():
    def watched(params, key, data, cond, extra):
        assert isinstance(key, BatchKey) and key.size == 32
        rows, _ = positions(key, len(data))
        extra = {"mean": data.mean(), "steps": extra["steps"] + 1}
        return data.mean() * params["b"].sum(), {"rows": rows, "extra": extra}

    step = train.make_train_step(watched, TX, 0.9, axis_name="data", accumulate=2)
    extra = {"mean": jnp.zeros(()), "steps": jnp.int32(0)}
    state, aux = jax.pmap(step, axis_name="data", in_axes=(0, None, 0))(
        parallel.stack(train.init_state(PARAMS, TX, extra)), KEY, DATA.reshape(8, 4, 24)
    )
    np.testing.assert_array_equal(aux["rows"], np.arange(32).reshape(8, 4))
    np.testing.assert_array_equal(state.extra["steps"], np.full(8, 2))  # collections pass from slice to slice
    last_slices = DATA.reshape(8, 2, 2, 24)[:, 1].mean()
    np.testing.assert_allclose(state.extra["mean"], np.full(8, last_slices), rtol=1e-5)  # equal on all devices


PROCESS = """
import sys
import jax
jax.config.update("jax_cpu_collectives_implementation", "gloo")
rank = int(sys.argv[4])
jax.distributed.initialize(f"localhost:{sys.argv[3]}", 2, rank)
sys.path[:0] = sys.argv[1:3]
import test_parallel as t
from jdiff.train import checkpoint
mesh = t.parallel.mesh()
data = t.parallel.shard_batch(mesh, t.DATA[16 * rank : 16 * rank + 16])
fresh = t.train.init_state(t.PARAMS, t.TX)
for kind in ("replicated", "fsdp"):
    shardings = t.parallel.fsdp(mesh, fresh, min_size=1)
    state = t.parallel.replicate(mesh, fresh) if kind == "replicated" else t.parallel.place(fresh, shardings)
    out = jax.tree.map(lambda a: a.sharding, state)
    step = jax.jit(t.train.make_train_step(t.loss, t.TX, 0.9), donate_argnums=0, out_shardings=(out, None))
    for _ in range(2):
        state, _ = step(state, t.KEY, data)
    checkpoint.save(f"{sys.argv[5]}/{kind}", state)
    state, _ = step(checkpoint.restore(f"{sys.argv[5]}/{kind}", state), t.KEY, data)
    checkpoint.save(f"{sys.argv[5]}/{kind}", state)
"""


@pytest.mark.slow
def test_two_processes_train_like_one_device(tmp_path):
    """Two processes of four devices: batches by parts, state replicated or sharded, a checkpoint and resume midway."""
    from jdiff.train import checkpoint

    with socket.socket() as probe:
        probe.bind(("localhost", 0))
        port = probe.getsockname()[1]
    here = Path(__file__).parent
    environment = dict(os.environ, JAX_PLATFORMS="cpu", XLA_FLAGS="--xla_force_host_platform_device_count=4")
    command = [sys.executable, "-c", PROCESS, str(here), str(here.parents[1]), str(port)]
    processes = [
        subprocess.Popen([*command, str(rank), str(tmp_path)], env=environment, stderr=subprocess.PIPE, text=True)
        for rank in (0, 1)
    ]
    try:
        errors = [process.communicate(timeout=120)[1] for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert [process.returncode for process in processes] == [0, 0], errors
    want, _ = one_device()
    for kind in ("replicated", "fsdp"):
        assert checkpoint.steps(tmp_path / kind) == [2, 3]
        assert_close(checkpoint.restore(tmp_path / kind, want), want, strict=True)
