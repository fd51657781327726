"""Every public verb in every way that JAX has to run it: eager, jit, vmap, grad, sharded over 8 devices, pmap.

All verbs are in one function, so that each way is one program. A verb without a row here fails the test of the house.
"""

import ast
import functools
import inspect
import types
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import Diagonal

import jdiff
from jdiff import ema, grid, losses, posterior, sde, solvers, targets

B = 8  # one row a device
OBSERVED = np.array([[1.0, 0.5]], np.float32)


class Given(NamedTuple):
    """What verbs are called with: rows (B, ...), and numbers that are settings."""

    x: Any
    y: Any
    t: Any
    s: Any
    keys: Any
    label: Any
    beta_max: Any
    w: Any

    @property
    def schedule(self):
        return jdiff.VP(0.1, self.beta_max)

    @property
    def denoise(self):
        return Diagonal(self.schedule)

    @property
    def times(self):
        return grid.log_snr(self.schedule, 4)

    @property
    def knots(self):
        return jdiff.discrete(jdiff.betas.linear(10))


def network(params, x, label, cond):
    return params * x + label[:, None]


def pair(params, x, label, cond):
    return params * x, 0.1 * label


def twice(params, x, label, cond):
    return jnp.concatenate([params * x, 0.1 * x], -1)


def log_prob(x, t=0.0):
    return -jnp.cos(x).sum(1)


def loss(g: Given, verb: Callable, apply: Callable, schedule=None):
    settings = dict(schedule=g.schedule if schedule is None else schedule, target=targets.V())
    levels = jdiff.levels.Independent(0.1, 0.9) if schedule is None else jdiff.levels.Knots(10)
    return verb(apply, g.w, g.keys, g.x, levels=levels, **settings)[1]["each"]


def aware(g: Given):
    law = jdiff.levels.LossAware(bins=2, history=1)

    def plain(params, key, data, cond, levels):
        return losses.denoising(network, params, key, data, schedule=g.schedule, target=targets.V(), levels=levels)

    return losses.loss_aware(plain, law, g.schedule)(g.w, g.keys, g.x, None, {"levels": law.init()})[1]["each"]


