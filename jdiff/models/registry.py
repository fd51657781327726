"""Models by name: `@register_model` on a function that takes overrides and returns a module; in timm's manner.

A tag names published weights: `register_tag("resnet18", "imagenet", ...)` makes `create_model("resnet18.imagenet")` the
architecture of those weights, and `tag_of` says where they come from and what they expect. Any file that is imported
can register models and tags of its own.
"""

import dataclasses
import fnmatch
import inspect
import re
from collections.abc import Callable, Mapping
from typing import Any

import flax.linen as nn

from jdiff.core.names import did_you_mean

_MODELS: dict[str, Callable[..., nn.Module]] = {}
_TAGS: dict[str, "Tag"] = {}


@dataclasses.dataclass(frozen=True)
class Tag:
    """Published weights of a registered model.

    `overrides`: fields of the model that they need; `url`: where they are, as data: nothing here downloads; `license`:
    theirs, not ours; `parameters`: their count; `shape`: of one sample; `information`: what a user must know to sample
    with them, such as {"architecture": "edm2", "conditioning": "EDM", "sigma_data": 0.5}.
    """

    model: str
    tag: str
    overrides: Mapping[str, Any]
    url: str
    license: str
    parameters: int | None
    shape: tuple[int, ...] | None
    information: Mapping[str, Any]

    @property
    def name(self) -> str:
        """`model.tag`, as `create_model` takes it."""
        return f"{self.model}.{self.tag}"


def register_model(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register `make(**overrides) -> module` under its own name. Raises ValueError if the name is taken."""
    name = make.__name__
    if name in _MODELS and _MODELS[name].__module__ != make.__module__:
        raise ValueError(f"a model named {name!r} is registered already, by {_MODELS[name].__module__}")
    _MODELS[name] = make
    return make


def register_tag(
    model: str,
    tag: str,
    overrides: Mapping[str, Any] | None = None,
    *,
    url: str = "",
    license: str = "",
    parameters: int | None = None,
    shape: tuple[int, ...] | None = None,
    **information,
) -> Tag:
    """Register published weights of a model, see `Tag`. Raises ValueError for an unknown model or a name taken."""
    _check_known(model, _MODELS, "model")
    new = Tag(model, tag, dict(overrides or {}), url, license, parameters, shape, information)
    if _TAGS.get(new.name, new) != new:
        raise ValueError(f"a tag named {new.name!r} is registered already, with other settings")
    _TAGS[new.name] = new
    return new


def create_model(name: str, **overrides) -> nn.Module:
    """The registered model or tag `name`, with fields overridden: `create_model("unet", channels=32)`.

    Raises ValueError for an unknown name or field, naming the nearest and listing the valid ones.
    """
    if "." in name:
        tag = tag_of(name)
        name, overrides = tag.model, dict(tag.overrides) | overrides
    _check_known(name, _MODELS, "model")
    make = _MODELS[name]
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


def list_models(pattern: str | None = None, tags: bool = False) -> list[str]:
    """The registered names, sorted; those that match a glob pattern if given; with `tags`, `model.tag` names too.

    >>> import jdiff
    >>> jdiff.list_models("unet*")
    ['unet', 'unet_digits']
    """
    names = [*_MODELS, *(_TAGS if tags else ())]
    return sorted(name for name in names if pattern is None or fnmatch.fnmatch(name, pattern))


def tag_of(name: str) -> Tag:
    """What is known of the published weights `model.tag`. Raises ValueError, naming the nearest."""
    model = name.partition(".")[0]
    _check_known(model, _MODELS, "model")
    siblings = [n for n in _TAGS if n.partition(".")[0] == model]
    if not siblings:
        raise ValueError(f"model {model!r} has no tags; tags are {', '.join(sorted(_TAGS)) or 'none'}")
    _check_known(name, siblings, "tag")
    return _TAGS[name]


def _check_known(name: str, names, kind: str) -> None:
    if name not in names:
        raise ValueError(f"unknown {kind} {name!r}{did_you_mean(name, names)}; one of {', '.join(sorted(names))}")
