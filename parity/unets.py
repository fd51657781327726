"""Compare our UNets with the published code: `python parity/unets.py edm|adm|score_sde CHECKOUT`.

CHECKOUT is one of github.com/NVlabs/edm, openai/guided-diffusion or yang-song/score_sde_pytorch. Random weights in
their module, converted; then the largest difference of the outputs over the largest output, and of the gradients with
respect to the input likewise, in single precision and in double; at last, of EDM and score_sde, images by their sampler
or their score function and by `jdiff.sample` from the same noise. Exit status 1 above 1e-5 in float32, 1e-10 in
float64, 1e-3 for images. PyTorch is needed (the `parity` extra).
"""

import dataclasses
import importlib
import sys
import types
from pathlib import Path
from typing import Literal

import jax
import numpy as np

import jdiff
from jdiff import config as configs
from jdiff import convert

SONG = dict(model_channels=32, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8], dropout=0.1)
NCSNPP = dict(embedding_type="fourier", channel_mult_noise=2, encoder_type="residual", resample_filter=[1, 3, 3, 1])
DHARIWAL = dict(model_channels=64, channel_mult=[1, 2], num_blocks=1, attn_resolutions=[8])
EDM = [
    ("DDPM++", "SongUNet", SONG, (16, 16)),
    ("DDPM++, classes, augmentation", "SongUNet", SONG | dict(label_dim=10, augment_dim=9, num_blocks=2), (16, 24)),
    ("DDPM++, three levels, not square", "SongUNet", SONG | dict(channel_mult=[1, 2, 2], num_blocks=2), (12, 20)),
    ("NCSN++", "SongUNet", SONG | NCSNPP, (16, 16)),
    ("NCSN++, classes, not square", "SongUNet", SONG | NCSNPP | dict(label_dim=5, channel_mult=[2, 2, 2]), (8, 24)),
    ("NCSN++, skips", "SongUNet", SONG | NCSNPP | dict(encoder_type="skip", decoder_type="skip"), (16, 16)),
    ("ADM", "DhariwalUNet", DHARIWAL, (16, 16)),
    ("ADM, classes, augmentation", "DhariwalUNet", DHARIWAL | dict(label_dim=10, augment_dim=9), (8, 24)),
    ("ADM, three levels", "DhariwalUNet", DHARIWAL | dict(channel_mult=[1, 2, 3], num_blocks=2), (12, 20)),
]
GUIDED = dict(
    image_size=16, in_channels=3, model_channels=32, out_channels=3, num_res_blocks=1, channel_mult=(1, 2),
    attention_resolutions=(2,), num_head_channels=32, use_scale_shift_norm=True, resblock_updown=True,
    use_new_attention_order=True,
)  # fmt: skip
ADM = [
    ("ADM", GUIDED, (16, 16)),
    ("ADM, old order, learned variance", GUIDED | dict(use_new_attention_order=False, out_channels=6), (12, 20)),
    ("ADM, classes, blocks", GUIDED | dict(num_classes=7, num_res_blocks=2, channel_mult=(1, 1, 2)), (8, 24)),
    ("improved DDPM", GUIDED | dict(resblock_updown=False, num_heads=2, num_head_channels=-1), (6, 10)),
    ("DDPM's blocks", GUIDED | dict(resblock_updown=False, use_scale_shift_norm=False, num_classes=3), (16, 8)),
    ("ADM, narrow start (512)", GUIDED | dict(channel_mult=(0.5, 1, 2), model_channels=64), (8, 8)),
]
PLUS = dict(
    nf=32, ch_mult=(1, 2), num_res_blocks=1, attn_resolutions=(8,), dropout=0.1, resamp_with_conv=True,
    conditional=True, nonlinearity="swish", scale_by_sigma=False, normalization="GroupNorm", fir=False,
    fir_kernel=[1, 3, 3, 1], skip_rescale=True, resblock_type="biggan", progressive="none", progressive_input="none",
    fourier_scale=16, embedding_type="positional", init_scale=0.0, progressive_combine="sum", sigma_min=0.01,
    sigma_max=50, num_scales=1000,
)  # fmt: skip
FIR = PLUS | dict(fir=True, progressive_input="residual")
VE = FIR | dict(scale_by_sigma=True, embedding_type="fourier")
DEEP = dict(ch_mult=(1, 2, 2), num_res_blocks=2, attn_resolutions=(8, 4))
# title, class, settings, what has to be said beside the tensors; of images of 16x16: attention is by size in theirs
SCORE_SDE = [
    ("vp/ddpm", "ddpm", PLUS, dict(scale_by_sigma=False)),
    ("vp/ddpm, three levels", "ddpm", PLUS | DEEP, dict(scale_by_sigma=False)),
    ("ve/cifar10_ddpm", "ddpm", PLUS | dict(scale_by_sigma=True), dict(scale_by_sigma=True)),
    ("vp/cifar10_ddpmpp_continuous", "ncsnpp", PLUS, {}),
    ("DDPM++, three levels, FIR", "ncsnpp", PLUS | DEEP | dict(fir=True), dict(filter=(1, 3, 3, 1))),
    ("vp/cifar10_ncsnpp", "ncsnpp", FIR, dict(scale_by_sigma=False)),
    ("vp/cifar10_ncsnpp_continuous", "ncsnpp", FIR | DEEP, dict(scale_by_sigma=False)),
    ("ve/cifar10_ncsnpp", "ncsnpp", FIR | dict(scale_by_sigma=True), dict(scale_by_sigma=True)),
    ("ve/cifar10_ncsnpp_continuous", "ncsnpp", VE, {}),
    ("NCSN++, three levels", "ncsnpp", VE | dict(ch_mult=(1, 1, 2), num_res_blocks=2), {}),
    ("ve/ffhq_256_ncsnpp_continuous", "ncsnpp", VE | dict(progressive="output_skip", progressive_input="input_skip"),
     {}),
]  # fmt: skip
TOLERANCE = {"float32": 1e-5, "float64": 1e-10}


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare our UNets with the published code."""

    architecture: Literal["edm", "adm", "score_sde"]
    """Which of them."""
    checkout: Path
    """The folder of a checkout of its code."""


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="parity/unets.py")
    file = {"edm": "training/networks.py", "adm": "guided_diffusion/unet.py", "score_sde": "models/ncsnpp.py"}
    if not (a.checkout / file[a.architecture]).is_file():
        raise configs.ConfigError(f"{a.checkout} holds no {file[a.architecture]}; give the folder of a checkout")
    try:
        import torch
    except ImportError:
        raise configs.ConfigError("the comparison needs PyTorch: pip install torch==2.13.0") from None
    sys.path.insert(0, str(a.checkout))
    cases = {"edm": edm_cases, "adm": adm_cases, "score_sde": score_sde_cases}[a.architecture]
    print(f"{'network':34s} {'float32':>9s} {'gradient':>9s} {'float64':>9s} {'gradient':>9s}")
    failed = 0
    for title, make, size, label, classes, settings in cases(torch):
        net, call = make()
        randomize(torch, net)
        errors = {p: compare(torch, a.architecture, net, call, size, label, classes, settings, p) for p in TOLERANCE}
        wrong = not all(max(found) < TOLERANCE[precision] for precision, found in errors.items())
        row = " ".join(f"{e:9.1e}" for found in errors.values() for e in found)
        print(f"{title:34s} {row}{' TOO LARGE' * wrong}", flush=True)
        failed += wrong
    for title, error in {"edm": edm_images, "adm": lambda torch: (), "score_sde": score_sde_images}[a.architecture](
        torch
    ):
        wrong = not error < 1e-3
        print(f"{title:34s} {error:9.1e}{' TOO LARGE' * wrong}", flush=True)
        failed += wrong
    return int(failed > 0)


def randomize(torch, net):
    """None of the parameters is left at zero."""
    torch.manual_seed(0)
    for p in net.parameters():
        if p.requires_grad:
            torch.nn.init.normal_(p, std=0.5 * max(p[0].numel(), 1) ** -0.5 if p.ndim > 1 else 0.1)
    net.float().eval()  # the table of sigmas of score_sde is in double precision


def converted(architecture, net, settings, precision="float32"):
    """(module, variables) of their network."""
    kind = importlib.import_module(f"jdiff.convert.{architecture}")
    tensors = kind.select({k: v.numpy() for k, v in net.state_dict().items()}, settings)
    module = kind.build(tensors, {}, **settings)
    return module, convert.variables_of(module, architecture, tensors, precision)


def compare(torch, architecture, net, call, size, label, classes, settings, precision) -> tuple[float, float]:
    """The largest differences of output and gradient, over the largest output and gradient."""
    rng = np.random.default_rng(0)
    x, label = rng.normal(size=(3, *size, 3)).astype(precision), np.array(label, precision)
    cond = np.array([0, classes - 1, 1]) if classes else None
    torch.set_default_dtype(getattr(torch, precision))  # of what their code makes
    net = net.to(getattr(torch, precision))
    theirs_x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    y = call(net, theirs_x, torch.tensor(label), cond)
    (y**2).sum().backward()
    theirs, theirs_grad = (a.detach().numpy().transpose(0, 2, 3, 1) for a in (y, theirs_x.grad))
    torch.set_default_dtype(torch.float32)
    with jax.enable_x64(precision == "float64"):
        module, variables = converted(architecture, net, settings, precision)

        def f(x):
            y = module.apply(variables, x, label, cond)
            return (y**2).sum(), y

        (_, ours), grad = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(f, has_aux=True))(x))
    scale, grad_scale = np.abs(theirs).max(), np.abs(theirs_grad).max()
    return float(np.abs(ours - theirs).max() / scale), float(np.abs(grad - theirs_grad).max() / grad_scale)


def waves(torch, x, features, sines_first, endpoint):
    """Their sinusoids in the label's precision: theirs are single whatever the network's."""
    half, x = features // 2, x if x.is_floating_point() else x.to(torch.get_default_dtype())
    w = torch.exp(-np.log(10_000) * torch.arange(half, dtype=x.dtype) / (half - endpoint))
    both = [torch.cos(x[:, None] * w), torch.sin(x[:, None] * w)]
    return torch.cat(both[::-1] if sines_first else both, dim=1)


def edm_cases(torch):
    from training import networks

    class Attention:  # theirs is in single precision
        @staticmethod
        def apply(q, k):
            return torch.einsum("ncq,nck->nqk", q, k / np.sqrt(k.shape[1])).softmax(dim=2)

    networks.PositionalEmbedding.forward = lambda self, x: waves(torch, x, self.num_channels, False, self.endpoint)
    networks.AttentionOp = Attention
    for title, kind, settings, size in EDM:
        classes = settings.get("label_dim", 0)

        def make(kind=kind, settings=settings, classes=classes):
            net = getattr(networks, kind)(img_resolution=16, in_channels=3, out_channels=3, **settings)

            def call(net, x, label, cond):  # the last class stands for none: all zeros in theirs
                return net(x, label, None if cond is None else torch.eye(classes + 1, dtype=x.dtype)[cond][:, :-1])

            return net, call

        yield title, make, size, [-1.3, 0.2, 0.9], classes + 1 if classes else 0, {}


def edm_images(torch):
    """Their sampler with their preconditioning, beside Heun's method on the same levels."""
    sampler = importlib.import_module("generate").edm_sampler
    from training import networks

    for title, kind, settings in (("DDPM++", "SongUNet", SONG), ("NCSN++", "SongUNet", SONG | NCSNPP)):
        classes = dict(label_dim=10)
        net = networks.EDMPrecond(img_resolution=16, img_channels=3, model_type=kind, **settings, **classes)
        randomize(torch, net)
        noise, labels = np.random.default_rng(1).normal(size=(3, 16, 16, 3)).astype(np.float32), np.arange(3)
        with torch.no_grad():
            theirs = sampler(net, torch.tensor(noise.transpose(0, 3, 1, 2)), torch.eye(10)[labels], num_steps=8)
        theirs = theirs.movedim(1, 3).numpy()
        (module, variables), schedule = converted("edm", net, {}), jdiff.EDM()
        where = dict(cond=jax.numpy.asarray(labels), conditioning=jdiff.conditioning.EDM())
        denoise = jdiff.denoiser(module.apply, variables, schedule, jdiff.targets.EDM(), **where)
        times = jdiff.grid.karras(schedule, 8)
        ours = jax.jit(jdiff.sample)(jdiff.solvers.Heun(), denoise, schedule, 80 * noise, times)
        yield f"{title}, images of 8 steps", float(np.abs(ours - theirs).max() / np.abs(theirs).max())


