"""`sample`: transformations, keys, step counts, evaluations, errors."""

import functools

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import MORE_SCHEDULES, SCHEDULES, Diagonal, jitted_sample, mixture, one_of

import jdiff
from jdiff import solvers

SOLVERS = {
    "ddpm": solvers.DDPM(),
    "ddim": solvers.DDIM(0.5),
    "euler": solvers.Euler(),
    "heun": solvers.Heun(),
    "unipc": solvers.UniPC(3),
    "dpmpp_2m_sde": solvers.DPMpp2MSDE(0.5),
}


def compiled_once():
    """`sample`, jitted, that raises AssertionError when it is traced a second time."""
    return jax.jit(chex.assert_max_traces(jdiff.sample, n=1), static_argnames=("path", "checkpoint"))


def setup(schedule, batch=4, n=9):
    x = jdiff.prior(schedule, jax.random.key(0), (batch, 2))
    return Diagonal(schedule), x, jdiff.grid.log_snr(schedule, n)


@jax.jit
def every_solver(x, times, keys, key):
    """The samples of each solver with a key for each sample, and with one for all: one program a batch size."""
    schedule = jdiff.VP()

    def run(solver, key):
        return jdiff.sample(solver, Diagonal(schedule), schedule, x, times, key, checkpoint=False)

    return {name: (run(solver, keys), run(solver, key)) for name, solver in SOLVERS.items()}


def test_sample_i_depends_on_its_key_alone():
    """Sample i is the same in a batch of 1, 7 and 64, whatever the solver."""
    _, x, times = setup(jdiff.VP(), 64)
    keys, key = jax.random.split(jax.random.key(1), 64), jax.random.key(5)
    whole = every_solver(x, times, keys, key)
    for batch in (1, 7):
        part = every_solver(x[:batch], times, keys[:batch], key)
        chex.assert_trees_all_close(part, jax.tree.map(lambda a, batch=batch: a[:batch], whole), atol=1e-5)


def test_different_samples_get_different_noise():
    schedule = jdiff.VP()
    denoise, _, times = setup(schedule)
    x = jnp.ones((3, 2))
    out = jdiff.sample(solvers.DDPM(), denoise, schedule, x, times, jax.random.key(0))
    assert np.abs(out[0] - out[1]).max() > 1e-2
    assert np.abs(out[1] - out[2]).max() > 1e-2


@pytest.mark.parametrize(
    "solver", [pytest.param(s, marks=() if s in ("ddim", "heun") else pytest.mark.slow) for s in SOLVERS]
)
def test_traced_n_equals_the_short_grid(solver):
    """n of a padded grid gives what the grid of n gives, path and all, in one program."""
    schedule, solver = jdiff.EDM(), SOLVERS[solver]
    denoise, x, _ = setup(schedule)
    run = compiled_once()
    for n in (1, 5, 12):
        padded = jdiff.grid.karras(schedule, n, size=12)
        # the padding repeats the last time, which an eager check of the grid would refuse
        x0, path = run(solver, denoise, schedule, x, padded, jax.random.key(2), n=n, path=True)
        short = padded[:n]
        expected = jitted_sample()(solver, denoise, schedule, x, short, jax.random.key(2), path=True)
        chex.assert_trees_all_close((x0, path[: n - 1]), expected, rtol=1e-4, atol=1e-4)


def test_one_compile_for_all_numbers():
    """New eta, w, schedule numbers, parameters, times and n: one program. The denoiser is an argument."""

    def apply(params, x, label, cond):
        return params * x + label[:, None]

    run = compiled_once()
    x = jnp.ones((2, 2))
    for i in range(20):
        schedule = jdiff.VP(0.1 + 0.01 * i, 10 + i)
        target, conditioning = jdiff.targets.EDM(0.5 + 0.01 * i), jdiff.conditioning.LogSNR(0.5 + 0.02 * i)
        networks = [
            jdiff.denoiser(apply, jnp.float32(p + i), schedule, target, conditioning=conditioning) for p in (0, 1)
        ]
        denoise = jdiff.guidance.cfg(*networks, i % 5)  # integers and floats alike
        n = 2 + i % 7
        times = jdiff.grid.karras(schedule, n, rho=3.0 + i, size=8)
        run(solvers.DDIM(i / 20 if i else 0), denoise, schedule, x, times, jax.random.key(i), n=n)