# verbs whose results have a row for each sample
ROWS: dict[str, Callable[[Given], Any]] = {
    "q_sample": lambda g: jdiff.q_sample(g.schedule, g.x, g.t, g.y),
    "q_posterior": lambda g: jdiff.q_posterior(g.schedule, g.x, g.y, g.t, g.s),
    "prior": lambda g: jdiff.prior(g.schedule, g.keys, g.x.shape, mean=g.w, std=g.w),
    "eps_from": lambda g: jdiff.eps_from(g.schedule, g.x, g.y, g.t),
    "log_snr": lambda g: jdiff.log_snr(g.schedule, g.t),
    "time_of": lambda g: jdiff.time_of(g.schedule, jdiff.log_snr(g.schedule, g.t)),
    "forward.moments_at": lambda g: (
        jdiff.forward.moments_at("mine", g.schedule, g.x.shape, 0.9, 0.1 * g.w, g.w, g.x.dtype)[1][None] + 0 * g.x
    ),
    "forward.rates": lambda g: jdiff.forward.rates(g.schedule, g.t, g.x),
    "forward.fresh_noise": lambda g: jdiff.forward.fresh_noise(g.schedule, g.t, g.s),
    "as_denoise": lambda g: jdiff.as_denoise(lambda x, t: g.w * x, g.schedule).predict(g.x, g.t)[:2],
    "denoiser": lambda g: jdiff.denoiser(network, g.w, g.schedule, targets.EDM()).predict(g.x, g.t)[:2],
    "sde.forward": lambda g: sde.forward(g.schedule, g.t),
    "sde.score": lambda g: sde.score(g.denoise, g.schedule, g.x, g.t),
    "sde.reverse": lambda g: sde.reverse(g.denoise, g.schedule)(g.x, g.t),
    "sde.probability_flow": lambda g: sde.probability_flow(g.denoise, g.schedule)(g.x, g.t),
    "sde.derivative": lambda g: sde.derivative(g.schedule.alpha, g.t),
    "targets.aim": lambda g: targets.aim(g.schedule, targets.Velocity(), g.x, g.y, g.t),
    "targets.solve": lambda g: targets.solve(g.schedule, targets.Velocity(), g.x, g.y, g.t),
    "targets.system": lambda g: tuple(targets.system(g.schedule, targets.EDM(g.w), g.t)),
    "targets.c_skip": lambda g: targets.c_skip(g.schedule, targets.EDM(g.w), g.t),
    "targets.c_out": lambda g: targets.c_out(g.schedule, targets.EDM(g.w), g.t),
    "conditioning.drop_labels": lambda g: jdiff.conditioning.drop_labels(g.keys, g.label, 0.5, 9),
    "losses.denoising": lambda g: loss(g, losses.denoising, network),
    "losses.uncertain": lambda g: loss(g, losses.uncertain, pair),
    "losses.hybrid": lambda g: loss(g, losses.hybrid, twice, g.knots),
    "losses.loss_aware": aware,
    "losses.vlb_terms": lambda g: losses.vlb_terms(lambda x, t: g.w * x, g.knots, g.x, g.y, jnp.round(10 * g.t) / 10),
    "losses.vlb_prior": lambda g: losses.vlb_prior(g.knots, g.w * g.x),
    "variational_bound": lambda g: jdiff.variational_bound(
        lambda x, t: g.w * x, g.knots, g.x, g.keys, samples=2, std=g.w
    )[0],
    "guidance.cfg": lambda g: jdiff.guidance.cfg(g.denoise, lambda x, t: 0.5 * x, g.w)(g.x, g.t),
    "guidance.autoguidance": lambda g: jdiff.guidance.autoguidance(g.denoise, lambda x, t: 0.5 * x, g.w)(g.x, g.t),
    "guidance.apg": lambda g: jdiff.guidance.apg(g.denoise, lambda x, t: 0.5 * x, g.w, limit=g.w)(g.x, g.t),
    "guidance.cached": lambda g: jdiff.guidance.cached(g.denoise, 2)(g.x, g.t),
    "guidance.cfg_pp": lambda g: jdiff.guidance.cfg_pp(g.denoise, lambda x, t: 0.5 * x, g.w).predict(g.x, g.t)[:2],
    "guidance.classifier": lambda g: jdiff.guidance.classifier(g.denoise, log_prob, g.w)(g.x, g.t),
    "guidance.classifier_x0": lambda g: jdiff.guidance.classifier_x0(g.denoise, log_prob, g.w)(g.x, g.t),
    "guidance.compose": lambda g: jdiff.guidance.compose(g.denoise, [(lambda x, t: 0.5 * x, g.w)])(g.x, g.t),
    "guidance.rescale": lambda g: jdiff.guidance.rescale(lambda x, t: 2 * x - 0.3, g.denoise, g.w)(g.x, g.t),
    "guidance.tcfg": lambda g: jdiff.guidance.tcfg(g.denoise, lambda x, t: 0.5 * x, 2 + g.w)(g.x, g.t),
    "guidance.zero_star": lambda g: jdiff.guidance.zero_star(g.denoise, lambda x, t: 0.5 * x, 2 + g.w)(g.x, g.t),
    "guidance.interval": lambda g: jdiff.guidance.interval(g.denoise, lambda x, t: g.w * x, 0.2, 3.0)(g.x, g.t),
    "guidance.threshold": lambda g: jdiff.guidance.threshold(g.denoise, g.schedule, g.w)(g.x, g.t),
    "posterior.mmps": lambda g: posterior.mmps(g.denoise, OBSERVED, g.y[:, :1], g.w, iterations=2).predict(g.x, g.t)[
        :2
    ],
    "posterior.pgdm": lambda g: posterior.pgdm(g.denoise, OBSERVED, g.y[:, :1], g.w, iterations=2)(g.x, g.t),
    "posterior.tmpd": lambda g: posterior.tmpd(g.denoise, OBSERVED, g.y[:, :1], g.w)(g.x, g.t),
    "posterior.dps": lambda g: posterior.dps(g.denoise, OBSERVED, g.y[:, :1], g.w)(g.x, g.t),
    "posterior.diffpir": lambda g: posterior.diffpir(g.denoise, OBSERVED, g.y[:, :1], g.w, iterations=2)(g.x, g.t),
    "posterior.ddnm": lambda g: posterior.ddnm(g.denoise, OBSERVED, g.y[:, :1], g.w, iterations=2)(g.x, g.t),
    "posterior.replace": lambda g: posterior.replace(g.denoise, np.array([1, 0]), g.w * g.y)(g.x, g.t),
    "posterior.twisted": lambda g: posterior.twisted(g.denoise, lambda x0: -g.w * (x0**4).sum(1))(g.x, g.t),
    "posterior.likelihood": lambda g: posterior.likelihood(OBSERVED, g.y[:, :1], g.w)(g.x),
    "posterior.repaint": lambda g: jdiff.sample(
        posterior.repaint(solvers.DDIM(), np.array([1, 0]), g.w * g.y, rounds=2),
        g.denoise,
        g.schedule,
        g.x,
        g.times[:2],
        g.keys,
    ),
    "posterior.adjoint": lambda g: posterior.adjoint(lambda x: g.w * x[:, :1], g.y[:, :1], g.x.shape),
    "dequantize": lambda g: jdiff.dequantize(g.keys, g.label),
    "bits_per_dim": lambda g: jdiff.bits_per_dim(g.w * g.x[:, 0], (2,)),
    "many_draws": lambda g: jdiff.many_draws(g.w * g.x.T),
    "sample": lambda g: jdiff.sample(solvers.DDIM(0.5), g.denoise, g.schedule, g.x, g.times, g.keys),
    "invert": lambda g: jdiff.invert(solvers.DDIM(), g.denoise, g.schedule, g.x, g.times),
    "sample_parallel": lambda g: jdiff.sample_parallel(
        solvers.DDIM(), g.denoise, g.schedule, g.x, g.times, tol=1e-6, window=2
    )[0],
}
# verbs whose results belong to no sample
WHOLE: dict[str, Callable[[Given], Any]] = {
    "guidance.interval_of_steps": lambda g: jdiff.guidance.interval_of_steps(g.schedule, g.times, 0.3, 0.8),
    "posterior.smc": lambda g: posterior.smc(
        g.denoise, g.schedule, jax.random.key(0), (4, 2), g.times, lambda x0: -g.w * (x0**2).sum(1), ess=0.0
    )[:3],
    "posterior.kld_count": lambda g: posterior.kld_count(10 * g.w, 0.1 * g.w),
    "grid.uniform": lambda g: grid.uniform(4, 0.01 * g.w),
    "grid.log_snr": lambda g: grid.log_snr(g.schedule, 4),
    "grid.karras": lambda g: grid.karras(g.schedule, 4, 7 * g.w),
    "grid.polyexponential": lambda g: grid.polyexponential(g.schedule, 4, g.w),
    "grid.beta": lambda g: grid.beta(g.schedule, 4, g.w, g.w),
    "grid.shift": lambda g: grid.shift(grid.uniform(4), g.w),
    "grid.of_sigmas": lambda g: grid.of_sigmas(g.schedule, [10.0, 1.0, 0.1], 4),
    "grid.discrete": lambda g: grid.discrete(10, 4),
    "grid.optimize": lambda g: grid.optimize(
        lambda times: g.w * times, g.schedule, grid.log_snr(g.schedule, 4), jnp.linspace(1, 0, 4), steps=2
    ),
    "ema.constant": lambda g: ema.constant(0.9)(g.w),
    "ema.half_life": lambda g: ema.half_life(100.0, 10)(g.w),
    "ema.warmup": lambda g: ema.warmup(0.9)(g.w),
    "ema.power": lambda g: ema.power(0.1)(g.w),
    "ema.update": lambda g: ema.update({"a": g.x[:1] * 0}, {"a": g.w + g.x[:1] * 0}, 0.9),
}
# loops without reverse mode
FORWARD_MODE_ONLY = ("sample_parallel", "sample_adaptive", "log_likelihood", "encode", "decode", "grid.optimize")
SHORT = dict(t_min=0.5, method="heun", adjoint="forward", max_steps=8, rtol=1e-2, atol=1e-2)
# diffrax has its own loops: a program of its own
ADAPTIVE: dict[str, Callable[[Given], Any]] = {
    "sample_adaptive": lambda g: jdiff.sample_adaptive(g.denoise, g.schedule, g.x, **SHORT)[0],
    "log_likelihood": lambda g: jdiff.log_likelihood(
        g.denoise, g.schedule, g.x, g.keys, probes=2, mean=0.1 * g.w, std=g.w, **SHORT
    )[0],
    "encode": lambda g: jdiff.encode(g.denoise, g.schedule, g.x, **SHORT)[0],
    "decode": lambda g: jdiff.decode(g.denoise, g.schedule, g.x, **SHORT)[0],
}
TABLES = {"most": ROWS | WHOLE, "adaptive": ADAPTIVE}
in_both_tables = pytest.mark.parametrize("table", ["most", pytest.param("adaptive", marks=pytest.mark.slow)])
# verbs that are tested in all these ways at length: the file
ELSEWHERE = {
    "train.init_state": "train/test_parallel.py",
    "train.make_train_step": "train/test_parallel.py",
    "train.make_train_loop": "train/test_step.py",
}
OPERATORS = tuple(f"posterior.{n}" for n in ("bicubic", "box", "gaussian_blur", "motion_kernel", "random_pixels"))
# made on the host, once: networks, tables, optimisers, placement, files
HOST = (
    "adapt.",
    "betas.",
    "export.",
    "optim.",
    "parallel.",
    "ema.power_gamma",
    "ema.sigma_rel_of",
    "ema.gamma_of",
    *OPERATORS,
)
NO_VERBS = (
    "create_model",
    "list_models",
    "register_model",
    "quantize",
    "concrete",
    "conditioning.times_of_rows",
    "discrete",
    "noun",
    "per_sample",
    "schedule",
    "static",
)  # of nouns


