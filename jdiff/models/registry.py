"""Models by name: `@register_model` on a function that takes overrides and returns a module; in timm's manner."""

import difflib
import fnmatch
from collections.abc import Callable

import flax.linen as nn

_MODELS: dict[str, Callable[..., nn.Module]] = {}


def register_model(make: Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """Register `make(**overrides) -> module` under its own name. Raises ValueError if the name is taken."""
    name = make.__name__
    if name in _MODELS and _MODELS[name].__module__ != make.__module__:
        raise ValueError(f"a model named {name!r} is registered already, by {_MODELS[name].__module__}")
    _MODELS[name] = make
    return make


def create_model(name: str, **overrides) -> nn.Module:
    """The registered model `name`, with fields overridden: `create_model("unet", channels=32)`.

    Raises ValueError for an unknown name or field, naming the nearest and listing the valid ones.
    """
    if name not in _MODELS:
        raise ValueError(f"unknown model {name!r}{_nearest(name, _MODELS)}; one of {', '.join(list_models())}")
    fields = [f for f in type(_MODELS[name]()).__dataclass_fields__ if f not in ("parent", "name")]
    for field in overrides:
        if field not in fields:
            raise ValueError(
                f"model {name!r} has no field {field!r}{_nearest(field, fields)}; one of {', '.join(fields)}"
            )
    return _MODELS[name](**overrides)


def list_models(pattern: str | None = None) -> list[str]:
    """The registered names, sorted; those that match a glob pattern if given.

    >>> import jdiff
    >>> jdiff.list_models("unet*")
    ['unet', 'unet_digits']
    """
    return sorted(name for name in _MODELS if pattern is None or fnmatch.fnmatch(name, pattern))


def _nearest(name: str, names) -> str:
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
