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


@struct.dataclass
class TrainState:
    """Arrays only: donate it, shard it, checkpoint it.

    `extra` holds non-parameter collections, or None; `ema` is one average of the parameters, or a dict of them, in
    float32 at least: see `ema.update`.
    """

    step: Array
    params: Any
    extra: Any
    ema: Any
    opt_state: Any


def init_state(
    params: Any, tx: optax.GradientTransformation, extra: Any = None, *, averages: Iterable[str] | None = None
) -> TrainState:
    """The state at step 0, the average equal to the parameters. Copies, because the step donates its state.

    With `averages`, names, `ema` is a dict of as many averages: for a step whose `decay` has a law for each name.
    Averages of half-precision parameters are float32. A network that needs its own dtypes is given the average cast to
    them; ours compute in their `dtype` whatever that of their parameters is.
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

    `loss(params, key, data, cond) -> (scalar, aux)`; with `state.extra` it is called with `extra=` too and returns the
    new collections as `aux["extra"]`. aux is a dict of numbers and of arrays with the batch in front. `key` is the same
    all run: the step folds in `state.step`, so that a resumed run draws what an undisturbed one does. `decay(step)`, or
    a number, is the weight that the average keeps of its past; a dict of them goes with a state of as many averages.
    `project` acts on the parameters after the update, before the average. aux gains `loss` and `grad_norm` (of the
    mean gradient, before any clipping), a number each. Gradients are added up, and their norm taken, in float32 at
    least; the optimiser is given them in the dtypes of the parameters. With `skip_nonfinite`, a step whose loss or
    gradient is not finite changes nothing but `state.step`, and aux gains `skipped`, 1 there and else 0.

    `accumulate` splits the batch into that many slices, one after the other; `axis_name` is that of a pmap or shard_map
    around the step, each device holding its part of the batch. Gradients, numbers in aux and, over devices, floating
    collections are averaged; arrays in aux are joined again, per device; collections pass from slice to slice. In both
    cases the loss is given a `BatchKey(key, start, size)`, which tells it the rows of the global batch that it sees:
    losses that draw by position (`losses.denoising`, `arrays.normal`) then agree with the whole batch at once.
    Raises ValueError if the batch does not divide, or data and cond are not of one length.
    """
    laws = decay if isinstance(decay, Mapping) else {None: decay}
    laws = {name: law if callable(law) else constant(law) for name, law in laws.items()}
    if accumulate < 1:
        raise ValueError(f"accumulate is a number of slices, at least 1; got {accumulate}")

    def varying(tree):
        def leaf(a):
            try:
                return lax.pcast(a, axis_name, to="varying")
            except ValueError:  # it is already
                return a

        return jax.tree.map(leaf, tree) if axis_name else tree

    def value_and_grad(state, key, data, cond):
        def scalar(params):
            if state.extra is None:
                return loss(params, key, data, cond)
            return loss(params, key, data, cond, extra=state.extra)

        # per device: shard_map would otherwise sum the gradients of replicated parameters over the devices
        (value, aux), grads = jax.value_and_grad(scalar, has_aux=True)(varying(state.params))
        grads = wide(grads)
        if state.extra is not None and "extra" not in aux:
            raise ValueError('the state has extra collections: the loss must return the new ones as aux["extra"]')
        return grads, dict(aux, loss=value)

    def accumulated(state, key, data, cond):
        if axis_name is None and accumulate == 1:
            return value_and_grad(state, key, data, cond)
        lengths = {jnp.shape(leaf)[:1] for leaf in jax.tree.leaves((data, cond))}
        if len(lengths) != 1 or () in lengths:
            raise ValueError(f"data and cond must share one leading axis, the batch; found {sorted(lengths)}")
        ((rows,),) = lengths
        if rows % accumulate:
            raise ValueError(f"a batch of {rows} does not divide into {accumulate} slices")
        devices = lax.axis_size(axis_name) if axis_name else 1
        first = lax.axis_index(axis_name) * rows if axis_name else 0
        size = rows // accumulate

        def slice_step(state, j):
            part = jax.tree.map(lambda a: lax.dynamic_slice_in_dim(a, j * size, size), (data, cond))
            grads, aux = value_and_grad(state, BatchKey(key, first + j * size, rows * devices), *part)
            return state.replace(extra=aux.pop("extra", state.extra)), (grads, aux)

        if accumulate == 1:
            state, (grads, aux) = slice_step(state, 0)
            return grads, dict(aux, extra=state.extra)

        def body(carry, j):
            state, total = carry
            state, (grads, aux) = slice_step(state, j)
            return (state, jax.tree.map(jnp.add, total, grads)), aux

        zeros = varying(jax.tree.map(jnp.zeros_like, wide(state.params)))
        state = state.replace(extra=varying(state.extra))
        (state, total), aux = lax.scan(body, (state, zeros), jnp.arange(accumulate))
        # one entry per slice: rows join up again, numbers are averaged
        aux = jax.tree.map(lambda a: a.mean() if a.ndim == 1 else a.reshape(-1, *a.shape[2:]), aux)
        return jax.tree.map(lambda g: g / accumulate, total), dict(aux, extra=state.extra)

    def mean_if_floating(a):
        return lax.pmean(a, axis_name) if jnp.issubdtype(a.dtype, jnp.floating) else a

    def averaged(ema, params, step):
        if not isinstance(decay, Mapping):
            return update(ema, params, laws[None](step))
        if not isinstance(ema, dict) or ema.keys() != laws.keys():
            raise ValueError(f"decay has laws for {', '.join(laws)}: make the state with init_state(averages=...)")
        return {name: update(ema[name], params, law(step)) for name, law in laws.items()}

    def train_step(state: TrainState, key, data, cond=None) -> tuple[TrainState, dict]:
        grads, aux = accumulated(state, fold(key, state.step), data, cond)
        extra = aux.pop("extra", state.extra)
        if axis_name:
            grads = lax.pmean(grads, axis_name)
            aux = jax.tree.map(lambda a: lax.pmean(a, axis_name) if a.ndim == 0 else a, aux)
            extra = jax.tree.map(mean_if_floating, extra)
        norm = optax.tree.norm(grads)
        grads = jax.tree.map(lambda g, p: g.astype(jnp.result_type(p)), grads, state.params)
        updates, opt_state = tx.update(grads, state.opt_state, state.params)
        params = optax.apply_updates(state.params, updates)
        if project is not None:
            params = project(params)
        ema = averaged(state.ema, params, state.step)
        aux["grad_norm"] = norm
        new = TrainState(state.step + 1, params, extra, ema, opt_state)
        if skip_nonfinite:
            good = jnp.isfinite(aux["loss"]) & jnp.isfinite(aux["grad_norm"])
            kept = jax.tree.map(lambda a, b: jnp.where(good, a, b), new, state)
            new, aux["skipped"] = kept.replace(step=new.step), jnp.where(good, 0.0, 1.0)
        return new, aux

    return train_step


