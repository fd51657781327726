"""InceptionV3 as users load it: a file of weights, images of bytes, and what is said where one of them is wrong."""

import jax
import numpy as np
import pytest

from jdiff import convert, metrics
from jdiff.models import InceptionV3


def test_a_missing_file_says_where_it_is(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"none.pth is not there; get https://github.com/mseitzer.*6726825d$"):
        convert.load(tmp_path / "none.pth", "inception")


@pytest.mark.slow
def test_a_file_of_weights(tmp_path):
    """Written and read back; grey images are those of three equal channels; batches do not matter."""
    pytest.importorskip("safetensors")
    module = InceptionV3(num_classes=8)
    variables = jax.jit(module.init)(jax.random.key(0), np.zeros((1, 75, 75, 3), np.float32))
    convert.save(tmp_path / "net", "inception", module, variables)
    network = metrics.Inception(*convert.load(tmp_path / "net", "inception", patched=True))
    grey = np.random.default_rng(0).integers(0, 256, (5, 32, 32, 1), np.uint8)
    features, p = network.look(grey, batch=2)
    assert features.shape == (5, 2048) and p.shape == (5, 8)
    np.testing.assert_allclose(p.sum(1), 1, rtol=1e-5)
    others, _ = network.look(grey.repeat(3, -1)[::-1], batch=2)
    np.testing.assert_allclose(others[::-1], features, rtol=1e-3, atol=1e-5)


def test_bad_images():
    network = metrics.Inception(InceptionV3(), {})
    for images in (np.zeros((2, 8, 8, 3)), np.zeros((2, 8, 8, 4), np.uint8), np.zeros((0, 8, 8, 3), np.uint8)):
        with pytest.raises(ValueError, match=r"Inception: images are .*; expected uint8 \(N, H, W, 1 or 3\)"):
            network.look(images)
    with pytest.raises(ValueError, match="images .B, H, W, 3. of 75 pixels or more, got"):
        InceptionV3().init(jax.random.key(0), np.zeros((1, 32, 32, 3)))
