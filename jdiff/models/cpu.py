"""Convolutions, matrix products and attention in the forms that XLA:CPU compiles to fast code.

The values are those of the plain forms to rounding. The layers call these functions and know nothing of platforms: on
GPUs and TPUs `conv` and `dot_general` are JAX's own.

XLA:CPU brings convolutions into its fast form only in the entry computation of a program. Inside `lax.scan` or
`fori_loop` the gradients that JAX derives for a convolution fall to a naive loop, which is many times slower. `conv`
has a derivative rule of its own. Its transposes are again convolutions of the fast form or, for the gradient of the
kernel where that is possible, matrix products.
"""

import contextlib
import contextvars
import functools
import math
from collections.abc import Iterator, Sequence

import jax
import jax.numpy as jnp
from jax import lax
from jax.custom_derivatives import SymbolicZero

from jdiff.models.parts import map_parts, part_size

SPACE = "DHW"
EXTRA_COLUMN = "extra_column"  # the named scope of convolutions that make one column more than they keep

# A decorator: the backward pass computes the function again from its arguments. For a few operations on each number
# this is faster than writing the intermediate values to memory and reading them back. A compiler that knows better may
# still keep them.
recomputed = functools.partial(jax.checkpoint, prevent_cse=False)


_traced_for: contextvars.ContextVar[str | None] = contextvars.ContextVar("traced_for", default=None)


@contextlib.contextmanager
def traced_for(platform: str) -> Iterator[None]:
    """What is traced in the block is to run on `platform`, as "cpu" or "cuda", wherever it is traced."""
    token = _traced_for.set(platform)
    try:
        yield
    finally:
        _traced_for.reset(token)


def elsewhere() -> bool:
    """Whether what is traced now may run on another machine, so that this one's devices say nothing about it."""
    return _traced_for.get() is not None


def on_cpu() -> bool:
    """Whether programs run on the CPU unless told otherwise."""
    return (_traced_for.get() or jax.default_backend()) == "cpu"


# ---------------------------------------------------------------- matrix products


def dot_general(x: jax.Array, kernel: jax.Array, dimension_numbers, **options) -> jax.Array:
    """`lax.dot_general` of x (..., C) with a kernel (C, D), for the argument `dot_general` of Flax's Dense.

    On the CPU it is a product of two matrices. The gradient of a product with more axes asks XLA:CPU for transposed
    operands, which it computes anew, element by element, from all that they come from.
    """
    if not on_cpu():
        return lax.dot_general(x, kernel, dimension_numbers, **options)
    out = lax.dot_general(x.reshape(-1, x.shape[-1]), kernel, (((1,), (0,)), ((), ())), **options)
    return out.reshape(*x.shape[:-1], -1)


def pointwise(x: jax.Array, kernel: jax.Array) -> jax.Array:
    """The convolution of width 1, x (..., C) with a kernel (..., C, D), as a product of two matrices: (..., D)."""
    return (x.reshape(-1, x.shape[-1]) @ kernel.reshape(kernel.shape[-2:])).reshape(*x.shape[:-1], -1)


# ---------------------------------------------------------------- attention


def attention(q: jax.Array, k: jax.Array, v: jax.Array, mask: jax.Array | None = None) -> jax.Array:
    """softmax(q k^T / sqrt(D)) v, of as many samples at a time as the cache holds the logits of.

    Args:
        q: queries, (B, T, N, D).
        k: keys, (B, S, N, D).
        v: values, (B, S, N, D).
        mask: (B, S), True where a key may be seen, or None.

    Returns:
        (B, T, N, D).
    """
    (B, T, N, _), S = q.shape, k.shape[1]
    size = part_size(B, 2**20 // (N * T * S))
    if size == B:
        return _attention(q, k, v, mask)
    return map_parts(recomputed(_attention), size, q, k, v, mask)


def _attention(q, k, v, mask):
    dtype = jnp.promote_types(q.dtype, jnp.float32)
    q, k, v = (a.transpose(0, 2, 1, 3) for a in (q * q.shape[-1] ** -0.5, k, v))
    logits = jnp.einsum("bntd,bnsd->bnts", q, k, preferred_element_type=dtype)
    logits = logits if mask is None else jnp.where(mask[:, None, None], logits, -jnp.inf)
    weights = jnp.exp(logits - lax.stop_gradient(logits.max(-1, keepdims=True)))
    # the division by the sum of the weights comes last, where there are fewest numbers to divide
    out = jnp.einsum("bnts,bnsd->bntd", weights.astype(v.dtype), v, preferred_element_type=dtype)
    return (out / weights.sum(-1, keepdims=True)).astype(v.dtype).transpose(0, 2, 1, 3)


# ---------------------------------------------------------------- convolutions


def conv(x: jax.Array, kernel: jax.Array, strides: Sequence[int], padding: Sequence[tuple[int, int]]) -> jax.Array:
    """The convolution of a signal with a kernel, in 1, 2 or 3 dimensions.

    Args:
        x: (B, *sizes, C).
        kernel: (*widths, C, D).
        strides: one for each dimension.
        padding: the zeros before and after, for each dimension.

    Returns:
        (B, *sizes', D), where size' = (size + before + after - width) // stride + 1.
    """
    run = _conv_cpu if on_cpu() else _conv
    return run(x, kernel, tuple(strides), tuple(tuple(p) for p in padding))


def _layout(lhs: str, rhs: str, out: str, x) -> tuple[str, str, str]:
    space = SPACE[5 - x.ndim :]
    return lhs.replace("_", space), rhs.replace("_", space), out.replace("_", space)


def _conv(x, kernel, strides, padding):
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=_layout("N_C", "_IO", "N_C", x))


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3))
def _conv_cpu(x, kernel, strides, padding):
    if not _wants_extra_column(x, kernel, strides, padding):
        return _conv(x, kernel, strides, padding)
    rows, (left, right) = padding
    with jax.named_scope(EXTRA_COLUMN):
        out = _conv(x, kernel, strides, (rows, (left, right + 1)))
    return lax.slice_in_dim(out, 0, x.shape[2], axis=2)