def make_train_loop(train_step: Callable, take: Callable | None = None, record: Callable | None = None) -> Callable:
    """Many steps in one program: `loop(state, key, arrays, index, count) -> (state, metrics)`; donate the state.

    index: (K, ...); `take(arrays, index[j]) -> (data, cond)` makes the batch of step j, on the device. By default
    arrays is a pair (data, cond), cond None if there is none, of which index picks: rows, (K, B), of a whole data set
    with leading axis N; or, (K,), one of K batches. The first `count` steps are run, count traced: whole visits and
    remainders are the same program, so a run cut anywhere ends in the same bits. metrics: what `record(aux)` returns,
    a dict of arrays of fixed shapes, of each step, (K, ...) in float32, nan past `count`; by default the numbers in
    aux, among them `loss` and `grad_norm`: look there for a loss that is not finite.
    """
    take = take or (lambda arrays, rows: jax.tree.map(lambda a: a[rows], arrays))
    record = record or (lambda aux: {name: a for name, a in aux.items() if getattr(a, "shape", None) == ()})

    def loop(state, key, arrays, index, count):
        def body(j, carry):
            state, metrics = carry
            state, aux = train_step(state, key, *take(arrays, index[j]))
            seen = record(aux)
            return state, {name: values.at[j].set(seen[name].astype(jnp.float32)) for name, values in metrics.items()}

        seen = jax.eval_shape(lambda: record(train_step(state, key, *take(arrays, index[0]))[1]))
        metrics = {name: jnp.full((len(index), *a.shape), jnp.nan, jnp.float32) for name, a in seen.items()}
        return lax.fori_loop(0, jnp.minimum(count, len(index)), body, (state, metrics))

    return loop
