"""ResNets beside torchvision's, random weights and running statistics converted: logits, features, gradients."""

import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import convert
from jdiff.convert import resnet

torch = pytest.importorskip("torch", reason="parity with torchvision: pip install jdiff[parity] torchvision")


def torchvision_models():
    """torchvision.models, which needs none of the compiled operators that the CPU build of PyTorch does not load."""
    try:
        import torchvision.models
    except ImportError:
        pytest.skip("parity with torchvision: pip install torchvision==0.28.0", allow_module_level=True)
    except RuntimeError:
        for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
            del sys.modules[name]
        for name in ("nms", "qnms"):
            torch.library.define(f"torchvision::{name}", "(Tensor dets, Tensor scores, float threshold) -> Tensor")
        import torchvision.models
    return torchvision.models


models = torchvision_models()


def theirs(name, dtype, stem="imagenet", **settings):
    """A network with every number drawn, the running statistics too."""
    torch.manual_seed(0)
    net = getattr(models, name)(**settings)
    if stem == "small":
        net.conv1, net.maxpool = torch.nn.Conv2d(3, 64, 3, padding=1, bias=False), torch.nn.Identity()
    net = net.to(dtype).eval()
    with torch.no_grad():
        for key, tensor in net.state_dict().items():
            if key.endswith(("running_var", "bn1.weight", "bn2.weight")):
                tensor.uniform_(0.5, 1.5)
            elif key.endswith(("running_mean", "bias", "bn3.weight")):
                tensor.uniform_(-0.3, 0.3)
    return net


# float64 shows that the mathematics is the same; how far float32 is from it depends on the processor's instructions
@pytest.mark.parametrize("dtype,tolerance", [("float32", 5e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("name,size,settings", [
    ("resnet18", (45, 38), {}), ("resnet34", (32, 57), dict(num_classes=7)), ("resnet50", (51, 33), {}),
    ("resnet18", (9, 14), dict(num_classes=7, stem="small")),
])  # fmt: skip
def test_resnet(name, size, settings, dtype, tolerance):
    net = theirs(name, getattr(torch, dtype), **settings)
    tensors = {key: tensor.numpy() for key, tensor in net.state_dict().items()}
    draw = np.random.default_rng(0)
    x = draw.normal(size=(2, *size, 3)).astype(dtype)
    with jax.enable_x64(dtype == "float64"):
        module = resnet.build(tensors, {})
        variables = convert.variables_of(module, "resnet", tensors, dtype)

        def loss(x, variables):  # the variables are an argument: XLA would compute with constants while it compiles
            y = module.apply(variables, x)
            return jnp.sum(jnp.sin(y)), (y, module.apply(variables, x, method="features"))

        (_, (y, features)), dx = jax.jit(jax.value_and_grad(loss, has_aux=True))(x, variables)
    a = torch.tensor(np.moveaxis(x, -1, 1)).requires_grad_()
    b = net(a)
    torch.sin(b).sum().backward()
    net.fc = torch.nn.Identity()
    assert y.dtype == features.dtype == dx.dtype == dtype
    assert_close(y, b.detach().numpy(), tolerance)
    assert_close(features, net(a).detach().numpy(), tolerance)
    assert_close(dx, np.moveaxis(a.grad.numpy(), 1, -1), tolerance)


def assert_close(a, b, tolerance):
    """The largest difference, relative to the largest entry where that is above 1."""
    assert np.abs(np.asarray(a) - b).max() <= tolerance * max(1, np.abs(b).max())


def test_training_moves_the_running_statistics_alike():
    net = theirs("resnet18", torch.float64, num_classes=3).train()
    tensors = {key: tensor.numpy().copy() for key, tensor in net.state_dict().items()}
    x = np.random.default_rng(1).normal(size=(4, 40, 33, 3))
    with jax.enable_x64(True):
        module = resnet.build(tensors, {})
        variables = convert.variables_of(module, "resnet", tensors, np.float64)
        y, new = jax.jit(lambda v, x: module.apply(v, x, train=True, mutable=["batch_stats"]))(variables, x)
        after = convert.table.to_tensors(resnet.table(module), variables | new)
    assert_close(y, net(torch.tensor(np.moveaxis(x, -1, 1))).detach().numpy(), 1e-10)
    for key, tensor in net.state_dict().items():
        if "running" in key:
            np.testing.assert_allclose(after[key], tensor, rtol=1e-10, atol=1e-10)


def test_a_saved_network_opens_in_torchvision(tmp_path):
    pytest.importorskip("safetensors")
    import safetensors.torch

    net = theirs("resnet18", torch.float32, num_classes=5)
    torch.save(net.state_dict(), tmp_path / "resnet18.pth")
    module, variables = convert.load(tmp_path / "resnet18.pth", "resnet")
    convert.save(tmp_path / "ours", "resnet", module, variables)
    (file,) = (tmp_path / "ours").glob("*.safetensors")
    other = models.resnet18(num_classes=5).eval()
    missing, unexpected = other.load_state_dict(safetensors.torch.load_file(file), strict=False)
    assert not unexpected and all(name.endswith("num_batches_tracked") for name in missing)
    x = torch.randn(1, 3, 40, 40)
    np.testing.assert_array_equal(other(x).detach(), net(x).detach())
