"""The registry of models and of tags for published weights."""

import flax.linen as nn
import jax
import jax.numpy as jnp
import pytest

from jdiff import convert
from jdiff.models import ResNet, Tag, create_model, list_models, register_model, register_tag, registry, tag_of

MNIST = Tag("my_net", "mnist", dict(num_classes=10), url="https://here", license="MIT")


@pytest.fixture(autouse=True)
def mine(monkeypatch):
    """A user's own model with one tag, gone after the test."""
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    monkeypatch.setattr(registry, "_TAGS", dict(registry._TAGS))

    @register_model
    def my_net(**overrides):
        return ResNet(**dict(width=8) | overrides)

    register_tag(MNIST)


def test_a_tag_builds_the_architecture_of_its_weights():
    assert create_model("my_net.mnist") == ResNet(width=8, num_classes=10)
    assert create_model("my_net.mnist", num_classes=3, width=4) == ResNet(width=4, num_classes=3)
    tag = tag_of("my_net.mnist")
    assert tag == MNIST and tag.name == "my_net.mnist"


def test_lists():
    assert list_models("my_*") == ["my_net"]
    assert list_models("my_*", tags=True) == ["my_net", "my_net.mnist"]
    assert list_models("*mnist", tags=True) == ["my_net.mnist"]
    assert list_models("*mnist") == []


def test_wrong_names_are_answered_with_the_nearest():
    with pytest.raises(ValueError, match=r"unknown model 'my_nett' \(did you mean 'my_net'\?\); one of .*my_net, "):
        create_model("my_nett.mnist")
    with pytest.raises(ValueError, match=r"unknown tag 'my_net.mnits' \(did you mean 'my_net.mnist'\?\); one of my_n"):
        create_model("my_net.mnits")
    with pytest.raises(ValueError, match="model 'mlp' has no tags; tags are .*my_net.mnist"):
        tag_of("mlp.mnist")
    with pytest.raises(ValueError, match=r"no field 'widht' \(did you mean 'width'\?\)"):
        create_model("my_net.mnist", widht=3)
    with pytest.raises(ValueError, match=r"unknown model 'my_ne' \(did you"):
        register_tag(Tag("my_ne", "x"))


def test_a_users_function_has_a_signature_of_its_own():
    """A required field, and arguments that are no fields of the module: both can be given, other names are refused."""

    class Needs(nn.Module):
        features: int
        depth: int = 1

    @register_model
    def needs(**overrides):
        return Needs(**overrides)

    @register_model
    def sized(size="s", *, width=3):
        return Needs(features=width * len(size))

    @register_model
    def both(features, **overrides):
        return Needs(features, **overrides)

    register_model(Needs)
    assert create_model("needs", features=3) == create_model("both", features=3) == create_model("Needs", features=3)
    assert create_model("sized", size="xs", width=4).features == 8
    for name in ("needs", "both", "Needs"):
        with pytest.raises(ValueError, match=r"no field 'dept' \(did you mean 'depth'\?\); one of features, depth"):
            create_model(name, features=3, dept=2)
    with pytest.raises(ValueError, match=r"no field 'features'; one of size, width"):
        create_model("sized", features=3)
    with pytest.raises(TypeError, match="features"):
        create_model("needs")


def test_names_are_not_taken_twice():
    register_tag(MNIST)
    with pytest.raises(ValueError, match="'my_net.mnist' is registered already"):
        register_tag(Tag("my_net", "mnist", dict(num_classes=11)))

    def resnet18(**overrides):
        return ResNet(**overrides)

    with pytest.raises(ValueError, match="'resnet18' is registered already, by jdiff.models.resnet"):
        register_model(resnet18)


PUBLISHED = [name for name in list_models(tags=True) if "." in name]


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_tag_says_where_its_weights_are_and_how_to_read_them(name):
    tag = tag_of(name)
    assert tag.url.startswith("https://") and tag.license and tag.parameters and tag.shape
    assert tag.architecture in convert.ARCHITECTURES


def distinct():
    """One tag of each network, dropout aside, which has no parameters; slow where it has more than 150M."""
    tags = {create_model(name).clone(**NO_DROPOUT.get(tag_of(name).architecture, {})): name for name in PUBLISHED}
    for name in tags.values():
        yield pytest.param(name, marks=[pytest.mark.slow] * (tag_of(name).parameters > 150e6))


NO_DROPOUT = {kind: dict(dropout=0.0) for kind in ("adm", "diffusers", "edm", "edm2", "score_sde")}


@pytest.mark.parametrize("name", list(distinct()))
def test_a_published_tag_builds_a_network_of_the_stated_parameters(name):
    """Fixed frequencies are not counted: PyTorch's code has them as buffers."""
    tag, module = tag_of(name), create_model(name)
    cond = jnp.zeros(1, int) if getattr(module, "num_classes", 0) and not isinstance(module, ResNet) else None
    variables = jax.eval_shape(module.init, jax.random.key(0), jnp.zeros((1, *tag.shape)), jnp.zeros(1), cond)
    leaves = jax.tree_util.tree_leaves_with_path(variables["params"])
    assert sum(leaf.size for path, leaf in leaves if path[-1].key not in ("frequencies", "phases")) == tag.parameters
