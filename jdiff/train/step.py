"""The training state and the training step, as pure functions."""

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from flax import struct
from jax import lax

from jdiff.core.arrays import Array, wide
from jdiff.core.keys import BatchKey, fold
from jdiff.train.ema import constant, update


class TrainState(struct.PyTreeNode):
    """What a run knows after some steps; it holds arrays only, so it can be donated, sharded and checkpointed.

    Args:
        step: the number of steps taken, int32 of shape ().
        params: the parameters of the network.
        extra: its other collections, such as batch statistics, or None.
        ema: one average of the parameters, or a dict of averages by name; in float32 at least (see `ema.update`).
        opt_state: the state of the optimiser.
    """

    step: Array
    params: Any
    extra: Any
    ema: Any
    opt_state: Any


def init_state(
    params: Any, tx: optax.GradientTransformation, extra: Any = None, *, averages: Iterable[str] | None = None
) -> TrainState:
    """The state at step 0, where every average equals the parameters.

    Everything is copied, because the step donates its state. Averages of half-precision parameters are float32: cast
    them for a network that needs its own dtypes. Networks of this library compute in their `dtype` whatever that of
    their parameters is.

    Args:
        params: the parameters of the network.
        tx: the optimiser.
        extra: the other collections of the network, or None.
        averages: the names of several averages, for a step whose `decay` has a law for each name; None for one average.
    """

    def copy(tree):
        return jax.tree.map(lambda a: jnp.array(a, copy=True), tree)

    ema = copy(wide(params)) if averages is None else {name: copy(wide(params)) for name in averages}
    return TrainState(jnp.zeros((), jnp.int32), copy(params), copy(extra), ema, tx.init(copy(params)))


def make_train_step(
    loss: Callable,
    tx: optax.GradientTransformation,
    decay: Callable | float | Mapping[str, Callable | float],
    *,
    axis_name: str | None = None,
    accumulate: int = 1,
    project: Callable | None = None,
    skip_nonfinite: bool = False,
) -> Callable:
    """A pure step `(state, key, data, cond=None) -> (state, aux)`; jit it with donate_argnums=0.

    `key` is the same in the whole run: the step folds in `state.step`, so a resumed run draws what an undisturbed one
    draws. Gradients are added up, and their norm is taken, in float32 at least; the optimiser receives them in the
    dtypes of the parameters. `aux` is that of the loss, and gains two numbers: `loss`, and `grad_norm`, the norm of the
    mean gradient before any clipping.

    With `accumulate` > 1 or an `axis_name`, the loss receives a `BatchKey(key, start, size)` instead of a key, which
    tells it which rows of the global batch it sees. Losses that draw by position (`losses.denoising`, `keys.normal`)
    then agree with a loss of the whole batch at once. Gradients and the numbers in aux are averaged over slices and
    devices, floating collections over devices. Arrays in aux are joined again, on each device. Collections pass from
    slice to slice.

    Args:
        loss: `(params, key, data, cond) -> (scalar, aux)`, where aux is a dict of numbers and of arrays whose leading
            axis is the batch. Where the state has `extra` collections, it is called with `extra=` too, and returns the
            new ones as `aux["extra"]`.
        tx: the optimiser.
        decay: the share that the average keeps of its past: a number, or a law `(step) -> number` (see `train.ema`);
            or a dict of those, for a state with averages of the same names.
        axis_name: the axis of the pmap or shard_map around the step, in which each device has its part of the batch.
        accumulate: the number of slices into which each device divides its part, and which it works on in turn.
        project: acts on the parameters after the update and before the average.
        skip_nonfinite: let a step whose loss or gradient is not finite change nothing but `state.step`; aux gains
            `skipped`, 1 in such a step and 0 in others.

    Raises:
        ValueError: a decay outside [0, 1), or `accumulate` below 1; at the first call, a batch that does not divide
            into slices, data and cond of different lengths, a loss that returns no new collections, or averages whose
            names are not those of `decay`.
    """
    laws = {name: _law(law) for name, law in decay.items()} if isinstance(decay, Mapping) else _law(decay)
    if accumulate < 1:
        raise ValueError(f"accumulate is a number of slices, at least 1; got {accumulate}")

    def train_step(state: TrainState, key, data, cond=None) -> tuple[TrainState, dict]:
        key = fold(key, state.step)
        grads, aux, extra = gradients(loss, state, key, data, cond, slices=accumulate, axis_name=axis_name)
        if axis_name:
            grads, aux, extra = mean_over_devices(grads, aux, extra, axis_name)
        aux["grad_norm"] = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), grads, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if project is not None:
            params = project(params)
        new = TrainState(state.step + 1, params, extra, average(state.ema, params, state.step, laws), opt_state)
        if skip_nonfinite:
            finite = jnp.isfinite(aux["loss"]) & jnp.isfinite(aux["grad_norm"])
            kept = jax.tree.map(lambda after, before: jnp.where(finite, after, before), new, state)
            new, aux["skipped"] = kept.replace(step=new.step), jnp.where(finite, 0.0, 1.0)
        return new, aux

    return train_step


