"""Meshes and placement on devices and processes: no other file builds a mesh.

The same pure step runs in three ways: under `jax.jit` with these shardings (data parallel, or FSDP, where the state is
divided too), under `jax.pmap` with an axis name, and in several processes under `jax.distributed`.
"""

import math
import os
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def initialize(
    coordinator: str | None = None,
    processes: int | None = None,
    process_id: int | None = None,
    timeout: float = 300.0,
    heartbeat: float = 100.0,
) -> bool:
    """Join the processes of a run, before anything else asks for a device.

    Slurm, Open MPI, TPU pods and indexed Kubernetes jobs are recognised by their environment. Elsewhere give the first
    three arguments, all of them.

    Args:
        coordinator: HOST:PORT of process 0.
        processes: how many processes there are.
        process_id: which one this is, from 0.
        timeout: seconds in which all processes must come. After them JAX aborts the process, with pages of its own on
            stderr.
        heartbeat: seconds without news of a process after which JAX aborts the others in the same way.

    Returns:
        Whether there are several processes.

    Raises:
        ValueError: only some of the three are given, or they have no meaning.
    """
    limits = dict(initialization_timeout=math.ceil(timeout), heartbeat_timeout_seconds=math.ceil(heartbeat))
    if coordinator is not None and processes is not None and process_id is not None:
        if ":" not in coordinator or not 0 <= process_id < processes:
            raise ValueError(
                f"expected a coordinator HOST:PORT and an id from 0 to {processes - 1}; "
                f"got {coordinator!r} and {process_id}"
            )
        _join(coordinator, processes, process_id, **limits)
    elif coordinator is not None or processes is not None or process_id is not None:
        raise ValueError("give the coordinator's HOST:PORT, the number of processes and this one's id, all three")
    elif in_cluster():
        _join(**limits)
    return jax.process_count() > 1


def _join(*address, **limits) -> None:
    jax.config.update("jax_enable_preemption_service", False)  # which takes SIGTERM for itself
    jax.distributed.initialize(*address, **limits)


def launched() -> tuple[int, int] | None:
    """(number of this process, number of processes), as Slurm or Open MPI say in the environment; None elsewhere."""
    for rank, count in (("SLURM_PROCID", "SLURM_NTASKS"), ("OMPI_COMM_WORLD_RANK", "OMPI_COMM_WORLD_SIZE")):
        numbers = os.environ.get(rank, ""), os.environ.get(count, "")
        if all(number.isdigit() for number in numbers):
            return int(numbers[0]), int(numbers[1])
    return None


def in_cluster() -> bool:
    """Whether the environment is that of one of several processes, as the launchers that JAX knows set it."""
    env = os.environ.get
    counts = (env("SLURM_NTASKS") if "SLURM_PROCID" in os.environ else None, env("OMPI_COMM_WORLD_SIZE"))
    pod = "," in env("TPU_WORKER_HOSTNAMES", "") or "MEGASCALE_COORDINATOR_ADDRESS" in os.environ
    job = "KUBERNETES_SERVICE_HOST" in os.environ and "JOB_COMPLETION_INDEX" in os.environ
    return pod or job or any(count is not None and count.isdigit() and int(count) > 1 for count in counts)


def mesh(devices=None, axis: str = "data", fsdp: int = 1) -> Mesh:
    """A mesh over devices, with one axis or with two.

    Batches are divided over all axes, and a state that `fsdp` places is divided over the last. The axes are of the type
    Auto, on which plain code runs unchanged.

    Args:
        devices: the devices; None for all of them.
        axis: the name of the first axis.
        fsdp: the number of devices along a second axis, named "fsdp"; 1 for no second axis.

    Raises:
        ValueError: the number of devices is no multiple of `fsdp`.
    """
    if devices is None:  # by process: each has the rows of its own devices
        devices = sorted(jax.devices(), key=lambda device: (device.process_index, device.id))
    devices = np.asarray(devices)
    if fsdp < 1 or devices.size % fsdp:
        raise ValueError(f"{devices.size} devices do not divide into groups of fsdp = {fsdp}")
    if fsdp == 1:
        return Mesh(devices, (axis,), axis_types=(AxisType.Auto,))
    return Mesh(devices.reshape(-1, fsdp), (axis, "fsdp"), axis_types=(AxisType.Auto,) * 2)


