"""Weights in 8 bits: kernels as whole numbers with a scale for each output channel, floating where they are used."""

import fnmatch
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.checks import check_is
from jdiff.core.pytrees import known, noun
from jdiff.core.trees import named_leaves

# the first and the last layer: few numbers, whose errors nothing after them, or before them, makes up for
FIRST_AND_LAST = ("params/in/*", "params/patches/*", "params/out/*")


@noun
class Int8:
    """A kernel of 8 bits: values times scale.

    Attributes:
        values: whole numbers from -127 to 127, int8, (..., out).
        scale: of each output channel, float32, (out,).
    """

    values: Any
    scale: Any

    def floating(self) -> jax.Array:
        """The kernel, (..., out), in float32."""
        return self.values.astype(self.scale.dtype) * self.scale.reshape((1,) * (self.values.ndim - 1) + (-1,))


def quantize(
    apply: Callable[..., Any], params: Any, *, keep: Sequence[str] = FIRST_AND_LAST
) -> tuple[Callable[..., Any], Any]:
    """Bring the kernels of a trained network to 8 bits, for `jdiff.denoiser` and all that follows.

    For each output channel, scale = max |w| / 127 and w becomes round(w / scale) scale: no weight moves by more than
    half of its scale. The network computes as before, with kernels that are made floating inside `apply`. All leaves
    that are named `kernel` and have two axes or more are brought to 8 bits; embeddings, biases, norms and gains stay.

    Args:
        apply: the network, `apply(params, x, label, cond)`, or any function whose first argument is params.
        params: its parameters, a pytree of arrays.
        keep: names of kernels that stay as they are, as "params/middle*"; * stands for any text.

    Returns:
        (apply, params): a network and parameters in place of those given.

    Raises:
        ValueError: for a name in `keep` that no kernel has, for a kernel that is not finite, and where there is no
            kernel to bring to 8 bits.
    """
    check_is("apply", apply, Callable, "a function apply(params, ...)")
    if not known(params):
        raise ValueError("the parameters are traced or on other machines; quantize outside of jit, grad and vmap")
    leaves = named_leaves(params)
    kernels = [name for name, leaf in leaves.items() if _is_kernel(name, leaf)]
    for pattern in keep if keep is not FIRST_AND_LAST else ():
        if not fnmatch.filter(kernels, pattern):
            known_names = ", ".join(kernels[:3]) or "none"
            raise ValueError(f"keep={pattern!r} is the name of no kernel; there is {known_names}")
    chosen = {name for name in kernels if not any(fnmatch.fnmatchcase(name, pattern) for pattern in keep)}
    if not chosen:
        raise ValueError(
            f"there is no kernel to bring to 8 bits among {len(leaves)} leaves; all are kept, or are 8 bits"
        )
    small = [_small(name, leaf) if name in chosen else leaf for name, leaf in leaves.items()]

    def apply_small(params, *args, **kwargs):
        return apply(floating(params), *args, **kwargs)

    return apply_small, jax.tree.unflatten(jax.tree.structure(params), small)


def floating(params: Any) -> Any:
    """Parameters with their kernels of 8 bits made floating, in the structure that they had before `quantize`."""

    def is_small(leaf):
        return isinstance(leaf, Int8)

    return jax.tree.map(lambda leaf: leaf.floating() if is_small(leaf) else leaf, params, is_leaf=is_small)


def _is_kernel(name: str, leaf) -> bool:
    return name.rpartition("/")[2] == "kernel" and leaf.ndim > 1 and jnp.issubdtype(leaf.dtype, jnp.floating)


def _small(name: str, kernel) -> Int8:
    w = np.asarray(kernel, np.float32)
    if not np.isfinite(w).all():
        raise ValueError(f"{name} is not finite")
    scale = np.abs(w).max(tuple(range(w.ndim - 1))) / np.float32(127)
    values = np.rint(w / np.where(scale > 0, scale, 1)).clip(-127, 127)
    return Int8(jnp.asarray(values, jnp.int8), jnp.asarray(scale))