def gradients(
    loss: Callable, state: TrainState, key, data: Any, cond: Any, *, slices: int = 1, axis_name: str | None = None
) -> tuple[Any, dict, Any]:
    """(gradients, aux, extra) of this device's part of a batch, worked on in `slices` slices (see `make_train_step`).

    Raises:
        ValueError: the batch does not divide into slices, or data and cond have different lengths.
    """
    if axis_name is None and slices == 1:
        return value_and_grad(loss, state, key, data, cond)
    rows = _batch_length(data, cond)
    if rows % slices:
        raise ValueError(f"a batch of {rows} does not divide into {slices} slices")
    devices = lax.axis_size(axis_name) if axis_name else 1
    first = lax.axis_index(axis_name) * rows if axis_name else 0
    size = rows // slices

    def slice_gradients(state, j):
        part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, j * size, size), (data, cond))
        return value_and_grad(loss, state, BatchKey(key, first + j * size, rows * devices), *part, axis_name=axis_name)

    return slice_gradients(state, 0) if slices == 1 else accumulate(slice_gradients, state, slices, axis_name)


def value_and_grad(
    loss: Callable, state: TrainState, key, data: Any, cond: Any, *, axis_name: str | None = None
) -> tuple[Any, dict, Any]:
    """(gradients in float32 at least, aux with the loss in it, the new extra collections) of one batch or slice.

    Raises:
        ValueError: the state has extra collections, and the loss returned no new ones.
    """

    def scalar(params):
        if state.extra is None:
            return loss(params, key, data, cond)
        return loss(params, key, data, cond, extra=state.extra)

    # per device: shard_map would otherwise sum the gradients of replicated parameters over the devices
    (value, aux), grads = jax.value_and_grad(scalar, has_aux=True)(_varying(state.params, axis_name))
    grads = wide(grads)
    if state.extra is not None and "extra" not in aux:
        raise ValueError('the state has extra collections: the loss must return the new ones as aux["extra"]')
    aux = dict(aux, loss=value)
    return grads, aux, aux.pop("extra", state.extra)


def accumulate(
    slice_gradients: Callable, state: TrainState, count: int, axis_name: str | None = None
) -> tuple[Any, dict, Any]:
    """(mean gradients, aux, extra) of `slice_gradients(state, j) -> (gradients, aux, extra)` for j = 0, ..., count - 1.

    Extra collections pass from slice to slice. Numbers in aux are averaged, and arrays are joined along the batch.
    """

    def add_slice(carry, j):
        state, total = carry
        grads, aux, extra = slice_gradients(state, j)
        return (state.replace(extra=extra), jax.tree.map(jnp.add, total, grads)), aux

    zeros = _varying(jax.tree.map(jnp.zeros_like, wide(state.params)), axis_name)
    state = state.replace(extra=_varying(state.extra, axis_name))
    (state, total), aux = lax.scan(add_slice, (state, zeros), jnp.arange(count))
    aux = jax.tree.map(lambda a: a.mean() if a.ndim == 1 else a.reshape(-1, *a.shape[2:]), aux)
    return jax.tree.map(lambda g: g / count, total), aux, state.extra


