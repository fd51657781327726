"""Models by name: `@register_model` on a function that takes overrides and returns a module.

A tag names published weights. `register_tag(Tag("resnet18", "v1", ...))` makes `create_model("resnet18.v1")`
the network of those weights, `tag_of` tells what is known of them, and `jdiff.convert.denoiser` reads them. Any file
that is imported can register models and tags of its own. The manner is that of timm.
"""

import dataclasses
import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from jdiff.core.names import choose, did_you_mean

MODELS: dict[str, Callable[..., nn.Module]] = {}
_TAGS: dict[str, "Tag"] = {}


@dataclasses.dataclass(frozen=True)
class Training:
    """How a published network was trained, in names of `jdiff`: what `jdiff.convert.denoiser` needs beside its weights.

    Args:
        schedule: "EDM", "VP" or "VE"; or "linear" or "cosine", a table of `steps` betas.
        target: what the output means, a name of `jdiff.targets`: "Eps", "Score" or "EDM".
        conditioning: how the noise level is told, a name of `jdiff.conditioning`: "EDM", "Index", "Continuous" or
            "Sigma".
        steps: the length of the table of betas.
        sigma_data: the standard deviation of the data that target and conditioning "EDM" were given.
        learned_variance: whether the second half of the output's channels is the variance.
    """

    schedule: str
    target: str
    conditioning: str
    steps: int = 1000
    sigma_data: float = 0.5
    learned_variance: bool = False


@dataclasses.dataclass(frozen=True)
class Tag:
    """Published weights of a registered model. Nothing here downloads them.

    Args:
        model: the registered model.
        tag: the name of the weights among those of the model.
        overrides: the fields of the model that the weights need.
        url: where the weights are.
        license: the licence of the weights, not that of this library.
        parameters: their number, without fixed frequencies.
        shape: of one sample.
        architecture: the converter that reads the file, one of `jdiff.convert.ARCHITECTURES`.
        training: how a network for diffusion was trained; None for others.
        mean: of each channel, which is subtracted from images in [0, 1] before a classifier sees them.
        std: of each channel, by which they are then divided.
    """

    model: str
    tag: str
    overrides: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    url: str = ""
    license: str = ""
    parameters: int | None = None
    shape: tuple[int, ...] | None = None
    architecture: str = ""
    training: Training | None = None
    mean: tuple[float, ...] | None = None
    std: tuple[float, ...] | None = None

    @property
    def name(self) -> str:
        """`model.tag`, as `create_model` takes it."""
        return f"{self.model}.{self.tag}"


def register_model(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register `make(**overrides) -> module` under its own name; a decorator.

    Raises:
        ValueError: if a function of another file has the name.
    """
    name = make.__name__
    if name in MODELS and MODELS[name].__module__ != make.__module__:
        raise ValueError(f"a model named {name!r} is registered already, by {MODELS[name].__module__}")
    MODELS[name] = make
    return make


def register_tag(tag: Tag) -> Tag:
    """Register published weights of a model.

    Args:
        tag: what is known of them.

    Returns:
        The tag.

    Raises:
        ValueError: for an unknown model, or a name that is taken by other settings.
    """
    choose("model", tag.model, _in_order(MODELS))
    if _TAGS.get(tag.name, tag) != tag:
        raise ValueError(f"a tag named {tag.name!r} is registered already, with other settings")
    _TAGS[tag.name] = tag
    return tag


def create_model(name: str, **overrides) -> nn.Module:
    """The registered model or tag `name`, with fields overridden: `create_model("unet", channels=32)`.

    Args:
        name: of a model, or `model.tag`.
        overrides: fields of the module, by name.

    Returns:
        A Flax Linen module.

    Raises:
        ValueError: for an unknown name or field, with the nearest and the valid ones.
    """
    if "." in name:
        tag = tag_of(name)
        name, overrides = tag.model, dict(tag.overrides) | overrides
    make = choose("model", name, _in_order(MODELS))
    try:
        return make(**overrides)
    except TypeError as error:
        wrong = re.search(r"unexpected keyword argument '(\w+)'", str(error))
        if wrong is None or wrong[1] not in overrides:
            raise
    field = wrong[1]
    fields = _fields(make, create_model(name, **{f: value for f, value in overrides.items() if f != field}))
    raise ValueError(f"model {name!r} has no field {field!r}{did_you_mean(field, fields)}; one of {', '.join(fields)}")


def _fields(make: Callable[..., nn.Module], module: nn.Module) -> list[str]:
    """What may be overridden: the arguments of `make`, and where it takes any, `**overrides`, the module's fields."""
    arguments = inspect.signature(make).parameters.values()
    named = [a.name for a in arguments if a.kind in (a.POSITIONAL_OR_KEYWORD, a.KEYWORD_ONLY)]
    passed = type(module).__dataclass_fields__ if any(a.kind == a.VAR_KEYWORD for a in arguments) else ()
    return [f for f in dict.fromkeys([*named, *passed]) if f not in ("parent", "name")]


def model_arguments(name: str) -> dict[str, Any]:
    """What may be overridden in a registered model or tag, {field: value when it is left out}.

    Raises:
        ValueError: for an unknown name.

    >>> model_arguments("mlp")["features"]
    128
    """
    module = create_model(name)
    make = choose("model", name.partition(".")[0], _in_order(MODELS))
    return {field: getattr(module, field, None) for field in _fields(make, module)}


def list_models(pattern: str | None = None, tags: bool = False) -> list[str]:
    """The registered names, sorted.

    Args:
        pattern: a glob pattern that the names must match; None for all.
        tags: whether to list names `model.tag` too.

    >>> import jdiff
    >>> jdiff.list_models("unet*")
    ['unet', 'unet_digits']
    """
    names = [*MODELS, *(_TAGS if tags else ())]
    return sorted(name for name in names if pattern is None or fnmatch.fnmatch(name, pattern))


def tag_of(name: str) -> Tag:
    """What is known of the published weights `model.tag`.

    Raises:
        ValueError: for an unknown name, with the nearest.
    """
    model = name.partition(".")[0]
    choose("model", model, _in_order(MODELS))
    siblings = {known: tag for known, tag in _TAGS.items() if tag.model == model}
    if not siblings:
        raise ValueError(f"model {model!r} has no tags; tags are {', '.join(sorted(_TAGS)) or 'none'}")
    return choose("tag", name, _in_order(siblings))


def _in_order(table: Mapping[str, Any]) -> dict[str, Any]:
    return dict(sorted(table.items()))
