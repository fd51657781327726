"""How many particles are enough: KLD sampling."""

from collections.abc import Callable

import jax.numpy as jnp
import numpy as np

from jdiff.core.arrays import Array, Number
from jdiff.core.checks import check_positive, check_range
from jdiff.core.pytrees import concrete, noun, static
from jdiff.posterior.resampling import multinomial
from jdiff.process.clock import Schedule
from jdiff.process.forward import rates


def kld_count(k, error=0.05, z=2.326) -> Array:
    """How many particles keep the Kullback-Leibler distance to a law of k bins below `error`, with a confidence.

        n = (k - 1) / (2 error) (1 - 2 / (9 (k - 1)) + sqrt(2 / (9 (k - 1))) z)^3

    It is Wilson and Hilferty's form of chi^2_(k - 1) / (2 error).

    >>> round(float(kld_count(10)))
    217

    Args:
        k: the number of occupied bins, of any shape.
        error: the distance, positive.
        z: the quantile of the standard normal law at the confidence; 2.326 is 99%.

    Returns:
        n, not rounded, of the shape of k; 1 where k is 1 or less.

    Reference:
        Fox 2003, "Adapting the sample size in particle filters through KLD-sampling", eq. 7.
    """
    free = jnp.maximum(jnp.asarray(k, float) - 1, 1)
    part = 2 / (9 * free)
    return jnp.where(jnp.asarray(k) > 1, free / (2 * error) * (1 - part + jnp.sqrt(part) * z) ** 3, 1.0)


@noun
class KLD:
    """Adaptive numbers of particles for `smc`, at each resampling.

    Particles are drawn until there are as many as `kld_count` asks for, for the number of bins that they occupy. Bins
    are those of the projection of x_t / sqrt(alpha^2 + sigma^2), which has about the data's spread at each time.
    The program is the same for each count: particles out of use have no weight, and are computed nevertheless. So
    it says how many are needed; to save time, run with that many.

    Args:
        error: the Kullback-Leibler distance that is allowed, positive.
        z: the quantile of the standard normal law at the confidence; 2.326 is 99%.
        n_min: the least number of particles, 1 or more.
        low: where the bins begin, the same in each direction; what lies outside is in the outermost ones.
        high: where they end.
        n_bins: their number in each direction, 2 or more.
        project: a function from (n, ...) to (n, d) with a small d; None for the first two numbers of each particle.

    Raises:
        ValueError: for numbers out of range.

    Reference:
        Fox 2003, "Adapting the sample size in particle filters through KLD-sampling", algorithm 1.
    """

    error: Number = 0.05
    z: Number = 2.326
    n_min: Number = 16.0
    low: Number = -3.0
    high: Number = 3.0
    n_bins: int = static(default=24)
    project: Callable | None = static(default=None)

    def check(self):
        check_positive(self, error=self.error)
        check_range(self, -10, 10, z=self.z)
        check_range(self, 1, n_min=self.n_min)
        if concrete(self.low, self.high) and not self.low < self.high:
            raise ValueError(f"KLD: low must be below high, got {self.low} and {self.high}")
        if not (isinstance(self.n_bins, int) and self.n_bins >= 2):
            raise ValueError(f"KLD: n_bins is a whole number, 2 or more; got {self.n_bins}")

    def cells(self, x: Array, schedule: Schedule, t) -> tuple[Array, int]:
        """(the number of the bin of each particle (n,), how many bins there are) for x_t (n, ...)."""
        alpha, sigma = rates(schedule, t, x)
        x = x / jnp.hypot(alpha, sigma)
        places = x.reshape(len(x), -1)[:, :2] if self.project is None else self.project(x)
        if places.ndim != 2 or len(places) != len(x):
            raise ValueError(f"KLD: project returned {places.shape} for {x.shape}; expected ({len(x)}, d)")
        width = (self.high - self.low) / self.n_bins
        index = jnp.clip(jnp.floor((places - self.low) / width), 0, self.n_bins - 1).astype(int)
        powers = np.array([self.n_bins**d for d in range(places.shape[1])])
        return (index * powers[None]).sum(1), self.n_bins ** places.shape[1]

    def needed(self, key, log_weights: Array, cells: tuple[Array, int]) -> Array:
        """How many particles are enough, (), a whole number from n_min to n, by log weights and bins."""
        cell, size = cells
        n = len(cell)
        drawn, order = cell[multinomial(key, log_weights)], jnp.arange(n)
        first = jnp.full(size, n).at[drawn].min(order)
        occupied = jnp.cumsum(first[drawn] == order)
        enough = order + 1 >= jnp.maximum(kld_count(occupied, self.error, self.z), self.n_min)
        return jnp.where(enough.any(), jnp.argmax(enough) + 1, n)
