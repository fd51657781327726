"""From a network to E[x_0 | x_t]: the only place that calls one."""

from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp

from jdiff.core.arrays import Array
from jdiff.core.checks import check_floating, check_is, check_noun, check_same_shape
from jdiff.core.pytrees import is_leaf, noun, per_sample, static
from jdiff.denoisers.conditioning import FromFunction, LogSNR, times_of_rows
from jdiff.denoisers.targets import Target, solve
from jdiff.process.clock import Schedule, check_schedule
from jdiff.process.prediction import Denoise, Prediction


@runtime_checkable
class Module(Protocol):
    """What Flax and Haiku make: an object whose `apply` is the network."""

    def init(self, *args): ...
    def apply(self, *args): ...


@noun
class Denoiser(Denoise):
    """A network, its parameters and what its output means. `params`, `cond` and every number are leaves."""

    params: Any
    schedule: Schedule
    target: Target
    conditioning: Any
    cond: Any = per_sample()
    apply: Callable = static()
    learned_variance: bool = static(default=False)
    self_conditioning: bool = static(default=False)
    previous: Any = per_sample(default=None)

    def predict(self, x: Array, t, previous: Array | None = None) -> Prediction:
        """(E[x_0 | x_t], E[eps | x_t], extra); `extra` is the variance half of the output, or None.

        `previous`: with self-conditioning, an earlier estimate of x_0, (B, ...); None: the one `remember` set, or 0.
        """
        previous = self._shown(x, previous)
        out = run_network(self.apply, self.params, self.schedule, self.conditioning, x, t, self.cond, previous)
        out, extra = split_variance(out, x, self.learned_variance)
        return Prediction(*solve(self.schedule, self.target, x, out, t), extra)

    def _shown(self, x, previous):
        if not self.self_conditioning:
            if previous is not None:
                raise ValueError("this denoiser is shown no earlier estimate: make it with self_conditioning=True")
            return None
        previous = self.previous if previous is None else previous
        return jnp.zeros_like(x) if previous is None else previous


def denoiser(
    apply: Callable,
    params: Any,
    schedule: Schedule,
    target: Target,
    cond: Any = None,
    *,
    conditioning=LogSNR(),
    learned_variance: bool = False,
    self_conditioning: bool = False,
) -> Denoiser:
    """Turn a network into a denoiser (x, t) -> E[x_0 | x_t].

    Args:
        apply: the network, `apply(params, x, label, cond) -> F`, of the shape of x (B, ...).
        params: its parameters, a pytree.
        schedule: the schedule of the process.
        target: what the network was trained to regress.
        cond: what it is given beside x_t, as labels (B,), or None.
        conditioning: what it was trained with, `conditioning(schedule, x, t) -> (input, label (B,))`: one of
            `jdiff.conditioning`, a noun of your own, or a function.
        learned_variance: whether the last axis of F is twice that of x; its second half is handed on as
            `Prediction.extra`.
        self_conditioning: whether the last axis of the input is twice that of x, its second half being an earlier
            estimate of x_0, 0 where there is none: see `solvers.Remember`.

    Returns:
        The denoiser. Calling it raises ValueError if the network's output has not the shape that this asks for.

    Raises:
        TypeError: for what is no function, schedule, target or conditioning.
    """
    check_network(apply)
    check_schedule(schedule)
    check_target(target)
    check_is("conditioning", conditioning, Callable, "a conditioning, as conditioning.LogSNR()")
    conditioning = FromFunction(conditioning) if is_leaf(conditioning) else conditioning
    return Denoiser(
        params, schedule, target, conditioning, cond, apply, bool(learned_variance), bool(self_conditioning)
    )


def check_network(apply) -> None:
    """Raise TypeError unless `apply` can be called as a network; a module is not its function."""
    if isinstance(apply, Module) and not isinstance(apply, type):
        raise TypeError(f"the network is the module {type(apply).__name__}; give its function, module.apply")
    if callable(apply) and not is_leaf(apply):  # Equinox and NNX
        raise TypeError(
            f"the network is a {type(apply).__name__}, which holds its parameters; jdiff.adapt.equinox(model) and "
            "jdiff.adapt.nnx(model) make the pair (apply, params) of it"
        )
    check_is("the network", apply, Callable, "a function apply(params, x, label, cond); params come after it")


def check_target(target) -> None:
    """Raise TypeError unless `target` is one."""
    check_noun("target", target, Target, "a target, as targets.Eps()")


def remember(denoise: Denoise, previous: Array) -> Denoise:
    """The same denoiser, its self-conditioned networks shown an earlier estimate; also each of those inside guidance.

    Args:
        denoise: a denoiser with at least one `denoiser(..., self_conditioning=True)` in it.
        previous: the estimate of x_0, (B, ...).

    Returns:
        The denoiser that shows it.

    Raises:
        ValueError: if there is no self-conditioned denoiser in it.
    """
    found = []

    def tell(leaf):
        if not (isinstance(leaf, Denoiser) and leaf.self_conditioning):
            return leaf
        found.append(leaf)
        return leaf.replace(previous=previous)

    told = jax.tree.map(tell, denoise, is_leaf=lambda leaf: isinstance(leaf, Denoiser))
    if not found:
        raise ValueError("remember: no denoiser made with self_conditioning=True to show an earlier estimate to")
    return told


def run_network(apply, params, schedule, conditioning, x, t, cond, previous=None) -> Any:
    """The network's raw output for x_t, in the dtype of x; `previous`, if given, is beside x_t on the last axis."""
    check_network(apply)
    check_floating("x", x)
    shown, label = conditioning(schedule, x, times_of_rows(x, t))
    if jnp.shape(label)[:1] != x.shape[:1]:
        raise ValueError(f"the conditioning made a label {jnp.shape(label)} for x {x.shape}; expected {x.shape[:1]}")
    if previous is not None:
        check_same_shape("the earlier estimate", previous, "x", x)
        shown = jnp.concatenate([shown.astype(x.dtype), previous.astype(x.dtype)], axis=-1)
    out = apply(params, shown.astype(x.dtype), label, cond)
    return jax.tree.map(lambda a: jnp.asarray(a).astype(x.dtype), out)


def split_variance(out: Array, x: Array, learned_variance: bool) -> tuple[Array, Array | None]:
    """(F of x's shape, the variance half or None); ValueError if the output's shape is another."""
    expected = x.shape[:-1] + (2 * x.shape[-1],) if learned_variance else x.shape
    if not isinstance(out, jax.Array):
        raise ValueError(f"the network returned a {type(out).__name__}; expected one array {expected}")
    if out.shape != expected:
        raise ValueError(f"the network returned {out.shape} for an input of {x.shape}; expected {expected}")
    if not learned_variance:
        return out, None
    out, variance = jnp.split(out, 2, axis=-1)
    return out, variance
