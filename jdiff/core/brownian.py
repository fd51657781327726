"""One Brownian path whatever the step count: the noise of a step is an increment of the path.

Lévy's construction: W(0) = 0, W(1) is drawn, then the middle of each interval given its ends, of mean (W_a + W_b)/2 and
variance (b - a)/4, with a key per node. Reading W(t) walks down to t: nothing is stored, nothing calls the host.
Li et al. 2020, arXiv:2001.01328, section 4.
"""

import math

import jax
import jax.numpy as jnp
from jax import lax

from jdiff.core.arrays import Array, as_time, wide_dtype
from jdiff.core.keys import each, fold
from jdiff.core.pytrees import Noun, noun, static, vary_as


@noun
class BrownianTree(Noun):
    """One Brownian path per sample in place of a key: `sample(..., key=BrownianTree(key))` draws all noise from it.

    The step from t to s gets (W(t) - W(s)) / sqrt(t - s), with W on the schedule's own clock in [0, 1], so that 20, 40
    and 80 steps approximate one solution of the reverse SDE and differ less and less. Noise beyond t = 1, and that of
    steps that go up, is independent of the path.

    Args:
        key: one key, and then row i follows path (key, i), or (B,) keys.
        tol: a step shorter than this has less than its variance; each draw costs 2 log2(1 / tol) plain ones.

    Raises:
        ValueError: unless 2^-30 <= tol < 1.
    """

    key: Array
    tol: float = static(default=2.0**-24)

    def check(self):
        if not 2.0**-30 <= self.tol < 1:
            raise ValueError(f"BrownianTree: tol must be in [2^-30, 1), got {self.tol}")

    def rows(self, n: int) -> "BrownianTree":
        """The tree with one key per sample, (n,)."""
        return BrownianTree(each(self.key, n), self.tol)

    def over(self, i, t, s) -> "BrownianInterval":
        """The noise of step i, from t down to s, of a tree with one key per sample."""
        depth = math.ceil(-math.log2(self.tol))
        return BrownianInterval(fold(self.key, 0), fold(fold(self.key, 1), i), as_time(t), as_time(s), depth)


@noun
class BrownianInterval(Noun):
    """What a solver's step gets for a key: the stretch of each sample's path from t down to s."""

    path: Array
    fresh: Array
    t: Array
    s: Array
    depth: int = static()

    def normal(self, shape, dtype=jnp.float32) -> Array:
        """(W(t) - W(s)) / sqrt(t - s), (B, ...); constant under differentiation, as any drawn noise is."""
        if self.path.shape[:1] != tuple(shape[:1]):
            raise ValueError(f"{self.path.shape[0]} Brownian paths for a batch of {shape[0]}; one key per sample")
        wide = wide_dtype(dtype)
        t, s = lax.stop_gradient((as_time(self.t), as_time(self.s)))
        known = (t <= 1) & (s >= 0) & (s < t)
        ends = jnp.where(known, jnp.stack([t, s]), jnp.asarray([1, 0], t.dtype))
        scale = lax.rsqrt(ends[0] - ends[1]).astype(wide)

        def increment(path, fresh):
            above, below = jax.vmap(lambda time: _walk(path, time, shape[1:], wide, self.depth))(ends)
            return jnp.where(known, (above - below) * scale, jax.random.normal(fresh, shape[1:], wide))

        return jax.vmap(increment)(self.path, self.fresh).astype(dtype)

    def fold(self, data) -> Array:
        """Plain keys (B,), independent of the path."""
        return fold(self.fresh, data)

    def part(self, t, s, j: int) -> "BrownianInterval":
        """The stretch from t to s of the same path; `j` tells its fresh noise from that of other stretches."""
        return BrownianInterval(self.path, fold(self.fresh, j), as_time(t), as_time(s), self.depth)


def _walk(key, t, shape, dtype, depth: int) -> Array:
    """W(t) for one t in [0, 1]: `depth` halvings, then linear between the ends of the last interval."""
    position = t * 2.0**depth
    leaf = jnp.clip(position, 0, 2.0**depth - 1).astype(jnp.int32)
    rest = (position - leaf.astype(t.dtype)).astype(dtype)

    def halve(level, ends):
        left, right = ends
        node = (1 << level) | (leaf >> (depth - level))
        bump = jax.random.normal(jax.random.fold_in(key, node), shape, dtype)
        middle = 0.5 * (left + right) + 0.5 * jnp.exp2(-0.5 * jnp.asarray(level, dtype)) * bump
        upper = (leaf >> (depth - 1 - level)) & 1
        return jnp.where(upper, middle, left), jnp.where(upper, right, middle)

    last = jax.random.normal(jax.random.fold_in(key, 0), shape, dtype)
    left, right = lax.fori_loop(0, depth, halve, vary_as((jnp.zeros_like(last), last), t))
    return left + rest * (right - left)
