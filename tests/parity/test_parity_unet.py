"""Our UNet against diffusers' UNet2DModel: the same weights, both ways, and the same images."""

import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside import diffusers, noises, replay, torch

import jdiff
from jdiff import convert
from jdiff.convert import diffusers as converter
from jdiff.convert import files

SMALL = dict(layers_per_block=1, block_out_channels=(32, 64), norm_num_groups=8)
ATTENDING = dict(down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"))
RESNET = dict(
    down_block_types=("ResnetDownsampleBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"), downsample_type="resnet",
    up_block_types=("AttnUpBlock2D", "AttnUpBlock2D", "ResnetUpsampleBlock2D"), upsample_type="resnet",
)  # fmt: skip
CASES = {
    "ddpm": SMALL
    | ATTENDING
    | dict(attention_head_dim=None, flip_sin_to_cos=False, freq_shift=1, downsample_padding=0, norm_eps=1e-6),
    "heads": SMALL | ATTENDING | dict(attention_head_dim=16, in_channels=1, out_channels=1, layers_per_block=2),
    "classes": SMALL | ATTENDING | dict(num_class_embeds=5, out_channels=6, add_attention=False),
    "resnet": SMALL
    | RESNET
    | dict(block_out_channels=(32, 48, 64), resnet_time_scale_shift="scale_shift", attn_norm_num_groups=8),
    "estimate beside x": SMALL
    | dict(
        down_block_types=("UNetResDownBlock2D", "UNetResAttnDownBlock2D"),
        up_block_types=("UNetResAttnUpBlock2D", "UNetResUpBlock2D"),
        in_channels=6,
    ),
}
SIZES = {"ddpm": (8, 8), "heads": (6, 10), "classes": (8, 4), "resnet": (4, 12), "estimate beside x": (4, 6)}


def peer(name):
    torch.manual_seed(0)
    net = diffusers.UNet2DModel(**CASES[name]).eval()
    for p in net.parameters():
        torch.nn.init.normal_(p, std=0.7 * p[0].numel() ** -0.5 if p.ndim > 1 else 0.2)
    return net


def ours(net, precision="float32"):
    tensors = {k: v.numpy() for k, v in net.state_dict().items()}
    tensors = converter.select(tensors, dict(net.config))
    module = converter.build(tensors, dict(net.config))
    return module, convert.variables_of(module, "diffusers", tensors, precision)


def inputs(name, channels, precision="float32"):
    rng = np.random.default_rng(0)
    x = rng.normal(size=(3, *SIZES[name], channels)).astype(precision)
    cond = np.array([0, 4, 2]) if "num_class_embeds" in CASES[name] else None
    return x, np.array([3, 250, 999], precision), cond


def theirs(net, x, label, cond):
    """(output, gradient with respect to x of the sum of the output's squares), channels last."""
    x = torch.tensor(x.transpose(0, 3, 1, 2), requires_grad=True)
    y = net(x, torch.tensor(label), None if cond is None else torch.tensor(cond)).sample
    (y**2).sum().backward()
    return [a.detach().numpy().transpose(0, 2, 3, 1) for a in (y, x.grad)]


class Double(torch.nn.Module):
    """Their waves in the precision of the label: theirs are single whatever the network's."""

    def __init__(self, half, swap, shift):
        super().__init__()
        self.half, self.swap, self.shift = half, swap, shift

    def forward(self, t):
        w = torch.exp(-np.log(10_000) * torch.arange(self.half, dtype=t.dtype) / (self.half - self.shift))
        waves = [torch.sin(t[:, None] * w), torch.cos(t[:, None] * w)]
        return torch.cat(waves[::-1] if self.swap else waves, -1)


@pytest.mark.parametrize("precision,tolerance", [("float32", 1e-5), ("float64", 1e-10)])
@pytest.mark.parametrize("name", CASES)
def test_outputs_and_gradients_agree(name, precision, tolerance):
    net = peer(name).to(getattr(torch, precision))
    config = net.config
    if precision == "float64":
        net.time_proj = Double(config["block_out_channels"][0] // 2, config["flip_sin_to_cos"], config["freq_shift"])
    x, label, cond = inputs(name, config["in_channels"], precision)
    y, g = theirs(net, x, label, cond)
    with jax.enable_x64(precision == "float64"):
        module, variables = ours(net, precision)

        def f(x, variables):  # an argument: XLA would compute with constants while it compiles
            y = module.apply(variables, x, label, cond)
            return (y**2).sum(), y

        (_, ours_y), ours_g = jax.tree.map(np.asarray, jax.jit(jax.value_and_grad(f, has_aux=True))(x, variables))
    assert ours_y.dtype == precision and np.abs(y).max() > 0.1
    np.testing.assert_allclose(ours_y, y, rtol=0, atol=tolerance * np.abs(y).max())
    np.testing.assert_allclose(ours_g, g, rtol=0, atol=tolerance * np.abs(g).max())


@pytest.mark.parametrize("name", CASES)
def test_load_a_saved_model(name, tmp_path):
    net = peer(name)
    net.save_pretrained(tmp_path / "safe")
    net.save_pretrained(tmp_path / "torch", safe_serialization=False)
    want = ours(net)[1]
    for kind in ("safe", "torch"):
        module, variables = convert.load(tmp_path / kind, "diffusers")
        jax.tree.map(np.testing.assert_array_equal, variables, want)
    # a file of weights with its config.json beside
    _, variables = convert.load(tmp_path / "safe" / "diffusion_pytorch_model.safetensors", "diffusers")
    jax.tree.map(np.testing.assert_array_equal, variables, want)


@pytest.mark.parametrize(
    "model",
    [
        dict(channels=32, multipliers=(1, 2), attention=(1,), num_classes=3, resample="block", heads=4),
        dict(channels=16, multipliers=(1, 2), blocks=1, attention=(), resample="conv", out_multiplier=1 / 2),
        dict(
            channels=16,
            multipliers=(1, 2, 2),
            blocks=1,
            attention=(),
            resample="conv",
            conv_padding=(0, 1),
            adaptive=False,
        ),
    ],
)
def test_ours_opens_in_diffusers(model, tmp_path):
    settings = dict(label_scale=1.0, wave_multiplier=1, groups=4, min_group_width=1) | model
    module = jdiff.create_model("unet", **settings)
    x = jax.random.normal(jax.random.key(0), (2, 8, 12, 2))
    label, cond = jnp.array([5.0, 70.0]), jnp.array([1, 3]) if module.num_classes else None
    shapes, rng = jax.eval_shape(module.init, jax.random.key(1), x, label, cond), np.random.default_rng(2)
    scale = lambda s: 0.7 * np.prod(s.shape[:-1]) ** -0.5 if len(s.shape) > 1 else 0.5  # noqa: E731
    variables = jax.tree.map(lambda s: rng.normal(size=s.shape, scale=scale(s)).astype(s.dtype), shapes)
    convert.save(tmp_path / "out", "diffusers", module, variables)
    net = diffusers.UNet2DModel.from_pretrained(tmp_path / "out")
    y = jax.jit(module.apply)(variables, x, label, cond)
    got, _ = theirs(net, np.asarray(x), np.asarray(label), None if cond is None else np.asarray(cond))
    np.testing.assert_allclose(y, got, rtol=0, atol=1e-5 * np.abs(got).max())
    again, same = convert.load(tmp_path / "out", "diffusers")
    jax.tree.map(np.testing.assert_array_equal, same, variables)
    np.testing.assert_array_equal(jax.jit(again.apply)(same, x, label, cond), y)


# the second has the settings beside google/ddpm-*; DDIM with them clips x_0 and, if so asked, counts eps from it
PIPELINES = {
    "ddim": (diffusers.DDIMPipeline, diffusers.DDIMScheduler(clip_sample=False), {}, jdiff.solvers.DDIM()),
    "ddpm, clipped": (
        diffusers.DDPMPipeline, diffusers.DDPMScheduler(clip_sample=True, variance_type="fixed_large"), {},
        jdiff.solvers.DDPM("large"),
    ),
    "ddim, clipped": (
        diffusers.DDIMPipeline, diffusers.DDIMScheduler(clip_sample=True), dict(use_clipped_model_output=True),
        jdiff.solvers.DDIM(),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PIPELINES)
def test_the_same_noise_gives_the_pipelines_image(name, tmp_path, monkeypatch):
    pipeline, scheduler, options, solver = PIPELINES[name]
    net, key = peer("ddpm"), jax.random.key(3)
    pipeline(net, scheduler).save_pretrained(tmp_path)
    module, variables = convert.load(tmp_path, "diffusers")  # the folder of the pipeline
    scheduler.set_timesteps(20)
    x = np.random.default_rng(0).normal(size=(2, 8, 8, 3)).astype(np.float32)
    replay(monkeypatch, scheduler, [draw.transpose(0, 3, 1, 2) for draw in noises(key, 20, x.shape)])
    image = torch.tensor(x.transpose(0, 3, 1, 2))
    with torch.no_grad():
        for t in scheduler.timesteps:
            image = scheduler.step(net(image, t).sample, t, image, **options).prev_sample
    schedule = jdiff.discrete(jdiff.betas.linear(1000))
    target, conditioning = jdiff.targets.Eps(), jdiff.conditioning.Index(1000)
    denoise = jdiff.denoiser(module.apply, variables, schedule, target, conditioning=conditioning)
    denoise = jdiff.guidance.threshold(denoise, schedule) if "clipped" in name else denoise
    times = jdiff.grid.discrete(1000, 20, "leading")
    got = jax.jit(jdiff.sample)(solver, denoise, schedule, x, times, key)
    image = image.numpy().transpose(0, 2, 3, 1)
    assert (np.abs(image).max() <= 1) == ("clipped" in name)
    np.testing.assert_allclose(got, image, rtol=0, atol=1e-3 * np.abs(image).max())


def test_deprecated_names_of_attention(tmp_path):
    net = peer("ddpm")
    tensors = {k: v.numpy() for k, v in net.state_dict().items()}
    old = {}
    for name, tensor in tensors.items():
        for new, was in (
            (".to_q.", ".query."),
            (".to_k.", ".key."),
            (".to_v.", ".value."),
            (".to_out.0.", ".proj_attn."),
        ):
            name = name.replace(new, was)
        old[name] = tensor
    assert set(old) != set(tensors)
    files.write(tmp_path / "model.safetensors", old)
    (tmp_path / "config.json").write_text(json.dumps(dict(net.config)))
    _, variables = convert.load(tmp_path, "diffusers")
    jax.tree.map(np.testing.assert_array_equal, variables, ours(net)[1])


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(center_input_sample=True), "center_input_sample True"),
        (dict(time_embedding_type="fourier"), "time_embedding_type 'fourier'"),
        (dict(down_block_types=("SkipDownBlock2D", "AttnDownBlock2D")), "block 'SkipDownBlock2D'"),
        (dict(up_block_types=("UpBlock2D", "UpBlock2D")), "attention on other levels"),
        (dict(block_out_channels=(32, 96)), "shape: .*down_blocks.1"),
        (dict(layers_per_block=2), "missing: .*down_blocks.0.resnets.1"),
    ],
)
def test_what_does_not_fit_is_said(change, text, tmp_path):
    net = peer("ddpm")
    net.save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text()) | change
    (tmp_path / "config.json").write_text(json.dumps(config))
    with pytest.raises(convert.Mismatch, match=text):
        convert.load(tmp_path, "diffusers")


def test_what_diffusers_has_not_is_said():
    for change, text in ((dict(resample="mean"), "resample='mean'"), (dict(skip_scale=0.5), "skip_scale=0.5")):
        net = jdiff.create_model("ddpm_cifar10", **change)
        with pytest.raises(ValueError, match=text):
            converter.table(net)
