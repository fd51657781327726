"""Small networks for tests: variables of random numbers, without compiling."""

import functools

import jax
import jax.numpy as jnp
import numpy as np


@functools.cache
def compiled(module):
    """`module.apply` under jit: each module is compiled once for each form of its arguments."""
    return jax.jit(module.apply)


def checkpoints(module, *arguments):
    """How many parts of the network are computed again in the backward pass."""
    return str(jax.make_jaxpr(module.apply)(*arguments)).count("prevent_cse=")


def random_variables(module, *arguments, seed=0):
    """Variables in which everything matters, also what starts at zero, drawn by NumPy: nothing is compiled.

    Kernels have the variance 1 / fan in; scales and variances are around 1, all other vectors around 0.
    """
    draw = np.random.default_rng(seed)

    def fill(path, leaf):
        z = draw.normal(size=leaf.shape)
        if leaf.ndim > 1:
            z = z / np.sqrt(np.prod(leaf.shape[:-1]))
        else:
            z = 0.2 * z + (path[-1].key in ("scale", "var", "gain"))
        return jnp.asarray(z, leaf.dtype)

    return jax.tree_util.tree_map_with_path(fill, jax.eval_shape(module.init, jax.random.key(0), *arguments))