@pytest.mark.parametrize(
    "make",
    [
        lambda i: solvers.EDMStochastic(churn=2 * i, s_min=0.01 * i, s_max=10 + i, s_noise=1 + 0.001 * i),
        lambda i: solvers.DPMpp3MSDE(i / 20),
        lambda i: solvers.SASolver(tau=i / 20),
        lambda i: solvers.PredictorCorrector(solvers.EulerMaruyama(i / 20), solvers.Langevin(0.01 * i)),
        lambda i: solvers.UniPC(3, start="single_step"),
    ],
    ids=["churn", "sde", "sa", "pc", "unipc"],
)
def test_one_compile_for_all_solver_numbers(make):
    """20 settings of a solver, rho, the sigma range, schedule numbers, guidance and step counts: one program."""
    run = compiled_once()
    x = jnp.ones((2, 2))
    for i in range(20):
        schedule = jdiff.EDM(0.002 + 0.001 * i, 80 - i, 7 - 0.1 * i)
        denoise = jdiff.guidance.cfg(Diagonal(schedule, 0.3), Diagonal(schedule, 0.0), 1 + i / 5)
        n = 2 + i % 18
        times = jdiff.grid.karras(schedule, n, 3.0 + i, 0.005 + 0.001 * i, 40 + i, size=20)
        out = run(make(i), denoise, schedule, x, times, jax.random.key(i), n=n)
        chex.assert_tree_all_finite(out)


def test_vmap_over_churn_and_tau():
    """A sweep of settings is one vmap, and equals its members."""
    schedule = jdiff.EDM()
    denoise, x, times = setup(schedule)
    for many in (solvers.EDMStochastic(jnp.array([0.0, 5.0, 40.0])), solvers.SASolver(tau=jnp.array([0.0, 0.4, 1.0]))):
        run = jax.jit(lambda s: jdiff.sample(s, denoise, schedule, x, times, jax.random.key(1)))
        swept = jax.vmap(run, in_axes=(jax.tree.map(lambda leaf: 0 if jnp.ndim(leaf) else None, many),))(many)
        for i in range(3):
            one = run(jax.tree.map(lambda leaf, i=i: leaf[i] if jnp.ndim(leaf) else leaf, many))
            np.testing.assert_allclose(swept[i], one, rtol=1e-4, atol=1e-4)


def test_vmap_over_eta_and_schedule_and_solver():
    schedule = jdiff.VP()
    denoise, x, times = setup(schedule)
    etas = jnp.array([0.0, 0.3, 1.0])
    many = jax.vmap(lambda eta: jdiff.sample(solvers.DDIM(eta), denoise, schedule, x, times, jax.random.key(1)))(etas)
    for eta, got in zip(etas, many, strict=True):
        one = jitted_sample()(solvers.DDIM(float(eta)), denoise, schedule, x, times, jax.random.key(1))
        np.testing.assert_allclose(got, one, atol=1e-5)
    whole = jax.vmap(lambda s: jdiff.sample(s, denoise, schedule, x, times, jax.random.key(1)))(solvers.DDIM(etas))
    np.testing.assert_allclose(whole, many, atol=1e-6)
    highs = jnp.array([10.0, 20.0])
    by_schedule = jax.vmap(
        lambda b: jdiff.sample(solvers.Heun(), Diagonal(jdiff.VP(0.1, b)), jdiff.VP(0.1, b), x, times)
    )(highs)
    one = jitted_sample()(solvers.Heun(), Diagonal(jdiff.VP(0.1, 10.0)), jdiff.VP(0.1, 10.0), x, times)
    np.testing.assert_allclose(by_schedule[0], one, atol=1e-5)


MORE_SOLVERS = {
    "ddim0": solvers.DDIM(0.0),
    "ddim1": solvers.DDIM(1.0),
    "rk4": solvers.RK4(),
    "dpm_solver_3": solvers.DPMSolver(3),
    "dpmpp_sde": solvers.DPMppSDE(0.0),
    "lms": solvers.LMS(),
    "deis": solvers.DEIS(),
    "pndm": solvers.PNDM("trapezoid"),
    "euler_maruyama": solvers.EulerMaruyama(),
    "dpm2_ancestral": solvers.DPM2Ancestral(0.0),
    "edm_stochastic": solvers.EDMStochastic(0.0),
    "predictor_corrector": solvers.PredictorCorrector(solvers.DDPM(), solvers.Langevin(0.0)),
    "restart": solvers.Restart(),
}


@jax.jit
@functools.partial(jax.grad, argnums=(0, 1, 2, 3))
def gradients(x, times, solver, schedule):
    # checkpoints change nothing (see the test against finite differences) but take twice as long to compile
    return jdiff.sample(solver, Diagonal(schedule), schedule, x, times, jax.random.key(0), checkpoint=False).sum()


