"""Networks of other makers as the pair (apply, params) that `denoiser` and the losses take.

    apply, params = jdiff.adapt.equinox(model)  # or .nnx(model), .linen(module, variables), .function(f, params)
    denoise = jdiff.denoiser(apply, params, schedule, target)

`params` is a pytree of floating arrays, which optax trains. `apply(params, x, label, cond)` calls the network as
network(x, label), or as network(x, label, cond) where there is a cond; `call` says otherwise.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from jdiff.core.checks import check_is
from jdiff.core.trees import path_names
from jdiff.denoisers.network import Module


def _as_it_is(network: Callable, x, label, cond) -> Any:
    """network(x, label), or network(x, label, cond) where there is a cond."""
    return network(x, label) if cond is None else network(x, label, cond)


@dataclasses.dataclass(frozen=True, eq=False)
class Apply:
    """A network as `apply(params, x, label, cond) -> F`.

    Attributes:
        name: how it prints.
        network: `network(params)` is the network itself with these parameters, to save or to use in its own library.
        call: `call(network, x, label, cond)`, how it is called.
        batched: whether it takes a batch; else it takes one sample at a time.
    """

    name: str
    network: Callable[[Any], Any]
    call: Callable
    batched: bool

    def __repr__(self) -> str:
        return self.name

    def __call__(self, params: Any, x, label, cond: Any = None) -> Any:
        """F for x (B, ...) and label (B,); cond is None, or a pytree whose arrays have B rows."""

        def one(x, label, cond):
            return self.call(self.network(params), x, label, cond)

        if self.batched:
            return one(x, label, cond)
        rows = jax.tree.map(lambda a: 0 if jnp.ndim(a) else None, cond)
        return jax.vmap(one, in_axes=(0, 0, rows))(x, label, cond)


def function(f: Callable, params: Any, *, call: Callable = _as_it_is, batched: bool = True) -> tuple[Apply, Any]:
    """The pair (apply, params) of a function `f(params, x, label)` or `f(params, x, label, cond)`.

    >>> apply, params = function(lambda params, x, t: params["scale"] * x, {"scale": 2.0})
    >>> apply(params, jnp.ones((3, 2)), jnp.ones(3)).shape
    (3, 2)

    Args:
        f: the function.
        params: its parameters, a pytree of floating arrays.
        call: `call(network, x, label, cond) -> F`, where network(...) is f(params, ...).
        batched: whether x is (B, ...) and label (B,); else f takes one sample, with a label ().

    Returns:
        (apply, params).

    Raises:
        TypeError: for what is no function, and parameters that are no floating arrays.
    """
    check_is("the network", f, Callable, "a function f(params, x, label); its params come after it")
    name = getattr(f, "__name__", type(f).__name__)
    return Apply(f"adapt.function({name})", functools.partial(functools.partial, f), call, batched), _arrays(params)


def linen(module: Any, variables: Any, *, call: Callable = _as_it_is, batched: bool = True) -> tuple[Apply, Any]:
    """The pair (apply, params) of a Flax Linen module whose call is not (x, label, cond).

    Args:
        module: the module.
        variables: what `module.init` returned. Collections other than "params", as batch statistics, stay as they are.
        call: as for `function`; for a module with a switch, `lambda net, x, t, cond: net(x, t, train=False)`.
        batched: as for `function`.

    Returns:
        (apply, params), with params = {"params": ...}.

    Raises:
        TypeError: for what is no module, and variables without "params".
    """
    check_is("the network", module, Module, "a Linen module; a function goes to jdiff.adapt.function")
    if not hasattr(variables, "keys") or "params" not in variables:
        raise TypeError('variables have no "params"; expected what module.init(key, ...) returned')
    rest = {name: value for name, value in variables.items() if name != "params"}

    def network(params):
        return functools.partial(module.apply, rest | params)

    params = _arrays({"params": variables["params"]})
    return Apply(f"adapt.linen({type(module).__name__})", network, call, batched), params


def equinox(model: Any, *, call: Callable = _as_it_is, batched: bool = False) -> tuple[Apply, Any]:
    """The pair (apply, params) of an Equinox module. Its floating arrays are the params, by the names of its fields.

    Args:
        model: the module.
        call: as for `function`.
        batched: whether it takes (B, ...); Equinox's own layers take one sample, with a label ().

    Returns:
        (apply, params), params a dict of dicts. `apply.network(params)` is the module with other parameters.

    Raises:
        TypeError: for what is no Equinox module.
        ValueError: for a module with state, as batch statistics, or with dropout that is on.
    """
    import equinox as eqx

    check_is("the network", model, eqx.Module, "an Equinox module")
    marked = eqx.nn.StateIndex, eqx.nn.Dropout
    for part in jax.tree.leaves(model, is_leaf=lambda node: isinstance(node, marked)):
        if isinstance(part, eqx.nn.StateIndex):
            raise ValueError(f"{type(model).__name__} has state, as batch statistics; use norms without it")
        if isinstance(part, eqx.nn.Dropout) and not part.inference and part.p:
            raise ValueError(f"{type(model).__name__} draws dropout; give equinox.nn.inference_mode(model)")
    arrays, rest = eqx.partition(model, eqx.is_inexact_array)
    params, fill = _by_name(arrays)

    def network(params):
        return eqx.combine(fill(params), rest)

    return Apply(f"adapt.equinox({type(model).__name__})", network, call, batched), params


def nnx(model: Any, *, call: Callable = _as_it_is, batched: bool = True) -> tuple[Apply, Any]:
    """The pair (apply, params) of a Flax NNX module. Its floating `nnx.Param` are the params, by their names.

    What else it holds, as batch statistics, stays as it is: a module that changes it in a call is an error.

    Args:
        model: the module, which is not changed.
        call: as for `function`.
        batched: as for `function`.

    Returns:
        (apply, params), params a dict of dicts. `apply.network(params)` is the module with other parameters.

    Raises:
        TypeError: for what is no NNX module.
        ValueError: when it is called and changes its state, as batch statistics or the keys of dropout.
    """
    from flax import nnx

    check_is("the network", model, nnx.Module, "an object of a Flax NNX module")

    def is_param(path, variable) -> bool:
        return isinstance(variable, nnx.Param) and jnp.issubdtype(jnp.result_type(variable), jnp.floating)

    graph, *states = nnx.split(model, is_param, ...)
    arrays, rest = states
    params, fill = _by_name(arrays)

    def network(params):
        return nnx.merge(graph, fill(params), rest, copy=True)

    def checked(model, x, label, cond):
        def held():
            state = nnx.split(model, is_param, ...)[2]
            return {".".join(_names(path)): leaf for path, leaf in jax.tree_util.tree_leaves_with_path(state)}

        before = held()
        out = call(model, x, label, cond)
        after = held()
        changed = sorted(name for name, leaf in before.items() if after.get(name) is not leaf)
        if changed:
            raise ValueError(
                f"{type(model).__name__} changes {changed[0]} when it is called; give model.eval(), or norms and "
                "dropout without state"
            )
        return out

    return Apply(f"adapt.nnx({type(model).__name__})", network, checked, batched), params


# ---------------------------------------------------------------- parameters


def _by_name(tree: Any) -> tuple[dict, Callable[[Any], Any]]:
    """The arrays of a tree as a dict of dicts, by their names, and the function that puts such arrays into the tree."""
    paths = [_names(path) for path, _ in jax.tree_util.tree_leaves_with_path(tree)]
    structure = jax.tree.structure(tree)
    params: dict = {}
    for names, leaf in zip(paths, jax.tree.leaves(tree), strict=True):
        functools.reduce(lambda part, name: part.setdefault(name, {}), names[:-1], params)[names[-1]] = leaf

    def fill(params):
        return jax.tree.unflatten(
            structure, [functools.reduce(lambda part, name: part[name], names, params) for names in paths]
        )

    return params, fill


def _names(path: tuple) -> list[str]:
    names = path_names(path)
    return names[:-1] if len(names) > 1 and names[-1] == "value" else names  # NNX: the value of a variable


def _arrays(params: Any) -> Any:
    """`params` with numbers as arrays; TypeError for leaves that cannot be trained."""

    def leaf(path, value):
        name = "/".join(path_names(path)) or "params"
        if not isinstance(value, (jax.Array, np.ndarray, np.generic, float)):
            raise TypeError(f"{name} is a {type(value).__name__}; params are arrays: keep the rest in the function")
        if not jnp.issubdtype(jnp.result_type(value), jnp.floating):
            kind = jnp.result_type(value)
            raise TypeError(f"{name} is {kind}; params are floating arrays: keep the rest in the function")
        return jnp.asarray(value)

    return jax.tree_util.tree_map_with_path(leaf, params)