def _keeps_size(x, kernel, strides, padding) -> bool:
    """Whether this is a convolution of images with odd widths that keeps their size."""
    odd = all(w % 2 and p == (w // 2, w // 2) for p, w in zip(padding, kernel.shape[:-2], strict=True))
    return x.ndim == 4 and odd and set(strides) == {1}


def _wants_extra_column(x, kernel, strides, padding) -> bool:
    """Whether to ask XLA:CPU for one column more than needed, which is cut off afterwards.

    XLA:CPU (jaxlib 0.10) has two libraries for convolutions. The one that it prefers leaves one of two cores idle below
    128 output channels, and is slow from 3 input channels. It does not take convolutions whose images come out larger
    than they went in.
    """
    return _keeps_size(x, kernel, strides, padding) and x.shape[2] >= 16 and max(kernel.shape[2:]) > 16


def _conv_cpu_jvp(strides, padding, primals, tangents):
    (x, kernel), (dx, dk) = primals, tangents
    run = functools.partial(lax.conv_general_dilated, window_strides=strides, padding=padding)
    terms = []
    if not isinstance(dx, SymbolicZero):
        run_dx = run
        if _wants_extra_column(x, kernel, strides, padding):  # the transpose, which is what runs, makes the column
            rows, (left, right) = padding
            run_dx = functools.partial(run, padding=(rows, (left, right - 1)))
            dx = jnp.pad(dx, ((0, 0), (0, 0), (0, 1), (0, 0)))
        terms.append(run_dx(dx, jnp.swapaxes(kernel, -1, -2), dimension_numbers=_layout("N_C", "_OI", "N_C", x)))
    if not isinstance(dk, SymbolicZero):
        products = _keeps_size(x, kernel, strides, padding) and isinstance(x.shape[0], int)
        terms.append(_tangent_by_products(x, dk) if products else _tangent_by_conv(run, x, dk))
    y = _conv_cpu(x, kernel, strides, padding)
    return y, sum(terms[1:], terms[0]) if terms else jnp.zeros_like(y)


_conv_cpu.defjvp(_conv_cpu_jvp, symbolic_zeros=True)


def _tangent_by_conv(run, x, dk):
    """The convolution of x with dk in layouts whose transpose with respect to dk is one of the fast form."""
    space, last = tuple(range(1, x.ndim - 1)), x.ndim - 1
    dk = jnp.moveaxis(dk, -2, 0)  # (I, *widths, O)
    out = run(x.transpose(last, *space, 0), dk, dimension_numbers=_layout("C_N", "I_O", "_NC", x))
    return jnp.moveaxis(out, -2, 0)


def _tangent_by_products(x, dk):
    """The convolution of x (B, H, W, C) with dk (h, w, C, D), both widths odd, some images at a time.

    The rows that a pixel sees lie side by side on the left (h C), the columns on the right (w D). There is one matrix
    product, whose columns are then shifted and added. The transpose with respect to dk is one product of the same size,
    with everything in the cache: faster than XLA:CPU's convolution.
    """
    (B, H, W, C), (h, w, _, D) = x.shape, dk.shape
    size = part_size(B, 2**18 // (H * W * max(C, D)))
    # one copy for each device: the gradients of the copies are added once, after the loop, not in each turn of it
    groups = math.gcd(size, jax.device_count())
    matrix = jnp.broadcast_to(dk.transpose(0, 2, 1, 3).reshape(h * C, w * D), (groups, h * C, w * D))

    @recomputed  # the rows take h times the memory of x, and are made again in the backward pass
    def part(x, matrix):
        x = jnp.pad(x, ((0, 0), (h // 2, h // 2), (0, 0), (0, 0)))
        rows = jnp.concatenate([x[:, j : j + H] for j in range(h)], -1).reshape(groups, -1, h * C)
        columns = (rows @ matrix).reshape(size, H, W, w, D)
        columns = jnp.pad(columns, ((0, 0), (0, 0), (w // 2, w // 2), (0, 0), (0, 0)))
        return sum(columns[:, :, i : i + W, i] for i in range(w))

    return map_parts(lambda x: part(x, matrix), size, x)