@pytest.mark.parametrize(
    "solver,schedule",
    [
        pytest.param(solver, schedule, marks=() if solver == "ddim" else pytest.mark.slow)
        for solver in [*SOLVERS, *MORE_SOLVERS]
        for schedule in MORE_SCHEDULES
    ],
)
def test_gradients_are_finite(solver, schedule):
    """With respect to x, times, solver and schedule, from t = 1 (where alpha may be 0), at eta of 0, 1/2 and 1."""
    solver, schedule = (SOLVERS | MORE_SOLVERS)[solver], one_of(schedule, MORE_SCHEDULES)
    _, x, times = jax.jit(setup)(schedule)
    grads = gradients(x, times, solver, schedule)
    chex.assert_tree_all_finite(grads)
    if not solver.stochastic:  # ancestral sampling from alpha = 0 forgets where it started
        assert jnp.abs(grads[0]).max() > 0


@pytest.mark.slow
def test_gradient_against_finite_differences():
    with jax.enable_x64(True):
        schedule = jdiff.VP()
        denoise, times = mixture().denoise(schedule), jdiff.grid.log_snr(schedule, 8)
        x = jdiff.prior(schedule, jax.random.key(0), (1, 2), dtype=jnp.float64)

        @functools.partial(jax.jit, static_argnums=1)
        def f(x, checkpoint=True):
            return jdiff.sample(solvers.Heun(), denoise, schedule, x, times, checkpoint=checkpoint)[0, 0]

        gradient, h = jax.grad(f)(x), 1e-6
        numeric = [(f(x.at[0, i].add(h)) - f(x.at[0, i].add(-h))) / (2 * h) for i in range(2)]
        np.testing.assert_allclose(gradient[0], jnp.array(numeric), rtol=1e-6)
        np.testing.assert_allclose(gradient, jax.grad(lambda x: f(x, False))(x), rtol=1e-12)
        np.testing.assert_allclose(jax.jacfwd(f)(x), gradient, rtol=1e-12)


@jax.jit
def checkpointed_and_plain(x, times):
    schedule = jdiff.VP()
    return [
        jdiff.sample(
            solvers.DDPM(), Diagonal(schedule), schedule, x, times, jax.random.key(0), path=True, checkpoint=checkpoint
        )
        for checkpoint in (True, False)
    ]


