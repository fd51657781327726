"""The operators of observations against NumPy, SciPy and Pillow, and their adjoints."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from PIL import Image
from scipy import ndimage

from jdiff import posterior

RNG = np.random.default_rng(0)
X = RNG.normal(size=(2, 8, 12, 3)).astype(np.float32)
KERNEL = RNG.normal(size=(3, 5))
HOLE = (np.arange(96).reshape(8, 12, 1) % 5 > 1).astype(np.float32)


def channels(f):
    """f of each channel of each image of X."""
    return np.stack([np.stack([f(image[..., c]) for c in range(3)], -1) for image in X.astype(np.float64)])


def by_pillow(image):
    return np.asarray(Image.fromarray(image.astype(np.float32), "F").resize((6, 4), Image.Resampling.BICUBIC))


# (operator, what another library makes of X)
LINEAR = {
    "identity": (posterior.Identity(), lambda: X),
    "mask": (posterior.Mask(HOLE), lambda: np.where(np.broadcast_to(HOLE, X.shape) > 0, X, 0)),
    "random pixels": (
        posterior.random_pixels(jax.random.key(0), (8, 12), 0.25),
        lambda: X * np.asarray(posterior.random_pixels(jax.random.key(0), (8, 12), 0.25).mask),
    ),
    "box": (posterior.box((8, 12), 2), lambda: X.reshape(2, 4, 2, 6, 2, 3).mean((2, 4))),
    "bicubic": (posterior.bicubic((8, 12), 2), lambda: channels(by_pillow)),
    "blur": (posterior.Blur(KERNEL), lambda: channels(lambda a: ndimage.convolve(a, KERNEL, mode="wrap"))),
    "grey": (posterior.Grey(), lambda: 0.299 * X[..., :1] + 0.587 * X[..., 1:2] + 0.114 * X[..., 2:]),
}


def test_operators_are_those_of_other_libraries():
    made = jax.jit(lambda x: {name: A(x) for name, (A, _) in LINEAR.items()})(X)
    expected = {name: np.asarray(by_hand(), np.float32) for name, (_, by_hand) in LINEAR.items()}
    chex.assert_trees_all_close(made, expected, rtol=1e-4, atol=2e-5)


def test_gaussian_blur():
    """SciPy's far from the edges, and constants stay everywhere."""
    x = RNG.normal(size=(1, 41, 41, 1)).astype(np.float32)
    blurred = posterior.gaussian_blur((41, 41), 1.5)(x)
    expected = ndimage.gaussian_filter(x[0, ..., 0].astype(np.float64), 1.5, truncate=8)
    np.testing.assert_allclose(blurred[0, 15:26, 15:26, 0], expected[15:26, 15:26], atol=1e-5)
    ones = posterior.gaussian_blur((41, 41), 1.5)(jnp.ones_like(x))
    np.testing.assert_allclose(ones, np.ones_like(x), rtol=1e-5)


def test_magnitude():
    made = posterior.Magnitude(2)(X)
    expected = np.abs(np.fft.fft2(X, (16, 24), (1, 2), norm="ortho"))
    np.testing.assert_allclose(made, expected, rtol=1e-4, atol=1e-5)
    gradient = jax.grad(lambda x: posterior.Magnitude()(x).sum())(jnp.zeros_like(X))
    np.testing.assert_array_equal(gradient, 0)


def test_random_pixels_and_motion():
    """The share of the pixels to one, other pixels for another key; a kernel of sum 1 along its direction."""
    masks = [np.asarray(posterior.random_pixels(jax.random.key(i), (8, 12), 0.25).mask) for i in range(2)]
    assert [mask.sum() for mask in masks] == [24, 24] and (masks[0] != masks[1]).any()
    across, down = posterior.motion_kernel(7, 0.0), posterior.motion_kernel(7, 90.0)
    np.testing.assert_allclose([across.sum(), down.sum()], 1)
    np.testing.assert_allclose(across[3], np.full(7, 1 / 7))
    np.testing.assert_allclose(across, down.T)
    np.testing.assert_allclose(np.diagonal(posterior.motion_kernel(7, 45.0)).sum(), 1)


def test_adjoints():
    """<A x, u> = <x, A^T u>, and A is linear; also of images in one and three dimensions."""
    operators = {name: (A, X) for name, (A, _) in LINEAR.items()} | {
        "gaussian": (posterior.gaussian_blur((8, 12), 1.5), X),
        "one dimension": (posterior.box((12,), 3), X[:, 0]),
        "three dimensions": (posterior.Blur(RNG.normal(size=(1, 3, 2))), X[:, None]),
    }

    @jax.jit
    def products(x, z):
        out = {}
        for name, (A, like) in operators.items():
            a, b = x[: like.size].reshape(like.shape), z[: like.size].reshape(like.shape)
            made, other = A(a), A(b)
            out[name] = (made * other).sum(), (a * posterior.adjoint(A, other, a.shape)).sum()
            out[f"{name}, linear"] = A(2 * a - b).sum(), (2 * made - other).sum()
        return out

    for name, (left, right) in products(X.ravel(), RNG.normal(size=X.size).astype(np.float32)).items():
        np.testing.assert_allclose(left, right, rtol=1e-3, atol=1e-4, err_msg=name)


# (call, what its message holds)
BAD = [
    (lambda: posterior.Mask(np.full((8, 12, 1), 0.5)), "mask has other numbers than 0 and 1"),
    (lambda: posterior.Mask("half"), "mask is 'half'; expected an array of 0 and 1"),
    (lambda: posterior.Mask(HOLE[:4])(X), r"mask has shape (4, 12, 1) for samples of (8, 12, 3); give a mask of their"),
    (lambda: posterior.random_pixels(jax.random.key(0), (4, 4), 1.5), "share must be from 0 to 1, got 1.5"),
    (lambda: posterior.box((8, 12), 3), "box: factor is a whole number that divides the sizes (8, 12), got 3"),
    (lambda: posterior.bicubic((8, 12), 0), "bicubic: factor is a whole number that divides the sizes"),
    (lambda: posterior.box((8, 8), 2)(X), "the operator is for images of (8, 8) and channels, got x (2, 8, 12, 3)"),
    (lambda: posterior.gaussian_blur((8, 12), 0.0), "gaussian_blur: std must be positive"),
    (lambda: posterior.Blur(np.ones((9, 3)))(X), "kernel has shape (9, 3) for images of (8, 12)"),
    (lambda: posterior.Blur(3.0), "kernel is 3.0; expected an array, as motion_kernel makes one"),
    (lambda: posterior.motion_kernel(0, 0.0), "motion_kernel: length is a whole number of pixels, 1 or more; got 0"),
    (lambda: posterior.Grey()(X[..., :1]), "Grey has weights (3,) for x (2, 8, 12, 1); expected one for each channel"),
    (lambda: posterior.Magnitude(0), "Magnitude: oversampling is a whole number, 1 or more; got 0"),
    (lambda: posterior.Separable((np.ones(3),)), "Separable: a matrix has shape (3,); expected (m, n), one an axis"),
    (lambda: posterior.adjoint(posterior.Identity(), X[:1], X.shape), "and y has shape (1, 8, 12, 3); they must be"),
]


@pytest.mark.parametrize("call,message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_calls(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
