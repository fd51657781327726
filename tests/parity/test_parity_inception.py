"""InceptionV3 beside torchvision's, and with pytorch-fid's pooling written out: features, probabilities, distances."""

import types

import jax
import numpy as np
import pytest
from test_parity_resnet import assert_close, torchvision_models

from jdiff import convert, metrics
from jdiff.convert import inception

torch = pytest.importorskip("torch", reason="parity with torchvision: pip install jdiff[parity] torchvision")
torchvision_models()
import torchvision.models.inception as published  # noqa: E402
from torch.nn import functional as F  # noqa: E402


def theirs(classes, dtype=torch.float32):
    """A network with every number drawn, so that activations keep their size."""
    torch.manual_seed(0)
    net = published.Inception3(num_classes=classes, aux_logits=False, init_weights=False).to(dtype).eval()
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            if key.endswith("conv.weight"):
                tensor.normal_(0, (2 / tensor[0].numel()) ** 0.5)
            elif key.endswith(("running_var", "bn.weight")):
                tensor.uniform_(0.7, 1.3)
            elif key.endswith(("running_mean", "bn.bias")):
                tensor.uniform_(-0.2, 0.2)
    return net


def patched(x, **settings):
    """The pooling of the weights from TensorFlow: means without the border, in the last block a maximum."""
    if x.shape[1] == 2048:
        return F.max_pool2d(x, **settings)
    return F.avg_pool2d(x, **settings, count_include_pad=False)


@pytest.fixture
def pooled_as_in_tensorflow(monkeypatch):
    names = ("relu", "max_pool2d", "adaptive_avg_pool2d")
    shim = types.SimpleNamespace(avg_pool2d=patched, **{name: getattr(F, name) for name in names})
    monkeypatch.setattr(published, "F", shim)


def ours(net, dtype=np.float32):
    tensors = {key: tensor.numpy() for key, tensor in net.state_dict().items()}
    module = inception.build(tensors, {})
    return module, convert.variables_of(module, "inception", tensors, dtype)


def compare(classes, dtype, tolerance, size=(2, 3, 83, 107)):
    x = np.random.default_rng(0).uniform(-1, 1, size).astype(dtype)
    net = theirs(classes, getattr(torch, dtype))
    with jax.enable_x64(dtype == "float64"):
        module, variables = ours(net, dtype)
        assert module.patched == (classes == 1008)

        @jax.jit
        def run(variables, x):
            return module.apply(variables, x), module.apply(variables, x, method="features")

        logits, features = run(variables, np.moveaxis(x, 1, -1))
    with torch.no_grad():
        assert_close(logits, net(torch.tensor(x)).numpy(), tolerance)
        net.fc = torch.nn.Identity()
        assert_close(features, net(torch.tensor(x)).numpy(), tolerance)


@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-4), ("float64", 1e-10)])
def test_with_the_pooling_of_tensorflow(dtype, tolerance, pooled_as_in_tensorflow):
    compare(1008, dtype, tolerance)


@pytest.mark.slow
def test_as_torchvision_has_it():
    compare(1000, "float64", 1e-10)


@pytest.mark.slow
def test_features_and_distances_of_images(pooled_as_in_tensorflow):
    """From bytes to the Frechet distance and the score, resized as pytorch-fid does: bilinear, without antialiasing."""
    from scipy.linalg import sqrtm

    random = np.random.default_rng(0)
    smooth = random.integers(0, 256, (2, 48, 8, 8, 3)).repeat(4, 2).repeat(4, 3)
    real = smooth[0].astype(np.uint8)
    fake = np.clip(smooth[1] // 2 + random.integers(0, 100, smooth[1].shape), 0, 255).astype(np.uint8)
    net = theirs(1008)
    network = metrics.Inception(*ours(net))
    found = [network.look(images, batch=20) for images in (real, fake)]
    weight, net.fc = net.fc.weight.detach(), torch.nn.Identity()
    expected = []
    with torch.no_grad():
        for images in (real, fake):
            x = torch.tensor(images).permute(0, 3, 1, 2).float() / 255
            parts = [F.interpolate(part, (299, 299), mode="bilinear", align_corners=False) for part in x.split(8)]
            features = torch.cat([net(2 * part - 1) for part in parts])
            expected.append((features.numpy(), torch.softmax(features @ weight.T, 1).numpy()))
    for (features, probabilities), (a, b) in zip(found, expected, strict=True):
        assert_close(features, a, 1e-4)
        assert_close(probabilities, b, 1e-4)
    few = np.argsort(expected[0][0].var(0))[-20:]  # fewer than images: the root of the product exists
    a, b = (np.asarray(features, np.float64)[:, few] for features, _ in expected)
    Ca, Cb = np.cov(a.T), np.cov(b.T)
    distance = ((a.mean(0) - b.mean(0)) ** 2).sum() + np.trace(Ca + Cb - 2 * sqrtm(Ca @ Cb).real)
    np.testing.assert_allclose(metrics.frechet(found[0][0][:, few], found[1][0][:, few]), distance, rtol=1e-3)
    score = metrics.inception_score(expected[1][1], 2).value
    np.testing.assert_allclose(metrics.inception_score(found[1][1], 2).value, score, rtol=1e-3)