def shard_batch(mesh: Mesh, batch: Any, axis: int = 0) -> Any:
    """The batch with its axis of samples divided over the mesh.

    Args:
        mesh: the mesh.
        batch: a tree of arrays; under several processes, each gives its own part of the batch.
        axis: the axis of samples: 0, or 1 for a stack of batches.

    Raises:
        ValueError: the batch does not divide over the devices, or holds a number.
    """
    processes = jax.process_count()
    for leaf in jax.tree.leaves(batch):
        if jnp.ndim(leaf) <= axis:
            raise ValueError("a batch holds arrays with a leading axis of samples; found a number")
        if leaf.shape[axis] * processes % mesh.size:
            parts = f"{processes} times {leaf.shape[axis]}" if processes > 1 else f"{leaf.shape[axis]}"
            raise ValueError(f"a batch of {parts} does not divide over {mesh.size} devices")
    names = mesh.axis_names if len(mesh.axis_names) > 1 else mesh.axis_names[0]
    sharding = NamedSharding(mesh, PartitionSpec(*[None] * axis, names))
    if processes == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch)


def replicated(mesh: Mesh) -> NamedSharding:
    """The sharding of an array that every device of the mesh holds whole."""
    return NamedSharding(mesh, PartitionSpec())


def replicate(mesh: Mesh, tree: Any) -> Any:
    """The tree with a whole copy on every device of the mesh."""
    return place(tree, replicated(mesh))


def fsdp(mesh: Mesh, tree: Any, min_size: int = 4096) -> Any:
    """Shardings for fully sharded data parallelism: each array is divided along its largest axis that divides.

    Use `shardings = fsdp(mesh, state)` and `state = place(state, shardings)`, then
    `jax.jit(train_step, donate_argnums=0, out_shardings=(shardings, None))` on batches from `shard_batch`. The
    partitioner gathers parameters where they are used, and scatters gradients.

    Args:
        mesh: the mesh, over whose last axis arrays are divided.
        tree: a tree of arrays, or of their shapes.
        min_size: an array with fewer numbers is replicated, because dividing it costs more than it saves.

    Returns:
        A tree of shardings.

    Reference:
        ZeRO: Rajbhandari et al. 2019, arXiv:1910.02054.
    """
    axis = mesh.axis_names[-1]

    def sharding(leaf):
        sizes = [n if n % mesh.shape[axis] == 0 else 0 for n in leaf.shape]
        if leaf.size < min_size or not any(sizes):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * int(np.argmax(sizes)), axis))

    return jax.tree.map(sharding, tree)


def place(tree: Any, shardings: Any) -> Any:
    """A copy of the tree under shardings, one or a tree of them; donating the copy leaves the original alone."""
    # device_put shares memory where it can, even with may_alias=False: then donation would delete the original
    tree = jax.tree.map(lambda a: jnp.array(a, copy=True) if isinstance(a, jax.Array) else a, tree)
    return jax.device_put(tree, shardings)


def stack(tree: Any, devices=None) -> Any:
    """The tree with a leading axis of one copy per device, as `jax.pmap` takes it."""
    count = len(jax.local_devices() if devices is None else devices)
    return jax.tree.map(lambda a: np.broadcast_to(np.asarray(a)[None], (count, *np.shape(a))), tree)


def unstack(tree: Any) -> Any:
    """The first device's copy of a pmapped tree: what a checkpoint holds."""
    return jax.tree.map(lambda a: a[0], tree)


def host(tree: Any) -> Any:
    """The tree as whole NumPy arrays on every process; parts that other processes hold are gathered from them.

    All processes call this together.
    """

    def leaf(a):
        if isinstance(a, jax.Array) and not (a.is_fully_addressable or a.is_fully_replicated):
            from jax.experimental import multihost_utils

            return multihost_utils.process_allgather(a, tiled=True)
        return np.asarray(a.addressable_data(0) if isinstance(a, jax.Array) and a.is_fully_replicated else a)

    return jax.tree.map(leaf, tree)


def anywhere(flag: bool) -> bool:
    """Whether the flag is set in any process: all of them call this together, and wait for each other."""
    return bool(highest(bool(flag)))


def highest(number: int) -> int:
    """The largest of the processes' whole numbers: all of them call this together, and wait for each other."""
    if jax.process_count() == 1:
        return int(number)
    from jax.experimental import multihost_utils

    return int(multihost_utils.process_allgather(np.asarray(number, np.int32)).max())


def from_first(text: str, most: int = 1024) -> str:
    """The text, of at most `most` bytes, that process 0 gave; all processes call this together."""
    if jax.process_count() == 1:
        return text
    from jax.experimental import multihost_utils

    raw = np.frombuffer(text.encode().ljust(most, b"\0"), np.uint8)
    return bytes(multihost_utils.broadcast_one_to_all(raw)).rstrip(b"\0").decode()
