"""Which noise meets which data in training: `coupling(key, x0, eps) -> eps`, each (B, ...).

Noise that lies near its data makes straighter paths of x_0 to eps, which cross less. `key` is one key or a `BatchKey`.
Nothing is differentiated: a coupling chooses.
"""

import jax.numpy as jnp
import optax
from jax import lax

from jdiff.core.arrays import Array, expand
from jdiff.core.keys import fold, normal
from jdiff.core.pytrees import Noun, noun, static, varying


@noun
class Independent(Noun):
    """Noise as it was drawn, independent of the data: the product coupling of every derivation."""

    def __call__(self, key, x0, eps):
        return eps


@noun
class Nearest(Noun):
    """Of `candidates` noises drawn for each sample, eps among them, the one with the smallest |x_0 - eps|.

    By position: sample i is a function of (key, i) and its own data alone, so slices, devices and the whole batch
    agree. Given the data, the noise is then no longer standard normal. Over all data it is nearly so, and the less so
    the more candidates there are.

    Args:
        candidates: how many noises are drawn for each sample, eps included.

    Raises:
        ValueError: unless candidates is a whole number, 1 or more.

    Reference:
        Li et al. 2025, "Improved Immiscible Diffusion", arXiv:2505.18521 (KNN noise selection).
    """

    candidates: int = static(default=4)

    def check(self):
        whole = isinstance(self.candidates, int) and not isinstance(self.candidates, bool)
        if not whole or self.candidates < 1:
            raise ValueError(f"Nearest: candidates must be a whole number, 1 or more; got {self.candidates!r}")

    def __call__(self, key, x0, eps):
        def closer(best, j):
            eps, least = best
            other = normal(fold(key, j), x0.shape, eps.dtype)
            distance = _distance(x0, other)
            better = distance < least
            return (jnp.where(expand(better, eps) > 0, other, eps), jnp.where(better, distance, least)), None

        x0, eps = lax.stop_gradient((x0, eps))
        # one at a time: all candidates of a batch of images at once would not fit
        (eps, _), _ = lax.scan(closer, (eps, _distance(x0, eps)), jnp.arange(1, self.candidates))
        return eps


@noun
class Assignment(Noun):
    """The noises of the batch dealt out again so that the sum of |x_0 - eps|^2 is the least: exact optimal transport.

    The Hungarian algorithm, O(B^3), inside jit. It deals among the rows it is given: the whole batch under `jit`, also
    over a mesh; the device's part in a pmap; the slice with accumulation. There it is another, coarser coupling, and
    the results are not those of one batch.

    Raises:
        ValueError: when called inside a `jax.shard_map` that has not check_vma=False.

    Reference:
        Li et al. 2024, arXiv:2406.12303 (immiscible diffusion); Tong et al. 2023, arXiv:2302.00482, section 3.2, and
        Pooladian et al. 2023, arXiv:2304.14772 (minibatch optimal transport).
    """

    def __call__(self, key, x0, eps):
        if varying(x0, eps):
            raise ValueError(
                "Assignment: optax's algorithm fails jax.shard_map's check of what varies over the mesh; "
                "make the shard_map with check_vma=False, or train under jax.jit"
            )
        x0, eps = lax.stop_gradient((x0, eps))
        points = [a.reshape(len(a), -1).astype(jnp.float32) for a in (x0, eps)]
        cost = -jnp.matmul(points[0], points[1].T, precision=lax.Precision.HIGHEST)  # the squares are dealt out anyhow
        rows, columns = optax.assignment.hungarian_algorithm(jnp.nan_to_num(cost))  # nan would search for ever
        return eps[jnp.zeros_like(columns).at[rows].set(columns)]


def _distance(x0: Array, eps: Array) -> Array:
    """|x_0 - eps|^2, (B,), in float32."""
    apart = x0.astype(jnp.float32) - eps.astype(jnp.float32)
    return jnp.sum(apart**2, axis=tuple(range(1, x0.ndim)))
