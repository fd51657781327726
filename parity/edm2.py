"""Our EDM2 networks beside the published ones: `python parity/edm2.py CHECKOUT`, of NVlabs/edm2.

Each row is one network with random weights everywhere, the gains too, in float32 and in float64: the largest difference
of the raw network's outputs, of the uncertainties, of the gradient of a random projection with respect to the input,
and the size of the largest output; at last images, by eight steps of its sampler and of `jdiff.sample`, from the same
noise in float32. Exit status 1 above 1e-5 in float32, 1e-10 in float64, 1e-3 for images.
"""

import dataclasses
import importlib
import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np

import jdiff
from jdiff import config as configs
from jdiff import convert
from jdiff.convert import edm2

# name: (arguments of the published class, which is what the converter's config says, height, width)
CASES = {
    "img64-xs/4, 10 classes, 16x24": (
        dict(img_resolution=64, img_channels=3, label_dim=10, model_channels=32, channels_per_head=32), 16, 24,
    ),
    "two levels, 4 channels, 6x10": (
        dict(img_resolution=16, img_channels=4, label_dim=0, model_channels=16, channel_mult=[1, 3], num_blocks=2,
             attn_resolutions=[16], channels_per_head=16), 6, 10,
    ),
    "one channel, balances, 8x4": (
        dict(img_resolution=8, img_channels=1, label_dim=3, model_channels=8, channel_mult=[2, 3, 4], num_blocks=1,
             attn_resolutions=[4], channels_per_head=8, channel_mult_noise=3, channel_mult_emb=5, label_balance=0.3,
             concat_balance=0.4, res_balance=0.2, attn_balance=0.6, logvar_channels=16), 8, 4,
    ),
}  # fmt: skip
TOLERANCE = {np.float32: 1e-5, np.float64: 1e-10}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare with a checkout of NVlabs/edm2."""

    checkout: Path
    """The folder that holds training/networks_edm2.py."""


class Double:
    """The module torch, for code that asks for float32 by name."""

    def __init__(self, torch):
        self.torch = torch

    def __getattr__(self, name):
        return self.torch.float64 if name == "float32" else getattr(self.torch, name)


def network(code, arguments: dict, torch):
    """The published network with random numbers everywhere."""
    torch.manual_seed(0)
    net = code.Precond(use_fp16=False, **arguments).eval()
    with torch.no_grad():
        for name, weight in net.named_parameters():
            weight.copy_(torch.randn(weight.shape) * (0.5 if weight.ndim == 0 else 1.7))
            if name == "unet.out_gain":
                weight.fill_(0.8)
    return net


def differences(code, arguments: dict, size: tuple[int, int], dtype, torch) -> list[float]:
    """[of outputs, of uncertainties, of input gradients, the largest output]."""
    net = network(code, arguments, torch)
    tensors = edm2.select({name: tensor.numpy() for name, tensor in net.state_dict().items()}, {})
    rng, batch, classes = np.random.default_rng(0), 4, arguments["label_dim"]
    x = rng.normal(size=(batch, *size, arguments["img_channels"])).astype(dtype)
    projection = rng.normal(size=x.shape).astype(dtype)
    label = np.log(np.array([0.002, 0.1, 1.0, 80.0])).astype(dtype) / 4
    cond = np.array([0, 1, 2, 0]) + np.array([0, 0, 0, 1]) * classes  # the last has no class
    one_hot = np.concatenate([np.eye(classes), np.zeros((1, classes))])[cond].astype(dtype) if classes else None

    y = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
    out = net.unet(y, torch.tensor(label), None if one_hot is None else torch.tensor(one_hot)).movedim(1, 3)
    (out * torch.tensor(projection)).sum().backward()
    logvar = net.logvar_linear(net.logvar_fourier(torch.tensor(label)))[:, 0]
    theirs = [a.detach().numpy() for a in (out, logvar, y.grad.movedim(1, 3))]

    module = edm2.build(tensors, arguments)
    variables = convert.variables_of(module, "edm2", tensors, dtype)
    where = jnp.asarray(label), jnp.asarray(cond) if classes else None
    run = jax.jit(lambda x: module.apply(variables, x, *where, return_logvar=True))
    (mine, u), back = jax.vjp(run, jnp.asarray(x))
    ours = [np.asarray(a) for a in (mine, u, back((jnp.asarray(projection), jnp.zeros_like(u)))[0])]
    assert {a.dtype for a in ours} == {np.dtype(dtype)}
    return [float(np.abs(a - b).max()) for a, b in zip(ours, theirs, strict=True)] + [float(np.abs(ours[0]).max())]


def images(code, sampler, arguments: dict, size: tuple[int, int], torch) -> tuple[float, float]:
    """(difference of the images, the largest value), from the same noise by both samplers."""
    net = network(code, arguments, torch)
    tensors = edm2.select({name: tensor.numpy() for name, tensor in net.state_dict().items()}, {})
    noise = np.random.default_rng(1).normal(size=(3, *size, arguments["img_channels"])).astype(np.float32)
    classes = np.arange(3) % arguments["label_dim"]
    with torch.no_grad():
        given = torch.tensor(noise.transpose(0, 3, 1, 2)), torch.eye(arguments["label_dim"])[classes]
        theirs = sampler(net, *given, num_steps=8).movedim(1, 3).numpy()

    module = edm2.build(tensors, arguments)
    schedule, variables = jdiff.EDM(), convert.variables_of(module, "edm2", tensors)
    where = dict(cond=jnp.asarray(classes), conditioning=jdiff.conditioning.EDM())
    denoise = jdiff.denoiser(module.apply, variables, schedule, jdiff.targets.EDM(), **where)
    start, times = jnp.asarray(80 * noise), jdiff.grid.karras(schedule, 8)
    ours = jax.jit(jdiff.sample)(jdiff.solvers.Heun(), denoise, schedule, start, times)
    return float(np.abs(np.asarray(ours) - theirs).max()), float(np.abs(theirs).max())


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="parity/edm2.py")
    if not (a.checkout / "training" / "networks_edm2.py").is_file():
        raise configs.ConfigError(
            f"{a.checkout} holds no training/networks_edm2.py; give the folder of a checkout of edm2"
        )
    for needed in ("torch", "requests", "click"):
        if importlib.util.find_spec(needed) is None:
            raise configs.ConfigError("this compares with PyTorch code: pip install torch==2.13.0 requests click")
    import torch

    sys.path.insert(0, str(a.checkout))
    code = importlib.import_module("training.networks_edm2")
    failed = 0
    print(f"{'':32s} {'':8s} {'output':>8s} {'logvar':>8s} {'gradient':>8s} {'largest':>8s}")
    for dtype in (np.float32, np.float64):
        with jax.enable_x64(dtype is np.float64):
            torch.set_default_dtype(torch.float64 if dtype is np.float64 else torch.float32)
            code.torch = Double(torch) if dtype is np.float64 else torch
            for name, (arguments, *size) in CASES.items():
                *found, largest = differences(code, arguments, size, dtype, torch)
                wrong = not max(found) < TOLERANCE[dtype]
                failed += wrong
                row = f"{name:32s} {dtype.__name__:8s} {' '.join(f'{d:8.1e}' for d in found)} {largest:8.2f}"
                print(row + (" TOO LARGE" if wrong else ""), flush=True)
    torch.set_default_dtype(torch.float32)
    code.torch = torch
    arguments, *size = next(iter(CASES.values()))
    sampler = importlib.import_module("generate_images").edm_sampler
    found, largest = images(code, sampler, arguments, size, torch)
    print(f"{'images, 8 steps':32s} {'float32':8s} {found:8.1e} {'':8s} {'':8s} {largest:8.2f}")
    return int(failed > 0 or not found < 1e-3)


if __name__ == "__main__":
    configs.run_script(main)