def adm_cases(torch):
    from guided_diffusion import nn, unet

    unet.timestep_embedding = lambda x, features: waves(torch, x, features, False, 0)
    unet.normalization = lambda channels: torch.nn.GroupNorm(32, channels)  # theirs casts to single precision
    unet.AttentionBlock.forward = lambda self, x: self._forward(x)
    unet.ResBlock.forward = lambda self, x, emb: self._forward(x, emb)
    torch.Tensor.float = lambda self: self
    del nn
    for title, settings, size in ADM:

        def make(settings=settings):
            net = unet.UNetModel(**settings)

            def call(net, x, label, cond):
                net.dtype = x.dtype
                return net(x, label, None if cond is None else torch.tensor(cond))

            return net, call

        flags = {k: settings[k] for k in ("num_heads", "num_head_channels", "use_new_attention_order") if k in settings}
        yield title, make, size, [3, 250, 999], settings.get("num_classes", 0), flags


def score_sde_cases(torch):
    sys.modules["op"] = types.SimpleNamespace(upfirdn2d=lambda *a, **k: resample(torch, *a, **k))  # theirs needs CUDA
    from models import ddpm, layers, ncsnpp

    layers.get_timestep_embedding = lambda x, features: waves(torch, x, features, True, 1)
    for title, kind, settings, ours in SCORE_SDE:

        def make(kind=kind, settings=settings):
            space, scaled = types.SimpleNamespace, settings["scale_by_sigma"]
            config = space(
                model=space(**settings), data=space(image_size=16, num_channels=3, centered=not scaled),
                training=space(continuous=True),
            )  # fmt: skip

            def call(net, x, label, cond):  # DDPM asks for whole numbers to look up sigmas
                return net(x, label.long() if scaled and kind == "ddpm" else label)

            return {"ddpm": ddpm.DDPM, "ncsnpp": ncsnpp.NCSNpp}[kind](config), call

        labels = [0.05, 1.0, 20.0] if settings["embedding_type"] == "fourier" else [3, 250, 7]
        yield title, make, (16, 16), labels, 0, ours


