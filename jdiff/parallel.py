"""Meshes and placement: the only place that builds a mesh.

The same pure step runs under `jax.jit` with these shardings, or under `jax.pmap` with an axis name.
"""

from typing import Any

import jax
import numpy as np
from jax.sharding import AxisType, Mesh, NamedSharding, PartitionSpec


def mesh(devices=None, axis: str = "data") -> Mesh:
    """A mesh of one axis over the devices (all if None); Auto, so that plain code runs on it unchanged."""
    devices = np.asarray(jax.devices() if devices is None else devices)
    return Mesh(devices, (axis,), axis_types=(AxisType.Auto,))


def shard_batch(mesh: Mesh, batch: Any) -> Any:
    """Each array's leading axis over the mesh. Raises ValueError if it does not divide."""
    for leaf in jax.tree.leaves(batch):
        if leaf.shape[0] % mesh.size:
            raise ValueError(f"a batch of {leaf.shape[0]} does not divide over {mesh.size} devices")
    return jax.device_put(batch, NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))


def replicate(mesh: Mesh, tree: Any) -> Any:
    """A copy of the tree on every device of the mesh."""
    return jax.device_put(tree, NamedSharding(mesh, PartitionSpec()))


def stack(tree: Any, devices=None) -> Any:
    """The tree with a leading axis of one copy per device, as `jax.pmap` takes it."""
    count = len(jax.devices() if devices is None else devices)
    return jax.tree.map(lambda a: np.broadcast_to(np.asarray(a)[None], (count, *np.shape(a))), tree)


def unstack(tree: Any) -> Any:
    """The first device's copy of a pmapped tree: what a checkpoint holds."""
    return jax.tree.map(lambda a: a[0], tree)
