"""Weights of score_sde_pytorch and of EDM in their published spelling: read as the network that they are."""

import dataclasses
import functools

import chex
import flax.linen as nn
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

from jdiff import convert
from jdiff.convert import Mismatch, edm, files, score_sde
from jdiff.convert.table import to_tensors
from jdiff.models.unet import InSigma, UNet
from jdiff.models.unet_presets import ADM, DDPM, NCSNPP, SONG

pytest.importorskip("safetensors")

SMALL = dict(channels=8, multipliers=(1, 2), blocks=1, attention=(1,))
PLUS = SONG | SMALL
NCSN = PLUS | NCSNPP
INDEXED = PLUS | dict(pyramid_in="residual", filter=(1, 3, 3, 1))  # NCSN++ without Fourier features
# by the configs of score_sde_pytorch: the module, and what has to be said beside the tensors
SCORE_SDE = {
    "ve/cifar10_ncsnpp": (InSigma(UNet(**INDEXED), False, 7), dict(scale_by_sigma=True)),
    "ve/cifar10_ncsnpp_continuous": (InSigma(UNet(**NCSN), False), {}),
    "ve/ffhq_256_ncsnpp_continuous": (
        InSigma(UNet(**NCSN | dict(pyramid_in="skip", pyramid_out="skip", multipliers=(1, 1, 2))), False), {},
    ),
    "ve/cifar10_ddpm": (InSigma(UNet(**DDPM | SMALL | dict(channels=32, decoder_attention="last")), False, 7),
                        dict(scale_by_sigma=True)),
    "vp/cifar10_ncsnpp": (UNet(**INDEXED), dict(scale_by_sigma=False)),
    "vp/cifar10_ddpmpp": (UNet(**PLUS | dict(blocks=2, attention=(0, 1))), {}),
    "vp/ddpm": (UNet(**DDPM | SMALL | dict(channels=32, multipliers=(1, 1, 2), decoder_attention="last")),
                dict(scale_by_sigma=False)),
}  # fmt: skip
EDM = {
    "DDPM++": UNet(**PLUS | dict(num_classes=3, augment_dim=9)),
    "NCSN++": UNet(**NCSN | dict(multipliers=(2, 2, 1))),
    "NCSN++, skips": UNet(**NCSN | dict(pyramid_in="skip", pyramid_out="skip")),
    "ADM": UNet(**ADM | SMALL | dict(channels=64, num_classes=3, min_group_width=4)),
    "ADM, baseline": UNet(**ADM | SMALL | dict(channels=64, min_group_width=4, out_multiplier=2)),
}


def random(module):
    """Variables without a number at its start; those of a module are drawn once."""
    return jax.tree.map(np.copy, _drawn(module))


@functools.cache
def _drawn(module):
    net = module.net if isinstance(module, InSigma) else module
    cond = jnp.zeros(1, int) if net.num_classes else None
    return jax.device_get(random_variables(module, jnp.zeros((1, 8, 8, 3)), jnp.ones(1), cond))


def check_same(module, variables, again, loaded):
    """The same settings but for those of initial values, and the same numbers."""
    assert dict(_fields(again)) == dict(_fields(module))
    chex.assert_trees_all_close(loaded, variables, rtol=1e-5, atol=1e-6)


def check_same_tensors(a, b):
    chex.assert_trees_all_equal(dict(a), dict(b))


def _fields(module):
    for f in dataclasses.fields(module):
        value = getattr(module, f.name)
        if isinstance(value, UNet):
            yield from _fields(value)
        elif f.name not in ("parent", "kernel_init", "out_scale", "qkv_scale"):
            yield f.name, value


# ---------------------------------------------------------------- score_sde_pytorch


@pytest.mark.parametrize("name", SCORE_SDE)
def test_score_sde(name, tmp_path):
    """From the spelling of the checkpoints, and of the network alone; and what cannot be told is asked for."""
    module, told = SCORE_SDE[name]
    variables = random(module)
    tensors = {"module.sigmas": np.geomspace(50, 0.01, 7)}  # a buffer of all of them
    tensors |= to_tensors(score_sde.table(module), variables)
    files.write(tmp_path / "a.safetensors", tensors)
    check_same(module, variables, *convert.load(tmp_path / "a.safetensors", "score_sde", **told))
    bare = {n.removeprefix("module.").removeprefix("all_modules."): tensor for n, tensor in tensors.items()}
    check_same_tensors(score_sde.select(bare, {}), score_sde.select(tensors, {}))
    if told:
        with pytest.raises(Mismatch, match="give scale_by_sigma=True for those of the ve configs, False for vp"):
            convert.load(tmp_path / "a.safetensors", "score_sde")


