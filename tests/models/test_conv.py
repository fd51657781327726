"""Convolutions against JAX's own rules, in every dimension, stride and form of the CPU."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax import lax

from jdiff.models import conv
from jdiff.models.conv import Conv


def plain(x, kernel, strides, padding):
    space = "DHW"[5 - x.ndim :]
    numbers = (f"N{space}C", f"{space}IO", f"N{space}C")
    return lax.conv_general_dilated(x, kernel, strides, padding, dimension_numbers=numbers)


# wide images of many channels go another way on the CPU: by a convolution with one column more than is kept
SIZES = {"line": (7,), "image": (6, 4), "wide": (3, 17), "volume": (3, 4, 5)}


@pytest.mark.parametrize("stride", [1, 2])
@pytest.mark.parametrize("kind", SIZES)
def test_conv_has_the_derivatives_of_the_plain_one(kind, stride):
    """grad, jvp, Hessian-vector product, gradient of a jvp, vmap over either argument, and a scan; in one program."""
    sizes, features = SIZES[kind], 18 if kind == "wide" else 5
    dims = len(sizes)
    draw = np.random.default_rng(0)
    x, dx = jnp.asarray(draw.normal(size=(2, 2, *sizes, 3)), jnp.float32)
    k, dk = jnp.asarray(draw.normal(size=(2, *(3,) * dims, 3, features)), jnp.float32)
    settings = (stride,) * dims, ((1, 1),) * dims

    def everything(f, x, k, dx, dk):
        run = lambda x, k: f(x, k, *settings)  # noqa: E731
        grads = jax.grad(lambda x, k: jnp.sum(jnp.sin(run(x, k))), (0, 1))
        squared_slope = lambda x, k: jnp.sum(jax.jvp(run, (x, k), (dx, dk))[1] ** 2)  # noqa: E731
        return {
            "jvp": jax.jvp(run, (x, k), (dx, dk)),
            "jvp of x alone": jax.jvp(lambda x: run(x, k), (x,), (dx,)),
            "gradient, Hessian-vector product": jax.jvp(grads, (x, k), (dx, dk)),
            "gradient of a jvp": jax.grad(squared_slope, (0, 1))(x, k),
            "vmap over x": jax.vmap(lambda x: grads(x, k))(jnp.stack([x, dx])),
            "vmap over the kernel": jax.vmap(lambda k: grads(x, k))(jnp.stack([k, dk])),
            "scan": lax.scan(lambda c, k: (c, grads(c, k)), x, jnp.stack([k, dk]))[1],
        }

    ours, theirs = jax.jit(lambda *a: (everything(conv, *a), everything(plain, *a)))(x, k, dx, dk)
    chex.assert_trees_all_close(ours, theirs, rtol=2e-4, atol=2e-4)


def test_only_wide_convolutions_that_keep_the_size_make_a_column_more():
    def makes(sizes, stride):
        x, kernel = jnp.ones((2, *sizes, 3)), jnp.ones((3, 3, 3, 18))
        run = lambda x, kernel: conv(x, kernel, (stride, stride), ((1, 1), (1, 1)))  # noqa: E731
        return f"{sizes[0]},{sizes[1] + 1},18] = conv_general_dilated" in str(jax.make_jaxpr(run)(x, kernel))

    assert makes((3, 17), 1) and not makes((3, 17), 2) and not makes((6, 4), 1)


@pytest.mark.parametrize("stride", [1, 2])
def test_a_layer_of_width_one_is_a_matrix_product(stride):
    module, x = Conv(5, kernel=1, stride=stride), np.random.default_rng(0).normal(size=(2, 6, 4, 3)).astype("f")
    kernel, bias = np.random.default_rng(1).normal(size=(1, 1, 3, 5)), np.arange(5.0)
    out = jax.jit(module.apply)({"params": {"kernel": jnp.asarray(kernel, "f"), "bias": jnp.asarray(bias, "f")}}, x)
    np.testing.assert_allclose(out, x[:, ::stride, ::stride] @ kernel[0, 0] + bias, rtol=1e-4, atol=1e-5)