def public_verbs() -> set[str]:
    """The functions that users name: those of `jdiff`, and of the modules that it hands on."""
    found, names = {}, {}
    face = ast.walk(ast.parse(Path(jdiff.__file__).read_text()))
    handed_on = {alias.name for node in face if isinstance(node, ast.ImportFrom) for alias in node.names}
    parts = {name: vars(jdiff)[name] for name in handed_on - set(jdiff.LAZY) if inspect.ismodule(vars(jdiff)[name])}
    modules = [("", jdiff)] + [(f"{name}.", part) for name, part in sorted(parts.items())]
    for prefix, module in modules:
        if prefix in ("convert.", "models.", "core.", "process.", "sampling.", "denoisers.", "oracle.", "schedules."):
            continue
        for name, verb in vars(module).items():
            if isinstance(verb, types.FunctionType) and not name.startswith("_") and name.islower():
                own = verb.__module__ == module.__name__ or name in getattr(module, "__all__", ()) or module is jdiff
                own = own or (module is grid and name == "optimize")  # which has a file of its own
                if module is jdiff.train:  # its face also hands on files, optimisers and the parts of a step
                    own = name in ("init_state", "make_train_step", "make_train_loop")
                if own and verb.__module__.startswith("jdiff") and id(verb) not in found:
                    found[id(verb)] = verb
                    names[prefix + name] = verb
    return {name for name in names if not name.startswith(HOST) and name not in NO_VERBS}


