"""A DDPM table as a schedule in continuous time."""

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, Number, as_time, safe_log
from jdiff.core.pytrees import noun
from jdiff.process.clock import Schedule


@noun
class Discrete(Schedule):
    """A DDPM table as a schedule: knots t_k = k/T for k = 1..T, variance preserving. Made by `jdiff.discrete(betas)`.

    log(sigma^2 / alpha^2) is linear in t between the knots, and constant outside [1/T, 1].

    Attributes:
        log_nsr: log(sigma^2 / alpha^2) at the knots, (T,).
        exact: above 0 if the last knot has alpha = 0 exactly.
    """

    log_nsr: Array
    exact: Number = 0.0
    bounded = True
    has_kinks = True

    @property
    def t_min(self):
        return 1 / self.log_nsr.shape[-1]

    def _read(self, t):
        t = as_time(t)
        T = self.log_nsr.shape[-1]
        place = t * T - 1
        # t moves at the end knots as it does inside, also where rounding puts them outside: a clip halves or kills that
        near = (place > -0.01) & (place < T - 0.99)
        moving = jnp.where(near, place - lax.stop_gradient(place), 0)
        place = lax.stop_gradient(jnp.clip(place, 0, T - 1)) + moving
        low = jnp.clip(jnp.floor(place).astype(int), 0, max(T - 2, 0))
        table = self.log_nsr.astype(t.dtype)
        below, above = table[low], table[jnp.minimum(low + 1, T - 1)]
        return below + (place - low.astype(t.dtype)) * (above - below), (t >= 1) & (self.exact > 0)

    def alpha(self, t):
        value, last = self._read(t)
        return jnp.where(last, 0, jnp.sqrt(jax.nn.sigmoid(-value)))

    def sigma(self, t):
        value, last = self._read(t)
        return jnp.where(last, 1, jnp.sqrt(jax.nn.sigmoid(value)))

    def time_at(self, alpha, sigma):
        value = 2 * (safe_log(sigma) - safe_log(alpha))
        table = self.log_nsr.astype(value.dtype)
        T = table.shape[-1]
        return jnp.interp(value, table, jnp.arange(1, T + 1, dtype=value.dtype) / T)
