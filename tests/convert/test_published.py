"""A denoiser from a path and a tag is the one that is made by hand, bit for bit."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import random_variables

import jdiff
from jdiff import convert
from jdiff.convert import Mismatch, published
from jdiff.models import DiT, EDM2UNet, Tag, Training, UNet, list_models, register_model, register_tag, registry, tag_of
from jdiff.models.unet import InSigma
from jdiff.models.unet_presets import ADM, DDPM, NCSNPP, SONG

pytest.importorskip("safetensors")

SMALL = dict(channels=32, multipliers=(1, 2), blocks=1)
LINEAR, COSINE = jdiff.discrete(jdiff.betas.linear(1000)), jdiff.discrete(jdiff.betas.cosine(1000))
INDEX = jdiff.conditioning.Index(1000)
# small networks in the published forms: the module, how it was trained, and the same by hand
CASES = {
    "dit": (
        DiT(width=16, depth=1, heads=2, num_classes=3, channels=3, label_scale=1.0, out_multiplier=2),
        Training("linear", "Eps", "Index", learned_variance=True), (LINEAR, jdiff.targets.Eps(), INDEX),
    ),
    "adm": (
        UNet(**ADM | SMALL | dict(head_channels=32, null_class=False, num_classes=3, out_multiplier=2)),
        Training("cosine", "Eps", "Index", learned_variance=True), (COSINE, jdiff.targets.Eps(), INDEX),
    ),
    "diffusers": (UNet(**DDPM | SMALL), Training("linear", "Eps", "Index"), (LINEAR, jdiff.targets.Eps(), INDEX)),
    "score_sde": (
        InSigma(UNet(**SONG | NCSNPP | SMALL), centered=False),
        Training("VE", "Score", "Sigma"), (jdiff.VE(), jdiff.targets.Score(), jdiff.conditioning.Sigma()),
    ),
    "edm2": (
        EDM2UNet(channels=8, multipliers=(1, 2), blocks=1, attention=(1,), head_channels=8, in_channels=3),
        Training("EDM", "EDM", "EDM", sigma_data=0.25),
        (jdiff.EDM(), jdiff.targets.EDM(0.25), jdiff.conditioning.EDM(0.25)),
    ),
}  # fmt: skip
X = np.random.default_rng(0).normal(size=(2, 4, 4, 3)).astype(np.float32)


@pytest.fixture
def tags(monkeypatch):
    """The registry, with what a test adds gone after it."""
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    monkeypatch.setattr(registry, "_TAGS", dict(registry._TAGS))


def saved(path, architecture):
    """A file of random weights of a small network, and the tag that says how to read it."""
    module, training, _ = CASES[architecture]
    cond = np.array([0, 2]) if getattr(module, "num_classes", 0) else None
    variables = random_variables(module, X, np.ones(2, "f"), cond)
    convert.save(path, architecture, module, variables)

    @register_model
    def small_net(**overrides):
        return module.clone(**overrides)

    fixed = ("frequencies", "phases")
    sizes = [a.size for p, a in jax.tree_util.tree_leaves_with_path(variables) if p[-1].key not in fixed]
    register_tag(Tag("small_net", "here", architecture=architecture, training=training, parameters=sum(sizes)))
    return module, variables, cond


@pytest.mark.parametrize("architecture", CASES)
def test_the_denoiser_of_a_tag_is_the_one_made_by_hand(architecture, tmp_path, tags):
    _, variables, cond = saved(tmp_path, architecture)
    schedule, target, conditioning = CASES[architecture][2]
    module, _ = convert.load(tmp_path, architecture)
    by_hand = jdiff.denoiser(
        module.apply, variables, schedule, target, cond, conditioning=conditioning,
        learned_variance=CASES[architecture][1].learned_variance,
    )  # fmt: skip
    denoise = convert.denoiser(tmp_path, "small_net.here", cond)
    assert denoise.apply.__self__ == module
    as_numpy = lambda d: jax.tree.map(np.asarray, d.replace(apply=module.apply))  # noqa: E731
    chex.assert_trees_all_equal(as_numpy(denoise), as_numpy(by_hand), strict=True)
    if architecture in ("dit", "edm2"):  # with one and with two outputs
        run, t = jax.jit(lambda denoise, x, t: denoise.predict(x, t)), jnp.float32(0.3)
        chex.assert_trees_all_equal(run(denoise, X, t), run(by_hand, X, t), strict=True)


def test_another_networks_file_and_other_tags_are_refused(tmp_path, tags):
    module, *_ = saved(tmp_path, "dit")
    tag = tag_of("small_net.here")
    register_tag(Tag("small_net", "larger", architecture="dit", training=tag.training, parameters=7))
    with pytest.raises(Mismatch, match=f"holds a network of {tag.parameters:,} parameters; small_net.larger has 7$"):
        convert.denoiser(tmp_path, "small_net.larger")
    with pytest.raises(ValueError, match=r"unknown tag 'small_net.her' \(did you mean 'small_net.here'\?\)"):
        convert.denoiser(tmp_path, "small_net.her")
    with pytest.raises(ValueError, match="'resnet18.imagenet1k_v1' are no denoiser; read them by jdiff.convert.load"):
        convert.denoiser(tmp_path, "resnet18.imagenet1k_v1")
    register_tag(Tag("small_net", "odd", architecture="dit", training=Training("linaer", "Eps", "Index")))
    with pytest.raises(ValueError, match=r"unknown schedule 'linaer' \(did you mean 'linear'\?\)"):
        convert.denoiser(tmp_path, "small_net.odd")


# what each converter's networks take and give, see docs/networks.md
EXPECTED = {
    "adm": (jdiff.targets.Eps, jdiff.conditioning.Index),
    "diffusers": (jdiff.targets.Eps, jdiff.conditioning.Index),
    "dit": (jdiff.targets.Eps, jdiff.conditioning.Index),
    "edm": (jdiff.targets.EDM, jdiff.conditioning.EDM),
    "edm2": (jdiff.targets.EDM, jdiff.conditioning.EDM),
}


def test_every_published_training_has_its_parts():
    parts = functools.cache(published.parts)
    for name in (name for name in list_models(tags=True) if "." in name):
        tag = tag_of(name)
        if tag.architecture == "resnet":
            assert tag.training is None
            continue
        schedule, target, conditioning = parts(tag.training)
        if tag.architecture in EXPECTED:
            assert (type(target), type(conditioning)) == EXPECTED[tag.architecture], name
        assert schedule.t_max <= 1
        two_outputs = tag.architecture == "dit" or tag.tag.startswith("openai")
        assert tag.training.learned_variance == two_outputs, name