@pytest.mark.parametrize("name", SCORE_SDE)
def test_score_sde_there_and_back(name, tmp_path):
    """The config says what the tensors do not; an override says it louder."""
    module, _ = SCORE_SDE[name]
    variables = random(module)
    convert.save(tmp_path / "out", "score_sde", module, variables)
    check_same(module, variables, *convert.load(tmp_path / "out", "score_sde"))
    content, config = files.read(tmp_path / "out")
    other = score_sde.build(score_sde.select(content, config), config, dropout=0.3, filter=(1, 1, 1, 1))
    net = other.net if isinstance(module, InSigma) else other
    assert (net.dropout, net.filter) == (0.3, (1, 1, 1, 1))


@pytest.mark.parametrize(
    "module",
    [
        UNet(**PLUS | dict(filter=(1, 3, 3, 1), dropout=0.2)),
        UNet(**PLUS | dict(skip_scale=1.0, multipliers=(1,), attention=())),
        InSigma(UNet(**NCSN), centered=True),
        InSigma(UNet(**PLUS), centered=True, levels=5),
    ],
)
def test_unusual_settings_of_score_sde_return(module, tmp_path):
    variables = random(module)
    convert.save(tmp_path / "out", "score_sde", module, variables)
    check_same(module, variables, *convert.load(tmp_path / "out", "score_sde"))


@pytest.mark.parametrize(
    "module,text",
    [
        (UNet(**PLUS | dict(skip_scale=0.3)), "skip_scale=0.3"),
        (UNet(**PLUS | dict(num_classes=4)), "num_classes=4"),
        (UNet(**PLUS | dict(heads=2)), "heads=2"),
        (UNet(**DDPM | SMALL | dict(pyramid_in="skip", decoder_attention="last")), "pyramid_in='skip'"),
        (UNet(**DDPM | SMALL), "decoder_attention='each'"),
        (UNet(**SMALL), "resample='mean'"),
        (UNet(**NCSN), "fourier=16.0 in InSigma of levels=None"),
        (InSigma(UNet(**PLUS)), "fourier=0.0 in InSigma of levels=0"),
    ],
)
def test_what_score_sde_cannot_express_is_not_saved(module, text, tmp_path):
    with pytest.raises(ValueError, match=f"score_sde_pytorch has no such network: .*{text}"):
        convert.save(tmp_path / "out", "score_sde", module, {})
    assert not (tmp_path / "out").exists()


def test_lines_are_no_images(tmp_path):
    module = UNet(**PLUS)
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, 8, 3)), jnp.zeros(1))
    with pytest.raises(ValueError, match="takes images"):
        convert.save(tmp_path / "out", "score_sde", module, variables)


def test_scale_without_its_table_or_against_the_features(tmp_path):
    module, _ = SCORE_SDE["ve/cifar10_ncsnpp"]
    tensors = to_tensors(score_sde.table(module), random(module))
    del tensors["module.sigmas"]
    with pytest.raises(Mismatch, match="1 missing: module.sigmas"):
        score_sde.build(tensors, {}, scale_by_sigma=True)
    with pytest.raises(Mismatch, match="scale_by_sigma=False, centered=False"):
        score_sde.build(tensors, {}, scale_by_sigma=False, centered=False)
    module, _ = SCORE_SDE["ve/cifar10_ncsnpp_continuous"]
    tensors = to_tensors(score_sde.table(module), random(module))
    with pytest.raises(Mismatch, match="scale_by_sigma=False, centered=True, fourier=True"):
        score_sde.build(tensors, {}, scale_by_sigma=False)