def test_every_public_verb_has_its_row():
    assert all((Path(__file__).parents[1] / file).is_file() for file in ELSEWHERE.values())
    assert public_verbs() == {*ROWS, *WHOLE, *ADAPTIVE, *ELSEWHERE}


def rows_and_settings() -> Given:
    key_x, key_y, key = jax.random.split(jax.random.key(0), 3)
    x, y = jax.random.normal(key_x, (B, 2)), jax.random.normal(key_y, (B, 2))
    t = jnp.linspace(0.3, 0.9, B)
    keys = jax.random.split(key, B)
    return Given(0.5 * x, y, t, t - 0.1, keys, jnp.arange(B), jnp.float32(20), jnp.float32(0.8))


GIVEN = rows_and_settings()
OTHER = GIVEN._replace(beta_max=jnp.float32(15), w=jnp.float32(0.6))


def run(table: str, g: Given) -> dict:
    return {name: verb(g) for name, verb in TABLES[table].items()}


@functools.cache
def expected(table: str) -> list[dict]:
    """All verbs of a table, jitted, at two settings; the second call compiles nothing."""
    jitted = jax.jit(chex.assert_max_traces(lambda g: run(table, g), n=1))
    return [jitted(GIVEN), jitted(OTHER)]


close = functools.partial(chex.assert_trees_all_close, rtol=2e-4, atol=2e-5)


