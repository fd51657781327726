"""Potentials of Feynman-Kac steering: what the particles are weighed by on the way, of the rewards seen so far.

Each takes (before, reward), both (n,): the log potential up to the last time, 0 before the first, and the
log-likelihood or reward of the estimate at this time. It returns the log potential up to this time. At the end `smc`
puts the reward of x_0 in its place, so that the target is the same whichever was used.

Reference:
    Singhal et al. 2025, arXiv:2501.06848, section 3.2.
"""

import jax.numpy as jnp

from jdiff.core.arrays import Array


def difference(before: Array, reward: Array) -> Array:
    """The reward of the estimate now: each step is weighed by what the reward rose."""
    return reward


def maximum(before: Array, reward: Array) -> Array:
    """The largest reward so far, and 0 at least: a particle that once was good is kept."""
    return jnp.maximum(before, reward)


def total(before: Array, reward: Array) -> Array:
    """The sum of all rewards so far: a particle that was good all along is kept. It grows with the number of steps."""
    return before + reward
