"""Meshes and placement: the only place that builds a mesh.

The same pure step runs under `jax.jit` with these shardings (data parallel, or with the state sharded too: FSDP), under
`jax.pmap` with an axis name, and in several processes under `jax.distributed`.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def mesh(devices=None, axis: str = "data") -> Mesh:
    """A mesh of one axis over the devices (all if None); Auto, so that plain code runs on it unchanged."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(devices, (axis,), axis_types=(AxisType.Auto,))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Each array's leading axis over the mesh; under several processes, from each process its own part of the batch.

    Raises ValueError if it does not divide.
    """
    processes = jax.process_count()
    for leaf in jax.tree.leaves(batch):
        if not jnp.ndim(leaf):
            raise ValueError("a batch holds arrays with a leading axis of samples; found a number")
        if leaf.shape[0] * processes % mesh.size:
            parts = f"{processes} times {leaf.shape[0]}" if processes > 1 else f"{leaf.shape[0]}"
            raise ValueError(f"a batch of {parts} does not divide over {mesh.size} devices")
    sharding = NamedSharding(mesh, PartitionSpec(mesh.axis_names[0]))
    if processes == 1:
        return jax.device_put(batch, sharding)
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(sharding, np.asarray(a)), batch)


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of the tree on every device of the mesh."""
    return place(tree, NamedSharding(mesh, PartitionSpec()))


def fsdp(mesh: Mesh, tree: Any, min_size: int = 4096) -> Any:
    """Shardings of a tree of arrays: each one over its largest axis that divides, the small ones replicated.

    Fully sharded data parallelism: `state = place(state, s := fsdp(mesh, state))`, then
    `jax.jit(train_step, donate_argnums=0, out_shardings=(s, None))` on batches from `shard_batch`. The partitioner
    gathers parameters where they are used and scatters gradients: ZeRO, Rajbhandari et al. 2019, arXiv:1910.02054.
    `min_size`: numbers in an array below which sharding it costs more than it saves.
    """

    def sharding(leaf):
        sizes = [n if n % mesh.size == 0 else 0 for n in leaf.shape]
        if leaf.size < min_size or not any(sizes):
            return NamedSharding(mesh, PartitionSpec())
        return NamedSharding(mesh, PartitionSpec(*[None] * int(np.argmax(sizes)), mesh.axis_names[0]))

    return jax.tree.map(sharding, tree)


def place(tree: Any, shardings: Any) -> Any:
    """A copy of the tree under the shardings (one, or a tree of them); donating the copy leaves the original alone."""
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