@in_both_tables
def test_jit_is_eager(table):
    close(run(table, GIVEN), expected(table)[0])
    chex.assert_tree_all_finite(expected(table))


@in_both_tables
def test_vmap_over_settings(table):
    both = jax.tree.map(lambda a, b: jnp.stack([a, b]), *[(g.beta_max, g.w) for g in (GIVEN, OTHER)])
    mapped = jax.jit(jax.vmap(lambda beta_max, w: run(table, GIVEN._replace(beta_max=beta_max, w=w))))(*both)
    for i in range(2):
        close(jax.tree.map(lambda a, i=i: a[i], mapped), expected(table)[i])


@in_both_tables
def test_gradients_are_finite_and_agree(table):
    """By rows and settings: reverse mode is the transpose of forward mode."""
    point, direction = (GIVEN.x, GIVEN.w, GIVEN.beta_max), (GIVEN.y, jnp.float32(1), jnp.float32(2))

    def numbers(x, w, beta_max, reverse):
        g = GIVEN._replace(x=x, w=w, beta_max=beta_max)
        verbs = {name: verb for name, verb in TABLES[table].items() if reverse == (name not in FORWARD_MODE_ONLY)}
        return {name: jax.tree.map(lambda a: a.astype(jnp.float32), verb(g)) for name, verb in verbs.items()}

    @jax.jit
    def derivatives(point, direction):
        _, by_jvp = jax.jvp(functools.partial(numbers, reverse=False), point, direction)
        out, linear = jax.linearize(functools.partial(numbers, reverse=True), *point)
        # cosines, so that no verb can hide behind another
        weights = jax.tree.map(lambda a: jnp.cos(jnp.arange(a.size, dtype=a.dtype)).reshape(a.shape), out)
        return by_jvp, linear(*direction), weights, jax.linear_transpose(linear, *point)(weights)

    by_jvp, forward, weights, backward = derivatives(point, direction)
    chex.assert_tree_all_finite((by_jvp, forward, backward))
    by_forward = sum(np.vdot(w, f) for w, f in zip(*map(jax.tree.leaves, (weights, forward)), strict=True))
    by_reverse = sum(np.vdot(a, b) for a, b in zip(backward, direction, strict=True))
    np.testing.assert_allclose(by_reverse, by_forward, rtol=1e-3)


@in_both_tables
def test_sharded_over_8_devices(table):
    mesh = jdiff.parallel.mesh()
    rows = jdiff.parallel.shard_batch(mesh, {k: v for k, v in GIVEN._asdict().items() if jnp.ndim(v)})
    out = jax.jit(functools.partial(run, table))(GIVEN._replace(**rows))
    close(out, expected(table)[0])
    for name in out.keys() & {"q_sample", "losses.denoising", "guidance.cfg", "sample_adaptive"}:
        for leaf in jax.tree.leaves(out[name]):
            assert len(leaf.sharding.device_set) == 8 and not leaf.sharding.is_fully_replicated, name


@in_both_tables
def test_pmap_over_8_devices(table):
    """A row a device: rows are those of the whole batch, what belongs to no sample is the same everywhere."""
    axes = Given(*[0 if jnp.ndim(a) else None for a in GIVEN])
    parts = Given(*[a.reshape(B, 1, *a.shape[1:]) if jnp.ndim(a) else a for a in GIVEN])
    out = jax.pmap(functools.partial(run, table), in_axes=(axes,))(parts)
    for name, result in out.items():
        if name in WHOLE:
            close(jax.tree.map(lambda a: a[3], result), expected(table)[0][name])
        else:
            close(jax.tree.map(lambda a: a.reshape(B, *a.shape[2:]), result), expected(table)[0][name])
