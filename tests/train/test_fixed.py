"""Arrays that no gradient reaches, such as random frequencies: nothing decays, moves or averages them."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest
from jax.interpreters import partial_eval

from jdiff import ema, optim, train
from jdiff.models import MLP, DiT, EDM2UNet, StepMLP, UNet, ViT, normalize_weights
from jdiff.models.unet import InSigma
from jdiff.train import posthoc

TINY, IMAGE = dict(channels=4, multipliers=(1,), blocks=1, attention=(), num_classes=3), (2, 4, 4, 1)
PATCHES = dict(width=8, depth=1, heads=1, patch=4, num_classes=3)
NETWORKS = {
    "unet": (UNet(fourier=16.0, augment_dim=2, **TINY), IMAGE, {"noise/fourier/frequencies"}),
    "sigmas": (
        InSigma(UNet(fourier=16.0, class_at="waves", **TINY), levels=10), IMAGE,
        {"sigmas", "net/noise/fourier/frequencies"},
    ),
    "edm2": (
        EDM2UNet(head_channels=4, logvar_channels=8, **TINY), IMAGE,
        {f"{name}/{leaf}" for name in ("fourier", "logvar_fourier") for leaf in ("frequencies", "phases")},
    ),
    "dit": (DiT(**PATCHES), IMAGE, set()),
    "vit": (ViT(**PATCHES), IMAGE, set()),
    "mlp": (MLP(4, 1, 3), (2, 2), set()),
    "step mlp": (StepMLP(10, 4, 1, 3), (2, 2), set()),
}  # fmt: skip


def names(tree):
    """The names of the leaves of a tree of bools that are true."""
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    return {jax.tree_util.keystr(path, simple=True, separator="/") for path, leaf in leaves if leaf}


@pytest.mark.parametrize("name", NETWORKS)
def test_what_no_gradient_reaches_is_what_is_called_fixed(name):
    """By the program of the derivative, with what it does not use taken out: nothing is run."""
    model, shape, fixed = NETWORKS[name]
    x, label, cond = jnp.ones(shape), jnp.array([1.0, 3.0]), jnp.array([0, 2])
    options = dict(return_logvar=True) if name == "edm2" else dict(augment=jnp.ones((2, 2))) if name == "unet" else {}
    variables = jax.eval_shape(lambda: model.init(jax.random.key(0), x, label, cond))

    def derivative(params, tangents):
        apply = lambda params: model.apply({"params": params}, x, label, cond, **options)  # noqa: E731
        return jax.jvp(apply, (params,), (tangents,))[1]

    params = variables["params"]
    program = jax.make_jaxpr(derivative)(params, params).jaxpr
    _, used = partial_eval.dce_jaxpr(program, [True] * len(program.outvars))
    reached = jax.tree.unflatten(jax.tree.structure(params), used[len(used) // 2 :])
    assert names(jax.tree.map(lambda a: not a, reached)) == fixed
    assert names(optim.fixed(params)) == fixed


DECAYS = {
    "adafactor": dict(weight_decay_rate=0.1), "muon": dict(weight_decay=0.1, adam_weight_decay=0.1),
    "sgd momentum": dict(weight_decay=0.1, momentum=0.9, nesterov=True), "sgd": dict(weight_decay=0.1),
    "adamw": dict(weight_decay=0.1), "adamaxw": dict(weight_decay=0.1), "nadamw": dict(weight_decay=0.1),
    "lion": dict(weight_decay=0.1),
}  # fmt: skip
MASKS = {"all": "all", "own": lambda params: jax.tree.map(lambda a: True, params)}


@pytest.mark.parametrize("name", [*optim.OPTIMIZERS, "sgd momentum"])
def test_no_optimiser_touches_them(name):
    """Bitwise after two steps, with clipping and decay on, of vectors at the places that they have in our networks."""
    paths = {path for _, _, fixed in NETWORKS.values() for path in fixed}
    still = {path: {path.split("/")[-1]: np.float32([0.3, -7.0, 1e-4, 40.0])} for path in sorted(paths)}
    learned = {"kernel": np.eye(4, dtype=np.float32), "bias": np.ones(4, np.float32)}
    grads = jax.tree.map(np.zeros_like, still) | {"out": learned}

    @jax.jit
    def two_steps(params):
        after = {}
        for mask, decayed in MASKS.items():
            settings = dict(clip=1.0, weight_decay_mask=decayed) | DECAYS.get(name, {})
            tx = optim.optimizer(name.split()[0], 0.1, **settings)
            after[mask], state = params, tx.init(params)
            for _ in range(2):
                updates, state = tx.update(grads, state, after[mask])
                after[mask] = optax.apply_updates(after[mask], updates)
        return after

    for after in two_steps(still | {"out": learned}).values():
        moved = after.pop("out")
        chex.assert_trees_all_equal(after, still, strict=True)
        assert all(np.abs(moved[leaf] - learned[leaf]).max() > 1e-4 for leaf in learned)


def test_a_vector_of_such_a_name_still_learns():
    """Someone's own network may train its frequencies: only their decay is left out."""
    params = {"frequencies": jnp.ones(3), "other": {"bias": jnp.ones(3)}}
    tx = optim.optimizer("adamw", 0.1, weight_decay=0.0, weight_decay_mask="all")
    updates, _ = tx.update(params, tx.init(params), params)
    chex.assert_trees_all_equal(updates["frequencies"], updates["other"]["bias"])
    assert (updates["frequencies"] < 0).all()


def test_their_averages_are_themselves():
    """Bitwise: of each law after 100 steps, and of snapshots whose weights are large and of both signs."""
    w = {"frequencies": jnp.asarray(np.random.default_rng(0).normal(0, 16, 500), jnp.float32)}
    assert normalize_weights(w) == w
    laws = (ema.constant(0.999), ema.half_life(300, 8), ema.warmup(), ema.power(0.1))
    state = train.init_state(w, optax.sgd(0.1), averages=map(str, range(len(laws))))

    def body(averages, step):
        return {name: ema.update(averages[name], w, law(step)) for name, law in zip(averages, laws, strict=True)}, None

    averages, _ = jax.jit(lambda a: jax.lax.scan(body, a, jnp.arange(100)))(state.ema)
    for average in averages.values():
        chex.assert_trees_all_equal(average, w, strict=True)
    weights = 300 * np.random.default_rng(1).normal(size=8)
    weights[-1] = 1 - weights[:-1].sum()
    chex.assert_trees_all_equal(posthoc.combine([w] * 8, weights), jax.tree.map(np.asarray, w), strict=True)