@pytest.mark.parametrize("name", ["ve/cifar10_ncsnpp", "ve/cifar10_ncsnpp_continuous"])
def test_checkpoints_of_score_sde_hold_averages_in_the_order_of_the_parameters(name, tmp_path):
    torch = pytest.importorskip("torch", reason="files of torch.save: pip install jdiff[parity]")
    module, told = SCORE_SDE[name]
    variables = random(module)
    kept = to_tensors(score_sde.table(module), variables)
    tensors = {"module.sigmas": np.geomspace(50, 0.01, 7)} | {n: kept[n] for n in sorted(kept, key=_number)}
    averages = [torch.tensor(w) for n, w in tensors.items() if n not in ("module.sigmas", "module.all_modules.0.W")]
    frozen = ("module.sigmas", "module.all_modules.0.W")
    model = {n: torch.tensor(w if n in frozen else 0 * w) for n, w in tensors.items()}
    state = dict(optimizer={}, model=model, ema=dict(decay=0.999, num_updates=3, shadow_params=averages), step=3)
    torch.save(state, tmp_path / "checkpoint_24.pth")
    check_same(module, variables, *convert.load(tmp_path / "checkpoint_24.pth", "score_sde", **told))
    state["ema"]["shadow_params"] = averages[1:]
    torch.save(state, tmp_path / "short.pth")
    with pytest.raises(Mismatch, match=f"{len(averages) - 1} averages for {len(averages)} parameters"):
        convert.load(tmp_path / "short.pth", "score_sde", **told)


def _number(name):
    parts = name.split(".")
    return int(parts[2]) if len(parts) > 2 else -1


def test_names_of_score_sde():
    """Written down from its constructors: layers are numbered as they are made, matrices of attention (in, out)."""
    module, _ = SCORE_SDE["ve/cifar10_ncsnpp"]
    shapes = {n: w.shape for n, w in to_tensors(score_sde.table(module), random(module)).items()}
    prefix = "module.all_modules."
    assert shapes["module.sigmas"] == (7,)
    assert shapes[f"{prefix}0.weight"] == (32, 8) and shapes[f"{prefix}1.weight"] == (32, 32)
    assert shapes[f"{prefix}2.weight"] == (8, 3, 3, 3)
    assert shapes[f"{prefix}3.Dense_0.weight"] == (8, 32)
    assert shapes[f"{prefix}4.Conv_2.weight"] == (8, 8, 1, 1)  # the block that halves, then the pyramid
    assert shapes[f"{prefix}5.Conv2d_0.weight"] == (8, 3, 3, 3)
    assert shapes[f"{prefix}6.Conv_1.weight"] == (16, 16, 3, 3)
    assert shapes[f"{prefix}7.NIN_3.W"] == (16, 16)
    assert shapes[f"{prefix}18.weight"] == (3, 8, 3, 3) and f"{prefix}19.weight" not in shapes


# ---------------------------------------------------------------- the division by sigma


class Probe(nn.Module):
    """What it is shown."""

    @nn.compact
    def __call__(self, x, label, cond, train, augment):
        return x * label[:, None, None, None]


def test_an_index_into_the_table_of_sigmas():
    """net(2x - 1, k) / sigmas[k], and no gradient reaches the table."""
    module, x = InSigma(Probe(), centered=False, levels=5), jnp.ones((3, 2, 2, 1))
    label = jnp.array([0, 4, 2])
    variables = module.init(jax.random.key(0), x, label)
    np.testing.assert_allclose(variables["params"]["sigmas"], np.geomspace(50, 0.01, 5), rtol=1e-5)
    variables = {"params": {"sigmas": jnp.array([5.0, 4.0, 3.0, 2.0, 1.0])}}
    np.testing.assert_allclose(module.apply(variables, x, label)[:, 0, 0, 0], [0, 4, 2 / 3], rtol=1e-6)
    np.testing.assert_allclose(module.apply(variables, x, label * 1.0)[:, 0, 0, 0], [0, 4, 2 / 3], rtol=1e-6)
    grads = jax.grad(lambda v: module.apply(v, x, label).sum())(variables)
    np.testing.assert_array_equal(grads["params"]["sigmas"], 0)


# ---------------------------------------------------------------- EDM


def published(net, variables, size):
    """The names of EDM's state_dicts, the buffers among them, for images of `size`."""
    tensors, low = {}, size >> net.depth - 1
    for name, tensor in to_tensors(edm.table(net), variables).items():
        level = edm.LEVEL.match(name)
        at = low * int(level[2]) // 8 if level else 0
        tensors[edm.LEVEL.sub(f"\\g<1>.{at}x{at}_", name)] = tensor
    taps = np.outer(net.filter, net.filter) / np.sum(net.filter) ** 2
    if net.depth > 1 and net.filter:
        tensors[f"model.enc.{size // 2}x{size // 2}_down.conv0.resample_filter"] = taps[None, None].astype(np.float32)
    return tensors