def score_sde_images(torch):
    """Their score functions, labels and marginals in a loop of DDIM, beside `jdiff.sample` with our conditionings."""
    import sde_lib
    from models import utils

    rng, times = np.random.default_rng(0), np.linspace(1, 0.02, 12)
    cases = {title: (make, settings) for title, make, *_, settings in score_sde_cases(torch)}
    score, continuous = jdiff.targets.Score(), jdiff.conditioning.Continuous(999.0)
    kinds = {
        "vp/cifar10_ddpmpp_continuous": (sde_lib.VPSDE(), jdiff.VP(), jdiff.targets.Eps(), continuous),
        "vp/cifar10_ncsnpp_continuous": (sde_lib.VPSDE(), jdiff.VP(), jdiff.targets.Eps(), continuous),
        "ve/cifar10_ncsnpp_continuous": (sde_lib.VESDE(), jdiff.VE(), score, jdiff.conditioning.Sigma()),
        "ve/cifar10_ncsnpp": (sde_lib.VESDE(), jdiff.VE(), score, indices),
    }
    for name, (sde, schedule, target, conditioning) in kinds.items():
        make, settings = cases[name]
        net, _ = make()
        randomize(torch, net)
        step = times if conditioning is not indices else np.round(times * 999) / 999  # the levels of the table
        score_fn = utils.get_score_fn(sde, net, train=False, continuous=conditioning is not indices)
        noise = rng.normal(size=(2, 16, 16, 3)).astype(np.float32) * (50 if target is score else 1)
        x, x0, eps = torch.tensor(noise.transpose(0, 3, 1, 2)), None, None
        with torch.no_grad():
            for t in step:
                mean, std = sde.marginal_prob(torch.ones_like(x), torch.full((2,), float(t)))
                alpha, sigma = float(mean.flatten()[0]), float(std[0])
                if x0 is not None:
                    x = alpha * x0 + sigma * eps
                eps = -sigma * score_fn(x, torch.full((2,), float(t)))
                x0 = (x - sigma * eps) / alpha
        module, variables = converted("score_sde", net, settings)
        denoise = jdiff.denoiser(module.apply, variables, schedule, target, conditioning=conditioning)
        ours = jax.jit(jdiff.sample)(jdiff.solvers.DDIM(), denoise, schedule, noise, jax.numpy.asarray(step))
        theirs = x0.numpy().transpose(0, 2, 3, 1)
        yield f"{name}, images", float(np.abs(ours - theirs).max() / np.abs(theirs).max())


@jax.tree_util.Partial
def indices(schedule, x, t):
    """The label of their networks of 1000 levels, the largest first."""
    return x, jax.numpy.broadcast_to(jax.numpy.round(999 * (1 - t)), x.shape[:1])


def resample(torch, x, kernel, up=1, down=1, pad=(0, 0)):
    """Zeros between the values, padding, the filter and every so manyth value."""
    B, C, H, W = x.shape
    out = torch.zeros(B, C, H * up, W * up, dtype=x.dtype)
    out[:, :, ::up, ::up] = x
    out = torch.nn.functional.pad(out, (*pad, *pad))
    kernel = kernel.to(x.dtype).flip(0, 1)[None, None].repeat(C, 1, 1, 1)
    return torch.nn.functional.conv2d(out, kernel, groups=C)[:, :, ::down, ::down]


if __name__ == "__main__":
    configs.run_script(main)
