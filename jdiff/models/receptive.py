"""Which part of the input an output depends on: measured, and by the formula for plain stacks of convolutions."""

import math
from collections.abc import Sequence
from typing import NamedTuple

import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np

DRAWS = 4


class ReceptiveField(NamedTuple):
    """What the centre of an output depends on.

    Args:
        influence: (*sizes), how strongly each input position acts on the centre of the output, the largest being 1.
        size: of the smallest box around the positions whose influence is above the tolerance.
    """

    influence: np.ndarray
    size: tuple[int, ...]


def receptive_field(
    model: nn.Module,
    shape: tuple[int, ...],
    variables=None,
    label=None,
    cond=None,
    *,
    tolerance: float = 0.0,
    key: jax.Array | None = None,
    **options,
) -> ReceptiveField:
    """The input positions that the centre of the output depends on, by gradients at random inputs.

    The influence of a position is the absolute value of the gradient of a random combination of the centre's channels,
    summed over channels and inputs. Norms over positions and attention depend on all positions.

    Args:
        model: the network, called as (x, label, cond).
        shape: of x, (B, *sizes, C).
        variables: of a trained network. By default they are the initial ones with noise added, because layers that
            start at zero would hide what they will depend on.
        label: noise labels (B,); zeros by default.
        cond: class labels or what else the network takes.
        tolerance: influences up to this one do not count for the size.
        key: of the random inputs.
        options: arguments by name that go to the network.

    Returns:
        A `ReceptiveField`.

    Raises:
        ValueError: for a shape without positions, and where the gradients are not finite.
    """
    if len(shape) < 3:
        raise ValueError(f"receptive_field: a shape is (B, *sizes, C), got {shape}; it has no positions")
    keys = jax.random.split(jax.random.key(0) if key is None else key, 4)
    label = jnp.zeros(shape[0]) if label is None else label
    # at a single input a ReLU may be off
    x = jax.random.normal(keys[0], (DRAWS * shape[0], *shape[1:]))
    label, cond = jax.tree.map(lambda a: jnp.tile(a, DRAWS), (label, cond))
    if variables is None:
        variables = dict(jax.jit(model.init)(keys[1], x, label, cond))
        leaves, tree = jax.tree.flatten(variables["params"])
        noise = jax.random.split(keys[2], len(leaves))
        noisy = [a + 0.1 * jax.random.normal(k, a.shape) for a, k in zip(leaves, noise, strict=True)]
        variables["params"] = jax.tree.unflatten(tree, noisy)

    @jax.jit
    def influence(variables, x, label, cond):
        def centre(x):
            out = model.apply(variables, x, label, cond, **options)
            at = out[(slice(None), *(n // 2 for n in out.shape[1:-1]))]
            return jnp.sum(at * jax.random.normal(keys[3], at.shape))

        return jnp.abs(jax.grad(centre)(x)).sum((0, -1))

    field = np.asarray(influence(variables, x, label, cond), np.float64)
    if not np.isfinite(field).all():
        raise ValueError("receptive_field: the gradients are not finite; give noise labels that the network accepts")
    field = field / max(field.max(), np.finfo(np.float64).tiny)
    inside = np.nonzero(field > tolerance)
    return ReceptiveField(field, tuple(int(i.max() - i.min() + 1) if i.size else 0 for i in inside))


def receptive_field_of(
    kernels: Sequence[int], strides: Sequence[int] | None = None, dilations: Sequence[int] | None = None
) -> int:
    """The receptive field of a stack of convolutions along one dimension, 1 + sum_l (k_l - 1) d_l prod_{i<l} s_i.

    Args:
        kernels: the widths k_l.
        strides: s_l; ones by default.
        dilations: d_l; ones by default.

    Returns:
        The number of input positions that an output depends on.

    >>> receptive_field_of([3, 3, 3]), receptive_field_of([3, 3, 3], strides=[2, 2, 1])
    (7, 15)
    """
    strides = [1] * len(kernels) if strides is None else strides
    dilations = [1] * len(kernels) if dilations is None else dilations
    layers = enumerate(zip(kernels, strides, dilations, strict=True))
    return 1 + sum((k - 1) * d * math.prod(strides[:i]) for i, (k, _, d) in layers)