def mean_over_devices(grads: Any, aux: dict, extra: Any, axis_name: str) -> tuple[Any, dict, Any]:
    """Gradients, numbers in aux and floating collections, each averaged over the devices; the rest as it is."""

    def mean_if(condition, tree):
        return jax.tree.map(lambda a: lax.pmean(a, axis_name) if condition(a) else a, tree)

    aux = mean_if(lambda a: a.ndim == 0, aux)
    return lax.pmean(grads, axis_name), aux, mean_if(lambda a: jnp.issubdtype(a.dtype, jnp.floating), extra)


def average(ema: Any, params: Any, step, laws: Callable | Mapping[str, Callable]) -> Any:
    """The average of the parameters one step later, or the dict of averages where `laws` is a dict of laws.

    Raises:
        ValueError: the averages and the laws have different names.
    """
    if not isinstance(laws, Mapping):
        return update(ema, params, laws(step))
    if not isinstance(ema, dict) or ema.keys() != laws.keys():
        raise ValueError(f"decay has laws for {', '.join(laws)}: make the state with init_state(averages=...)")
    return {name: update(ema[name], params, law(step)) for name, law in laws.items()}


def _law(decay: Callable | float) -> Callable:
    return decay if callable(decay) else constant(decay)


def _batch_length(data: Any, cond: Any) -> int:
    lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((data, cond))}
    if len(lengths) != 1 or () in lengths:
        raise ValueError(f"data and cond must share one leading axis, the batch; found {sorted(lengths)}")
    return lengths.pop()[0]


def _varying(tree: Any, axis_name: str | None) -> Any:
    """The tree as one that differs from device to device, as shard_map counts it."""

    def leaf(a):
        try:
            return lax.pcast(a, axis_name, to="varying")
        except ValueError:  # it is already
            return a

    return jax.tree.map(leaf, tree) if axis_name else tree


def make_train_loop(train_step: Callable, take: Callable | None = None, record: Callable | None = None) -> Callable:
    """Many steps in one program: `loop(state, key, arrays, index, count) -> (state, metrics)`; donate the state.

    `index` is (K, ...), and the first `count` steps are taken. `count` may be traced: whole visits and remainders are
    the same program, so a run that is cut anywhere ends in the same bits. `metrics` is a dict of float32 arrays
    (K, ...), nan from row `count` on. A loss that is not finite shows there.

    Args:
        train_step: what `make_train_step` returns.
        take: `(arrays, index[j]) -> (data, cond)` makes the batch of step j, on the device. By default arrays is a pair
            (data, cond), where cond may be None. An index (K, B) then picks rows of a whole data set of leading axis N,
            an index (K,) picks one of K batches.
        record: `(aux) -> dict` of arrays of fixed shapes, which metrics keeps of each step. By default it keeps the
            numbers in aux, among them `loss` and `grad_norm`.
    """
    take = take or (lambda arrays, rows: jax.tree.map(lambda a: a[rows], arrays))
    record = record or (lambda aux: {name: a for name, a in aux.items() if getattr(a, "shape", None) == ()})

    def loop(state, key, arrays, index, count):
        def recorded_step(state, j):
            state, aux = train_step(state, key, *take(arrays, index[j]))
            return state, {name: jnp.asarray(value).astype(jnp.float32) for name, value in record(aux).items()}

        def body(j, carry):
            state, metrics = carry
            state, values = recorded_step(state, j)
            return state, {name: rows.at[j].set(values[name]) for name, rows in metrics.items()}

        shapes = jax.eval_shape(lambda: recorded_step(state, 0)[1])
        metrics = {name: jnp.full((len(index), *a.shape), jnp.nan, jnp.float32) for name, a in shapes.items()}
        return lax.fori_loop(0, jnp.minimum(count, len(index)), body, (state, metrics))

    return loop
