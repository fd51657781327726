"""guided-diffusion's checkpoints: heads and the order of queries, keys and values, which no tensor tells."""

import functools

import chex
import jax
import numpy as np
import pytest

from jdiff import convert
from jdiff.convert import Mismatch, adm, files, unets
from jdiff.convert.table import to_tensors, to_variables
from jdiff.models.unet import UNet
from jdiff.models.unet_presets import ADM

pytest.importorskip("safetensors")

SMALL = ADM | dict(channels=32, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=32, null_class=False)
X, LABEL = np.random.default_rng(0).normal(size=(2, 4, 6, 3)).astype(np.float32), np.array([3.0, 700.0])


@functools.cache
def shapes_of(module, channels=3):
    """The shapes of its variables, for which heads do not matter."""
    cond = np.array([2, 0]) if module.num_classes else None
    return jax.eval_shape(module.init, jax.random.key(0), np.concatenate([X] * (channels // 3), -1), LABEL, cond)


def randomised(module, channels=3):
    draw = np.random.default_rng(1)
    scale = lambda s: s.shape[-2] ** -0.5 if len(s.shape) > 1 else 1.0  # noqa: E731
    shapes = shapes_of(module.clone(heads=1, head_channels=0, dropout=0.0), channels)
    return jax.tree.map(lambda s: draw.normal(size=s.shape, scale=scale(s)).astype(np.float32), shapes)


def old_order(tensors, heads):
    """Rows by head and then by query, key, value, in place of the new order's; heads: of so many channels."""
    tensors = dict(tensors)
    for name, rows in tensors.items():
        if ".qkv." in name:
            C = len(rows) // 3
            n, d = heads(C), C // heads(C)
            starts = [which * C + head * d for head in range(n) for which in range(3)]
            tensors[name] = np.concatenate([rows[start : start + d] for start in starts])
    return tensors


def write(path, module, variables, old=None):
    tensors = to_tensors(adm.table(module), variables)
    files.write(path / "a.safetensors", old_order(tensors, old) if old else tensors)
    return path / "a.safetensors"


@pytest.mark.parametrize("flags,fields,heads", [
    (dict(num_heads=4), dict(heads=4, head_channels=0), lambda C: 4),
    (dict(num_head_channels=16), dict(head_channels=16), lambda C: C // 16),
    (dict(num_heads=2, num_head_channels=-1), dict(heads=2, head_channels=0), lambda C: 2),
    (dict(num_heads=2, num_head_channels=32), dict(head_channels=32), lambda C: C // 32),
])  # fmt: skip
@pytest.mark.parametrize("new", [True, False])
def test_heads_and_order_by_the_flags(new, flags, fields, heads, tmp_path):
    module = UNet(**SMALL | dict(attention=(0, 1)) | fields)
    variables = randomised(module)
    path = write(tmp_path, module, variables, None if new else heads)
    flags = dict(use_new_attention_order=new) | flags
    content, _ = files.read(path)
    tensors = adm.select(content, flags)
    loaded = adm.build(tensors, {}, **flags)
    again = to_variables(adm.table(loaded), tensors, shapes_of(module.clone(heads=1, head_channels=0)))
    chex.assert_trees_all_equal(again, variables, strict=True)
    attending = [part for part in module.decoder() if part.attention]
    assert len(attending) == 4 and all(unets.heads(loaded, part) == heads(part.features) for part in attending)


@pytest.mark.slow
def test_our_words_and_theirs_agree(tmp_path):
    """On one file in the old order, 4 heads of 384 channels in any words are the network that was written."""
    module = UNet(**SMALL | dict(multipliers=(12,), attention=(0,), heads=4, head_channels=0))
    variables = randomised(module)
    path = write(tmp_path, module, variables, lambda C: 4)
    run = jax.jit(lambda module, variables: module.apply(variables, X, LABEL), static_argnums=0)
    want = run(module, variables)
    words = [dict(heads=4), dict(heads=4, head_channels=0), dict(head_channels=96), dict(num_heads=4)]
    for given in [*words, dict(num_head_channels=96)]:
        loaded, same = convert.load(path, "adm", use_new_attention_order=False, **given)
        chex.assert_trees_all_equal(same, variables, strict=True)
        np.testing.assert_array_equal(run(loaded, same), want)
    other = run(module.clone(heads=6), variables)  # the number of heads is seen in the output
    assert np.abs(other - want).max() > 1e-2 * np.abs(want).max()


def test_what_is_given_goes_before_what_lies_beside(tmp_path):
    module = UNet(**SMALL | dict(head_channels=16))
    convert.save(tmp_path, "adm", module, randomised(module))
    by_2 = (2, 0)
    content, config = files.read(tmp_path)
    for given, heads in (
        ({}, (4, 16)),
        (dict(heads=2), by_2),
        (dict(num_heads=2), by_2),
        (dict(head_channels=8), (4, 8)),
    ):
        loaded = adm.build(adm.select(content, config | given), config, **given)
        assert (loaded.heads, loaded.head_channels) == heads


def test_what_is_not_known_is_asked(tmp_path):
    module = UNet(**SMALL | dict(head_channels=16))
    path = write(tmp_path, module, randomised(module))
    start = "^not one of guided-diffusion's published networks: give its flags "
    for given, text in (
        ({}, "num_heads or num_head_channels and use_new_attention_order$"),
        (dict(num_heads=4), "use_new_attention_order$"),
        (dict(use_new_attention_order=True, head_channels=0), "num_heads or num_head_channels$"),
    ):
        with pytest.raises(Mismatch, match=start + text):
            convert.load(path, "adm", **given)
    for new in (True, False):
        with pytest.raises(Mismatch, match="64 channels do not divide into heads of 48"):
            convert.load(path, "adm", num_head_channels=48, use_new_attention_order=new)


# github.com/openai/guided-diffusion, README.md
WIDE = dict(channels=256, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, attention=(3, 4, 5), out_multiplier=2)
UP = dict(channels=192, multipliers=(1, 1, 2, 2, 4, 4), blocks=2, out_multiplier=1)
CLASSES = dict(num_classes=1000)
PUBLISHED = {  # fields, channels in, (heads, channels of a head), the new order
    "64x64_diffusion": (
        dict(channels=192, multipliers=(1, 2, 3, 4), blocks=3, attention=(1, 2, 3), out_multiplier=2) | CLASSES,
        3, (0, 64), True,
    ),
    "128x128_diffusion": (WIDE | dict(multipliers=(1, 1, 2, 3, 4), attention=(2, 3, 4)) | CLASSES, 3, (4, 0), False),
    "256x256_diffusion": (WIDE | CLASSES, 3, (0, 64), False),
    "256x256_diffusion_uncond": (WIDE, 3, (0, 64), False),
    "512x512_diffusion": (
        WIDE | dict(multipliers=(0.5, 1, 1, 2, 2, 4, 4), attention=(4, 5, 6), first_channels=128) | CLASSES,
        3, (0, 64), False,
    ),
    "64_256_upsampler": (UP | dict(attention=(3, 4, 5)) | CLASSES, 6, (4, 0), False),
    "128_512_upsampler": (UP | dict(attention=(4, 5)) | CLASSES, 6, (0, 64), False),
}  # fmt: skip


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_networks_are_known_by_their_shapes(name):
    fields, channels, (heads, each), new = PUBLISHED[name]
    module = UNet(**ADM | dict(null_class=False) | fields)
    widths = {part.name: part.features for part in [*module.encoder(), *module.middle(), *module.decoder()]}
    rows = {"qkv": 3, "modulation": 2}
    tensors = {  # all names, and of the shapes as much as tells something
        line.names: np.zeros(widths.get(line.path[1].removesuffix("_attention"), 0) * rows.get(line.path[-2], 1))
        for line in adm.table(module)
    }
    tensors["time_embed.0.weight"] = np.zeros((1, module.channels))
    tensors["input_blocks.0.0.weight"] = np.zeros((module.first_channels or module.channels, channels))
    tensors["out.2.weight"] = np.zeros(int(channels * module.out_multiplier))
    if module.num_classes:
        tensors["label_emb.weight"] = np.zeros(module.num_classes)
    C, qkv = widths["middle_0"], "middle_block.1.qkv.bias"
    tensors[qkv] = np.arange(3.0 * C)
    got = adm.build(adm.select(tensors, {}), {})
    assert got.head_channels == each and (each or got.heads == heads)
    assert got == module.clone(heads=got.heads, head_channels=each)
    assert (adm.select(tensors, {})[qkv] == tensors[qkv]).all() == new
    back = old_order(adm.select(tensors, {}), lambda C: C // each if each else heads)
    assert new or (back[qkv] == tensors[qkv]).all()
    told = adm.build(tensors, dict(num_heads=2, use_new_attention_order=True))
    assert (told.heads, told.head_channels) == (2, 0)


# ---------------------------------------------------------------- saving


@pytest.mark.parametrize("fields", [
    dict(head_channels=16, out_multiplier=2, dropout=0.1),
    dict(heads=2, head_channels=0, resample="conv", num_classes=3),
    dict(heads=1, head_channels=0, adaptive=False, out_multiplier=1 / 2),
])  # fmt: skip
def test_save_and_load(fields, tmp_path):
    module = UNet(**SMALL | fields)
    variables = randomised(module, channels=6 if module.out_multiplier < 1 else 3)
    convert.save(tmp_path, "adm", module, variables)
    loaded, same = convert.load(tmp_path, "adm")
    assert loaded == module
    chex.assert_trees_all_equal(same, variables, strict=True)


@pytest.mark.parametrize("fields,text", [
    (dict(augment_dim=9), "augment_dim=9"), (dict(skip_scale=0.7), "skip_scale=0.7"), (dict(resample="mean"), "'mean'"),
    (dict(middle_attention=False), "middle_attention=False"), (dict(epsilon=1e-6), "epsilon=1e-06"),
    (dict(filter=(1, 3, 3, 1)), "filter"), (dict(resample="conv", conv_padding=(0, 1)), "conv_padding"),
    (dict(multipliers=(2, 2)), "first_channels=0"), (dict(channels=48, head_channels=48), r"32 groups .* \[48, 144\]"),
    (dict(min_group_width=4), "32 groups"),
])  # fmt: skip
def test_what_adm_cannot_express_is_refused(fields, text, tmp_path):
    module = UNet(**SMALL | fields)
    with pytest.raises(ValueError, match=f"guided-diffusion.*{text}"):
        convert.save(tmp_path, "adm", module, shapes_of(UNet(**SMALL)))
    assert not list(tmp_path.iterdir())


def test_networks_of_other_dimensions_are_refused(tmp_path):
    module = UNet(**SMALL | dict(head_channels=32))
    shapes = jax.eval_shape(module.init, jax.random.key(0), X[:, 0], LABEL)
    with pytest.raises(ValueError, match="takes images, and this network signals of 1 dimensions"):
        convert.save(tmp_path, "adm", module, shapes)