@pytest.mark.parametrize("n", [1, 2, 3, 4, 9, 10, 24, 26])
def test_checkpointing_changes_nothing(n):
    """Chunks, remainders and paths of every length equal the plain scan."""
    _, x, _ = setup(jdiff.VP())
    checkpointed, plain = checkpointed_and_plain(x, jnp.asarray(np.linspace(1, 0.001, n, dtype=np.float32)))
    chex.assert_shape(plain[1], (n - 1, 4, 2))
    chex.assert_trees_all_close(checkpointed, plain, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("solver,calls", [("ddim", 7), ("euler", 7), ("heun", 13)])
def test_network_evaluations(solver, calls):
    """n calls for a one-evaluation solver, 2n - 1 for Heun, counted at run time."""
    schedule, count = jdiff.EDM(), []

    def apply(params, x, label, cond):
        jax.debug.callback(lambda: count.append(1))
        return x

    denoise = jdiff.denoiser(apply, (), schedule, jdiff.targets.EDM())
    x = jnp.ones((2, 2))
    times = jdiff.grid.karras(schedule, 7)
    jax.block_until_ready(jdiff.sample(SOLVERS[solver], denoise, schedule, x, times, jax.random.key(0)))
    jax.effects_barrier()
    assert len(count) == calls


def test_a_plain_function_is_a_denoiser():
    schedule = jdiff.Flow()
    denoise, x, times = setup(schedule)
    a = jdiff.sample(solvers.Heun(), denoise, schedule, x, times)
    b = jdiff.sample(solvers.Heun(), lambda x, t: denoise(x, t), schedule, x, times)
    np.testing.assert_allclose(a, b, atol=1e-6)


class Time:
    """Shows the network x and t themselves."""

    def __call__(self, schedule, x, t):
        return x, jnp.broadcast_to(t, x.shape[:1])


jax.tree_util.register_static(Time)
TARGETS = (
    jdiff.targets.X0(), jdiff.targets.Eps(), jdiff.targets.Score(), jdiff.targets.V(), jdiff.targets.Velocity(),
    jdiff.targets.EDM(0.7),
)  # fmt: skip


@jax.jit
def by_target(solver, schedule):
    """(the path of the true function itself, its paths as a network of each target)."""
    oracle = Diagonal(schedule)
    times = jdiff.grid.log_snr(schedule, 10, t_max=0.9)
    x = jdiff.prior(schedule, jax.random.key(0), (3, 2), 0.9, dtype=jnp.float64)

    def run(denoise):
        return jdiff.sample(solver, denoise, schedule, x, times, path=True, checkpoint=False)

    def network(target):
        def apply(params, x, t, cond):
            x0, eps, _ = oracle.predict(x, t)
            return jdiff.targets.aim(schedule, target, x0, eps, t)

        return jdiff.denoiser(apply, (), schedule, target, conditioning=Time())

    return run(oracle), [run(network(target)) for target in TARGETS]


@pytest.mark.parametrize(
    "solver", [solvers.Heun(), pytest.param(solvers.DPMpp2M(), marks=pytest.mark.slow)], ids=["heun", "2m"]
)
@pytest.mark.parametrize("schedule", SCHEDULES)
def test_targets_give_the_same_trajectory(schedule, solver):
    """One true function wrapped as an x0-, eps-, score-, v-, velocity- or edm-network samples alike."""
    with jax.enable_x64(True):
        expected, others = by_target(solver, one_of(schedule))
        for target, got in zip(TARGETS, others, strict=True):
            chex.assert_trees_all_close(got, expected, rtol=1e-7, atol=1e-8, custom_message=str(target))


def test_sharded_and_pmapped_equal_one_device():
    from jdiff import parallel

    schedule = jdiff.VP()
    denoise, x, times = setup(schedule, 16)
    keys = jax.random.split(jax.random.key(3), 16)
    expected = jdiff.sample(solvers.DDPM(), denoise, schedule, x, times, keys)
    mesh = parallel.mesh()
    sharded = jitted_sample()(
        solvers.DDPM(), denoise, schedule, *parallel.shard_batch(mesh, (x,)), times, parallel.shard_batch(mesh, keys)
    )
    assert len(sharded.sharding.device_set) == 8
    np.testing.assert_allclose(sharded, expected, atol=1e-5)
    mapped = jax.pmap(lambda x, keys: jdiff.sample(solvers.DDPM(), denoise, schedule, x, times, keys))(
        x.reshape(8, 2, 2), keys.reshape(8, 2)
    )
    np.testing.assert_allclose(mapped.reshape(16, 2), expected, atol=1e-5)


def test_errors():
    schedule = jdiff.VE()
    denoise, x, times = setup(schedule)
    go = lambda **k: jdiff.sample(*(k.get(n, d) for n, d in dict(  # noqa: E731
        solver=solvers.DDIM(0.5), denoise=denoise, schedule=schedule, x=x, times=times, key=None).items()))  # fmt: skip
    with pytest.raises(ValueError, match="DDIM draws noise: give a key"):
        go()
    with pytest.raises(ValueError, match="must descend"):
        go(times=times[::-1], solver=solvers.Euler())
    for schedule_, outside in (
        (jdiff.VP(), [1.5, 0.5]),
        (jdiff.Flow(), [1.0, -0.1]),
        (jdiff.discrete(jdiff.betas.linear(10)), [1.0, 0.05]),
    ):
        with pytest.raises(ValueError, match="outside .* where .* is defined"):
            jdiff.sample(solvers.Euler(), Diagonal(schedule_), schedule_, x, jnp.array(outside))
    with pytest.raises(ValueError, match="sigma = 0"):
        jdiff.sample(solvers.Euler(), mixture().denoise(jdiff.Flow()), jdiff.Flow(), x, jnp.array([1.0, 0.5, 0.0]))
    with pytest.raises(ValueError, match="keys for a batch"):
        go(key=jax.random.split(jax.random.key(0), 3))
    with pytest.raises(ValueError, match="expected floating noise"):
        go(x=jnp.ones((2, 2), int), solver=solvers.Euler())
    with pytest.raises(ValueError, match="n = 10"):
        jdiff.sample(solvers.Euler(), denoise, schedule, x, times, n=10)
    wrong = jdiff.denoiser(lambda p, x, label, cond: x[:, :1], (), schedule, jdiff.targets.X0())
    with pytest.raises(ValueError, match="the network returned"):
        go(denoise=wrong, solver=solvers.Euler())


def test_noise_without_a_key_is_never_left_out():
    """Where eta is traced nobody can look at it: a nonzero one without a key gives nan, a zero one works."""
    schedule = jdiff.VP()
    denoise, x, times = setup(schedule)
    run = jax.jit(lambda eta: jdiff.sample(solvers.DDIM(eta), denoise, schedule, x, times))
    np.testing.assert_allclose(run(0.0), jdiff.sample(solvers.Euler(), denoise, schedule, x, times), atol=1e-6)
    assert jnp.isnan(run(0.5)).all()
