"""Our DiT beside the published one: `python parity/dit.py CHECKOUT`, of facebookresearch/DiT, with timm.

Each row is one network with random weights everywhere, also in layers that start at zero, in float32 and in float64:
the largest difference of its outputs, of the gradient of a random projection with respect to the input, and the size
of the largest output. Exit status 1 above 1e-5 in float32 or 1e-10 in float64.
"""

import dataclasses
import importlib.util
import math
import sys
import types
from pathlib import Path
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np

from jdiff import config as configs
from jdiff import convert
from jdiff.convert import dit
from jdiff.models.transformer import images, sincos_positions, tokens

# name: (arguments of the published class, batch)
CASES = {
    "S/2, latents of 8x8": (dict(input_size=8, patch_size=2, hidden_size=384, depth=12, num_heads=6), 4),
    "RGB, patch 4, 20x20": (dict(input_size=20, patch_size=4, in_channels=3, hidden_size=64, depth=3, num_heads=4), 5),
    "odd size, patch 3, 15x15": (
        dict(input_size=15, patch_size=3, in_channels=5, hidden_size=96, depth=2, num_heads=3, mlp_ratio=2.5),
        3,
    ),
    "one patch size, no variance": (
        dict(input_size=7, patch_size=1, in_channels=2, hidden_size=32, depth=2, num_heads=2, learn_sigma=False),
        2,
    ),
    "not square, 16x4": (dict(input_size=(16, 4), patch_size=2, hidden_size=192, depth=4, num_heads=12), 3),
}
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-10}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare with a checkout of facebookresearch/DiT."""

    checkout: Path
    """The folder that holds models.py."""


def published(path: Path, double: bool) -> types.ModuleType:
    """Its module of networks; `double` in float64, also where its text says float32."""
    text = path.read_text()
    if double:
        text = text.replace("torch.float32", "torch.float64").replace(".float()", ".double()")
    module = types.ModuleType("published_dit")
    missing = ["", ".ops", ".ops.misc", ".transforms", ".transforms.functional", ".datasets", ".datasets.folder"]
    stubs = {} if importlib.util.find_spec("torchvision") else {f"torchvision{m}": mock.MagicMock() for m in missing}
    sys.modules.update(stubs)  # timm asks for it, for transforms of images that nothing here calls
    exec(compile(text, str(path), "exec"), module.__dict__)
    for name in stubs:
        del sys.modules[name]
    return module


def network(code: types.ModuleType, arguments: dict, torch):
    """The published network with random weights everywhere; its grid is given positions even if it is not square."""
    torch.manual_seed(0)
    net = code.DiT(num_classes=10, **arguments).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            fan = weight[0].numel() if weight.ndim > 1 else 16
            if name != "pos_embed":
                weight.copy_(torch.randn(weight.shape) / math.sqrt(1.5 * fan))
        height, width = (side // arguments["patch_size"] for side in sides(arguments))
        if height != width:
            net.pos_embed[:] = torch.tensor(sincos_positions(height, width, arguments["hidden_size"]))
    return net


def sides(arguments: dict) -> tuple[int, int]:
    size = arguments["input_size"]
    return size if isinstance(size, tuple) else (size, size)


def differences(code, arguments: dict, batch: int, dtype, torch) -> tuple[float, float, float]:
    """(of outputs, of input gradients, the largest output)."""
    net = network(code, arguments, torch)
    tensors = {name: weight.numpy() for name, weight in net.state_dict().items()}
    (H, W), p, C = sides(arguments), arguments["patch_size"], net.in_channels
    if H != W:
        del tensors["pos_embed"]  # the converter knows those of squares
    rng = np.random.default_rng(0)
    x = rng.normal(size=(batch, H, W, C)).astype(dtype)
    label = np.resize(np.array([0, 999, 500, 37, 731]), batch).astype(dtype)
    cond = np.arange(batch) * 3 % 11  # 10 is no class
    projection = rng.normal(size=(batch, H, W, net.out_channels)).astype(dtype)

    y = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    out = net(y, torch.tensor(label), torch.tensor(cond)).movedim(1, 3)
    side = out.shape[1]  # it lays tokens out in a square, whatever the grid
    as_theirs = np.asarray(images(tokens(jnp.asarray(projection), p), side, side, p)) if H != W else projection
    (out * torch.tensor(as_theirs)).sum().backward()
    theirs = images(tokens(jnp.asarray(out.detach().numpy()), p), H, W, p), y.grad.movedim(1, 3).numpy()

    module = dit.build(tensors, dict(num_heads=arguments["num_heads"]))
    variables = convert.variables_of(module, "dit", tensors, dtype)
    run = jax.jit(lambda x: module.apply(variables, x, jnp.asarray(label), jnp.asarray(cond)))
    mine, back = jax.vjp(run, jnp.asarray(x))
    ours = mine, back(jnp.asarray(projection))[0]
    found = [float(np.abs(np.asarray(a) - np.asarray(b)).max()) for a, b in zip(ours, theirs, strict=True)]
    return *found, float(np.abs(mine).max())


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="parity/dit.py")
    path = a.checkout / "models.py"
    if not path.is_file():
        raise configs.ConfigError(f"{a.checkout} holds no models.py; give the folder of a checkout of DiT")
    for needed in ("torch", "timm"):
        if importlib.util.find_spec(needed) is None:
            raise configs.ConfigError("this compares with PyTorch code: pip install torch==2.13.0 timm")
    import torch

    failed = 0
    print(f"{'':28s} {'':8s} {'output':>8s} {'gradient':>8s} {'largest':>8s}")
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            torch.set_default_dtype(torch.float64 if dtype is np.float64 else torch.float32)
            code = published(path, dtype is np.float64)
            for name, (arguments, batch) in CASES.items():
                *found, largest = differences(code, arguments, batch, dtype, torch)
                wrong = not max(found) < TOLERANCE[dtype]
                failed += wrong
                row = f"{name:28s} {dtype.__name__:8s} {found[0]:8.1e} {found[1]:8.1e} {largest:8.2f}"
                print(row + (" TOO LARGE" if wrong else ""), flush=True)
    return int(failed > 0)


if __name__ == "__main__":
    configs.run_script(main)
