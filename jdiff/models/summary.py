"""What a network is made of: layers, output shapes, parameters and FLOPs, found by tracing, without running it.

Each layer is traced within a named scope of its own, and what is computed in a scope is counted for its layer.
"""

import dataclasses
import math
import re
from collections.abc import Iterator

import flax.linen as nn
import jax
import jax.numpy as jnp
from jax.extend import core

from jdiff.models.cpu import EXTRA_COLUMN

MARK = re.compile(r"<layer ([^<>]*)>")


@dataclasses.dataclass(frozen=True)
class Layer:
    """One layer, with the layers inside it.

    Args:
        path: the names of the layers around it, and its own.
        kind: its class.
        shape: of its output.
        parameters: of it and of the layers inside it.
        flops: likewise.
    """

    path: tuple[str, ...]
    kind: str
    shape: str
    parameters: int
    flops: int


@dataclasses.dataclass(frozen=True)
class Summary:
    """The layers in the order of their first call, the network itself first; `str` of it is a table."""

    layers: tuple[Layer, ...]

    @property
    def parameters(self) -> int:
        """The parameters of the whole network, fixed arrays such as random frequencies among them."""
        return self.layers[0].parameters

    @property
    def flops(self) -> int:
        """The operations of one call, 2 for each multiply-add of matrix products and convolutions.

        Elementwise operations are not counted.
        """
        return self.layers[0].flops

    def __str__(self) -> str:
        rows = [("layer", "output", "parameters", "FLOPs")]
        for layer in self.layers:
            name = f"{'  ' * len(layer.path)}{layer.path[-1]} ({layer.kind})" if layer.path else layer.kind
            rows.append((name, layer.shape, f"{layer.parameters:,}", _with_unit(layer.flops)))
        widths = [max(len(row[i]) for row in rows) for i in range(4)]
        lines = [
            f"{a:<{widths[0]}}  {b:<{widths[1]}}  {c:>{widths[2]}}  {d:>{widths[3]}}".rstrip() for a, b, c, d in rows
        ]
        return "\n".join([lines[0], "-" * max(map(len, lines)), *lines[1:]])


def summary(
    model: nn.Module, shape: tuple[int, ...], label=None, cond=None, depth: int | None = None, **options
) -> Summary:
    """The layers of a network for inputs of a shape. Nothing is run, and no parameter is made.

    Args:
        model: the network, which is called as (x, label, cond); so a text encoder is none.
        shape: of x, (B, ..., C).
        label: noise labels, or their shape; (B,) in float32 by default.
        cond: class labels or what else the network takes, or their shape.
        depth: how deep the listed layers lie, 0 being the network; None for all.
        options: arguments by name that go to the network, such as train=True.

    Returns:
        A `Summary`.

    >>> import jdiff
    >>> print(jdiff.models.summary(jdiff.create_model("mlp_step", layers=1, features=8), (4, 2)))
    layer              output  parameters  FLOPs
    --------------------------------------------
    StepMLP            4x2            842    256
      dense_0 (Dense)  4x8             24    128
      step_0 (Embed)   4x8            800      0
      out (Dense)      4x2             18    128
    """
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    label = jax.ShapeDtypeStruct(shape[:1], jnp.float32) if label is None else label
    calls: dict[tuple[str, ...], tuple[str, str]] = {}

    def watch(call, args, kwargs, context):
        path = context.module.path
        if context.method_name != "__call__":
            return call(*args, **kwargs)
        calls.setdefault(path, (type(context.module).__name__, ""))  # a layer is listed when it is entered
        with jax.named_scope(f"<layer {'.'.join(path)}>"):
            out = call(*args, **kwargs)
        calls[path] = (calls[path][0], calls[path][1] or _shape(out))
        return out

    def run(variables, x, label, cond):
        with nn.intercept_methods(watch):
            return model.apply(variables, x, label, cond, mutable=["batch_stats"], **options)

    keys = {name: jax.random.key(0) for name in ("params", "dropout")}
    variables = jax.eval_shape(lambda x, label, cond: model.init(keys, x, label, cond), x, label, cond)
    if options.get("train"):
        options["rngs"] = {"dropout": jax.random.key(0)} | options.get("rngs", {})
    jaxpr = jax.make_jaxpr(run)(variables, x, label, cond)
    sizes = [
        (tuple(str(k.key) for k in path), leaf.size)
        for path, leaf in jax.tree_util.tree_leaves_with_path(variables.get("params", {}))
    ]
    costs = [(tuple(name.split(".")) if name else (), cost) for name, cost in _costs(jaxpr.jaxpr, "")]
    layers = [
        Layer(path, kind, out, *(sum(n for p, n in items if p[: len(path)] == path) for items in (sizes, costs)))
        for path, (kind, out) in calls.items()
        if depth is None or len(path) <= depth
    ]
    return Summary(tuple(layers))


def _costs(jaxpr, layer: str, times: int = 1) -> Iterator[tuple[str, int]]:
    """(layer, FLOPs) of each matrix product and convolution of a jaxpr and of those inside it."""
    for eqn in jaxpr.eqns:
        scopes = str(eqn.source_info.name_stack)
        marks, kind = MARK.findall(scopes), eqn.primitive.name
        here = marks[-1] if marks else layer
        if kind == "dot_general":
            contracted = eqn.params["dimension_numbers"][0][0]
            lhs, out = eqn.invars[0].aval.shape, eqn.outvars[0].aval.size
            yield here, times * 2 * out * math.prod(lhs[i] for i in contracted)
        elif kind == "conv_general_dilated":
            kernel, numbers = eqn.invars[1].aval.shape, eqn.params["dimension_numbers"].rhs_spec
            inputs = math.prod(kernel[i] for i in numbers[1:])  # channels of the group and positions
            spread = math.prod(eqn.params["lhs_dilation"])  # the zeros of a transposed convolution are not counted
            groups = eqn.params["batch_group_count"]
            size = eqn.outvars[0].aval.size
            if EXTRA_COLUMN in scopes:  # made for speed and cut off at once: no part of the network
                columns = eqn.outvars[0].aval.shape[2]
                size = size // columns * (columns - 1)
            yield here, times * 2 * size * inputs // (spread * groups)
        elif kind.startswith("dot_product_attention_fwd"):  # cuDNN's: q (B, T, N, D), k (B, S, N, D)
            q, k = (a.aval.shape for a in eqn.invars[:2])
            yield here, times * 4 * math.prod(q) * k[1]
        elif kind == "cond":
            branches = [list(_costs(branch.jaxpr, here, times)) for branch in eqn.params["branches"]]
            yield from max(branches, key=lambda costs: sum(cost for _, cost in costs))
        else:
            again = eqn.params["length"] if kind == "scan" else 1  # a while loop's body is counted once
            for inner in _inner(eqn):
                yield from _costs(inner, here, times * again)


def _inner(eqn) -> Iterator:
    for value in eqn.params.values():
        for part in value if isinstance(value, tuple | list) else (value,):
            if isinstance(part, core.ClosedJaxpr):
                yield part.jaxpr
            elif isinstance(part, core.Jaxpr):
                yield part


def _shape(out) -> str:
    leaves = jax.tree.leaves(out)
    return ", ".join("x".join(map(str, leaf.shape)) or "number" for leaf in leaves[:3]) + ", ..." * (len(leaves) > 3)


def _with_unit(number: int) -> str:
    for unit, scale in (("T", 1e12), ("G", 1e9), ("M", 1e6), ("k", 1e3)):
        if number >= scale:
            return f"{number / scale:.3g} {unit}"
    return str(number)