@pytest.mark.parametrize("name", EDM)
def test_edm(name, tmp_path):
    """Of images of any size, with the preconditioning around it and without; and no way back."""
    module = EDM[name]
    variables = random(module)
    if name.startswith("ADM") and module.num_classes:
        variables["params"]["class"]["table"]["embedding"][-1] = 0  # of no class, which has no number there
    tensors = published(module, variables, 64) | {"sigma_min": np.zeros(()), "sigma_max": np.ones(())}
    assert "model.enc.64x64_conv.weight" in tensors
    if "baseline" in name:
        tensors["u"] = np.linspace(80, 0, 11)
    files.write(tmp_path / "a.safetensors", tensors)
    check_same(module, variables, *convert.load(tmp_path / "a.safetensors", "edm"))
    smaller = published(module, variables, 32)
    assert "model.enc.32x32_conv.weight" in smaller and "model.enc.64x64_conv.weight" not in smaller
    bare = {n.removeprefix("model."): w for n, w in smaller.items()}
    whole = {n: w for n, w in edm.select(tensors, {}).items() if n.startswith("model.")}
    check_same_tensors(edm.select(bare, {}), whole)
    with pytest.raises(ValueError, match="not exported to EDM's names"):
        convert.save(tmp_path / "out", "edm", module, variables)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["score_sde", "edm"])
def test_the_networks_that_are_read_give_the_same_numbers(kind, tmp_path):
    if kind == "score_sde":
        module, told = SCORE_SDE["ve/cifar10_ncsnpp"]
        variables = random(module)
        tensors = to_tensors(score_sde.table(module), variables)
    else:
        module, told = EDM["DDPM++"], {}
        variables = random(module)
        tensors = published(module, variables, 64)
    np.savez(tmp_path / "a.npz", **tensors)
    x, label = jax.random.normal(jax.random.key(0), (2, 8, 8, 3)), jnp.array([2, 5])
    call = x, label, (jnp.array([0, 3]) if kind == "edm" else None)
    again, loaded = convert.load(tmp_path / "a.npz", kind, **told)
    expected = jax.jit(module.apply)(variables, *call)
    assert np.isfinite(expected).all() and np.ptp(expected) > 0
    np.testing.assert_allclose(jax.jit(again.apply)(loaded, *call), expected, rtol=1e-4, atol=1e-4)


# ---------------------------------------------------------------- files that are not whole


@pytest.mark.parametrize(
    "kind,module,last",
    [
        (score_sde, SCORE_SDE["ve/cifar10_ncsnpp_continuous"][0], "module.all_modules.7.Conv_1.bias"),
        (score_sde, SCORE_SDE["vp/cifar10_ddpmpp"][0], "module.all_modules.11.NIN_2.b"),
        (edm, EDM["DDPM++"], "model.dec.16x16_block1.conv1.bias"),
        (edm, EDM["ADM"], "model.dec.16x16_block1.conv1.bias"),
    ],
)
def test_tensors_that_lack(kind, module, last, tmp_path):
    """`build` refuses what is not whole, or the table differs, which names tensors as the file does."""
    tensors = to_tensors(kind.table(module), random(module))
    optional = ("model.map_augment.weight", "model.map_label.weight")  # networks without are networks too
    for name in tensors:
        rest = {n: w for n, w in tensors.items() if n != name}
        try:
            lines = kind.table(kind.build(rest, {}))
        except Mismatch:
            continue
        asked = {n for line in lines for n in ((line.names,) if isinstance(line.names, str) else line.names)}
        assert asked != set(rest) or name in optional
    odd = {n: w for n, w in tensors.items() if n != last} | {f"{last}es": tensors[last]}
    files.write(tmp_path / "a.safetensors", odd)
    with pytest.raises(Mismatch, match=f"^1 missing: {last}; 1 unexpected: {last}es$"):
        convert.load(tmp_path / "a.safetensors", kind.__name__.rpartition(".")[2])
