"""Against diffusers' schedulers: one grid, one network, whole trajectories to 1e-5."""

import importlib
import sys
import types

import jax
import numpy as np
import pytest
from beside import (
    START,
    WIDE,
    assert_same,
    by_index,
    diffusers,
    noises,
    ours,
    preconditioned,
    replay,
    table,
    theirs,
    torch,
    ve,
    vp,
    whole_step,
)  # fmt: skip

import jdiff
from jdiff import solvers

KEY = jax.random.key(3)


def ratios(scheduler, steps):
    """sigma/alpha at each timestep, from the table."""
    bar = scheduler.alphas_cumprod.numpy().astype(np.float64)[steps]
    return np.sqrt((1 - bar) / bar)


# ---------------------------------------------------------------- DDIM and DDPM


@pytest.mark.parametrize("eta", [0.0, 0.4, 1.0])
@pytest.mark.parametrize("spacing", ["leading", "trailing"])
def test_ddim(spacing, eta):
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing=spacing)
    scheduler.set_timesteps(10)
    draws = noises(KEY, 10)
    options = lambda i: {"eta": eta, "variance_noise": torch.tensor(draws[i])}  # noqa: E731
    expected = theirs(scheduler, by_index(scheduler), START, options=options)
    grid = ratios(scheduler, scheduler.timesteps.numpy())
    assert_same(ours(solvers.DDIM(eta), table(scheduler), grid, START, KEY), expected)


@pytest.mark.parametrize("variance", ["small", "large"])
def test_ddpm(variance, monkeypatch):
    scheduler = diffusers.DDPMScheduler(clip_sample=False, variance_type=f"fixed_{variance}")
    scheduler.set_timesteps(20)
    replay(monkeypatch, scheduler, noises(KEY, 20))
    expected = theirs(scheduler, by_index(scheduler), START)
    grid = ratios(scheduler, scheduler.timesteps.numpy())
    assert_same(ours(solvers.DDPM(variance), table(scheduler), grid, START, KEY), expected)


@pytest.mark.parametrize("how", [dict(clip_sample=True, clip_sample_range=0.5),
                                 dict(clip_sample=False, thresholding=True, dynamic_thresholding_ratio=0.7,
                                      sample_max_value=100.0)], ids=["clipped", "dynamic"])  # fmt: skip
def test_thresholding(how, monkeypatch):
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_small", **how)
    scheduler.set_timesteps(20)
    replay(monkeypatch, scheduler, [draw[..., None] for draw in noises(KEY, 20)])
    expected = theirs(scheduler, by_index(scheduler), START[..., None])[..., 0]  # theirs asks for (B, C, *sizes)
    grid = ratios(scheduler, scheduler.timesteps.numpy())
    limits = (0.5, None) if how["clip_sample"] else (1.0, 0.7)
    within = lambda denoise, schedule: jdiff.guidance.threshold(denoise, schedule, *limits)  # noqa: E731
    assert_same(ours(solvers.DDPM("small"), table(scheduler), grid, START, KEY, around=within), expected)
    assert not np.allclose(expected, ours(solvers.DDPM("small"), table(scheduler), grid, START, KEY), atol=1e-2)


# ---------------------------------------------------------------- exponential multistep methods


def over_sigmas(scheduler, solver, n, key=None, whole=True, options=lambda i: {}, every=1):
    """Compare on the scheduler's own grid of sigmas that ends at 0; else (not `whole`) at its smallest."""
    scheduler.set_timesteps(n)
    grid = scheduler.sigmas.numpy()
    expected = theirs(scheduler, vp(scheduler), START, options=options)
    if whole:
        assert grid[-1] == 0
        expected = np.concatenate([expected[every - 1 : -1 : every], expected[-1:]])
        assert_same(ours(solver, table(scheduler), grid[:-1:every], START, key), expected)
    else:
        assert_same(ours(solver, table(scheduler), grid, START, key)[:-1], expected)


GRIDS = {"table": {}, "karras": {"use_karras_sigmas": True}, "trailing": {"timestep_spacing": "trailing"}}
MULTISTEP = {
    "++1": ({"solver_order": 1}, solvers.Euler()),
    "++2m": ({}, solvers.DPMpp2M()),
    "++2m heun": ({"solver_type": "heun"}, solvers.ExponentialAB(2).replace(low_order_below=15)),
    "2m": ({"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min"}, solvers.DPMSolverM(2)),
    "2m heun": (
        {"algorithm_type": "dpmsolver", "final_sigmas_type": "sigma_min", "solver_type": "heun"},
        solvers.ExponentialAB(2, "eps"),
    ),
}


@pytest.mark.parametrize("grid,n", [("table", 10), ("table", 20), ("karras", 10), ("trailing", 10)])
@pytest.mark.parametrize("name", MULTISTEP)
def test_dpmsolver_multistep(name, grid, n):
    """From 15 times on the last steps keep their order, in both."""
    settings, solver = MULTISTEP[name]
    whole = settings.get("final_sigmas_type") != "sigma_min"
    if not whole:  # theirs lowers the last order before the end, ours before the last denoise
        if grid == "karras":
            pytest.skip("theirs visits the last sigma twice: see test_parity_errors.py")
        settings, solver = settings | {"lower_order_final": False}, solver.replace(low_order_below=0)
    scheduler = diffusers.DPMSolverMultistepScheduler(**settings, **GRIDS[grid])
    over_sigmas(scheduler, solver, n, whole=whole)


@pytest.mark.parametrize("name,solver", [("midpoint", solvers.DPMpp2MSDE()), ("heun", solvers.SASolver(2, 0))])
@pytest.mark.parametrize("n", [10, 20])
def test_dpmsolver_multistep_sde(n, name, solver):
    scheduler = diffusers.DPMSolverMultistepScheduler(algorithm_type="sde-dpmsolver++", solver_type=name)
    draws = noises(KEY, n)
    over_sigmas(scheduler, solver, n, KEY, options=lambda i: {"variance_noise": torch.tensor(draws[i])})


@pytest.mark.parametrize("sde", [False, True])
def test_dpmsolver_singlestep(sde, monkeypatch):
    """On a grid even in log-SNR, whose every second time is our middle.

    Their SDE draws the whole step's noise independently of the middle's; here it gets that of one path.
    """
    algorithm = "sde-dpmsolver++" if sde else "dpmsolver++"
    scheduler = diffusers.DPMSolverSinglestepScheduler(
        algorithm_type=algorithm, use_exponential_sigmas=True, lower_order_final=True
    )
    scheduler.set_timesteps(11)
    sigmas = scheduler.sigmas.double().numpy()
    draws = []
    for i, (first, second) in enumerate(zip(noises(KEY, 6, part=0)[:-1], noises(KEY, 6, part=1)[:-1], strict=True)):
        draws += [first, whole_step(*sigmas[2 * i : 2 * i + 3], first, second)]
    replay(monkeypatch, scheduler, [*draws, np.zeros_like(first)])
    over_sigmas(scheduler, solvers.DPMppSDE() if sde else solvers.DPMpp2S(), 11, KEY, every=2)


@pytest.mark.parametrize("order", [1, 2, 3])
def test_deis(order):
    scheduler = diffusers.DEISMultistepScheduler(solver_order=order, lower_order_final=False)
    over_sigmas(scheduler, solvers.DEIS(order, "log_rho").replace(low_order_below=0), 10, whole=False)


@pytest.mark.parametrize("prediction", ["x0", "eps"])
@pytest.mark.parametrize("variant", ["bh1", "bh2"])
@pytest.mark.parametrize("order", [1, 2, 3])
def test_unipc(order, variant, prediction):
    scheduler = diffusers.UniPCMultistepScheduler(
        solver_order=order, solver_type=variant, predict_x0=prediction == "x0", final_sigmas_type="sigma_min",
        lower_order_final=False,
    )  # fmt: skip
    over_sigmas(scheduler, solvers.UniPC(order, variant, prediction).replace(low_order_below=0), 20, whole=False)


@pytest.mark.parametrize("order", [2, 3])
def test_unipc_to_zero(order):
    over_sigmas(diffusers.UniPCMultistepScheduler(solver_order=order), solvers.UniPC(order), 10)


@pytest.mark.parametrize("tau", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("order,corrector", [(1, 1), (2, 1), (2, 2), (3, 2), (1, 2)])
def test_sa_solver(order, corrector, tau, monkeypatch):
    """Theirs counts the new prediction in the corrector's order."""
    scheduler = diffusers.SASolverScheduler(
        predictor_order=order, corrector_order=corrector + 1, tau_func=lambda t: torch.tensor(tau),
        lower_order_final=False,
    )  # fmt: skip
    replay(monkeypatch, scheduler, noises(KEY, 13))
    solver = solvers.SASolver(order, corrector, tau, "bh1").replace(low_order_below=0)
    over_sigmas(scheduler, solver, 12, KEY, whole=False)


# ---------------------------------------------------------------- methods on x / alpha


def over_ve(scheduler, solver, n, key=None, stages=1, levels=ve, whole=True, **how):
    """Compare on the scheduler's own grid; not `whole`: all but the last step, to sigma = 0, where ours denoises."""
    scheduler.set_timesteps(n)
    sigmas = np.unique(scheduler.sigmas.numpy())[::-1]
    assert sigmas[-1] == 0
    start = START * sigmas[0]
    expected = theirs(scheduler, levels(scheduler), start, **how)
    expected = np.concatenate([expected[:-1][stages - 1 :: stages], expected[-1:]])
    end = None if whole else -1
    assert_same(ours(solver, WIDE, sigmas[:-1], start, key)[:end], expected[:end])


def in_the_middle(sigma):
    """Levels of a scheduler whose every second call is at sigma(scheduler, i)."""

    def levels(scheduler):
        return lambda i, t: (1.0, float(scheduler.sigmas[i] if scheduler.state_in_first_order else sigma(scheduler, i)))

    return levels


KARRAS = [{}, {"use_karras_sigmas": True}]


@pytest.mark.parametrize("settings", KARRAS)
def test_euler(settings):
    over_ve(diffusers.EulerDiscreteScheduler(**settings), solvers.Euler(), 10)


@pytest.mark.parametrize("settings", KARRAS)
def test_heun(settings):
    over_ve(diffusers.HeunDiscreteScheduler(**settings), solvers.Heun(), 10, stages=2)


def test_euler_ancestral(monkeypatch):
    scheduler = diffusers.EulerAncestralDiscreteScheduler()
    replay(monkeypatch, scheduler, noises(KEY, 10))
    over_ve(scheduler, solvers.EulerAncestral(), 10, KEY)


@pytest.mark.parametrize("settings", KARRAS)
def test_kdpm2(settings):
    levels = in_the_middle(lambda scheduler, i: scheduler.sigmas_interpol[i])
    over_ve(diffusers.KDPM2DiscreteScheduler(**settings), solvers.DPM2(), 10, stages=2, levels=levels)


def test_kdpm2_ancestral(monkeypatch):
    scheduler = diffusers.KDPM2AncestralDiscreteScheduler()
    replay(monkeypatch, scheduler, noises(KEY, 10))
    levels = in_the_middle(lambda scheduler, i: scheduler.sigmas_interpol[i - 1])
    over_ve(scheduler, solvers.DPM2Ancestral(), 10, KEY, stages=2, levels=levels)


@pytest.mark.parametrize("order", [1, 2, 3, 4])
@pytest.mark.parametrize("settings", KARRAS)
def test_lms(settings, order):
    """But for the last step, which theirs makes with the full order down to sigma = 0."""
    options = lambda i: {"order": order}  # noqa: E731
    over_ve(diffusers.LMSDiscreteScheduler(**settings), solvers.LMS(order), 12, whole=False, options=options)


def with_brownian_noise(monkeypatch, module, name):
    """A scheduler whose noise comes from a Brownian tree of a further package, which replayed noise does not need."""
    monkeypatch.setitem(sys.modules, "torchsde", types.ModuleType("torchsde"))
    monkeypatch.delitem(sys.modules, f"diffusers.schedulers.{module}", raising=False)
    return getattr(importlib.import_module(f"diffusers.schedulers.{module}"), name)


def test_dpmsolver_sde(monkeypatch):
    """Given our noise: the step's is the middle's, carried on, and fresh noise from there.

    Their own draws are increments of one path over sigma, each scaled to the right variance: the middle's and the
    whole step's correlate by sqrt((t - m) / (t - s)), and not by (s / m) sqrt((t^2 - m^2) / (t^2 - s^2)).
    """
    n = 10
    scheduler = with_brownian_noise(monkeypatch, "scheduling_dpmsolver_sde", "DPMSolverSDEScheduler")()
    parts = [iter(noises(KEY, n, part=j)) for j in range(2)]
    state = {}

    def sampler(a, b):
        if scheduler.state_in_first_order:
            state["z"], state["middle"] = next(parts[0]), float(b)
            return torch.tensor(state["z"])
        return torch.tensor(whole_step(float(a), state["middle"], float(b), state["z"], next(parts[1])))

    scheduler.set_timesteps(n)  # forgets the sampler
    monkeypatch.setattr(
        type(scheduler), "noise_sampler", property(lambda self: sampler, lambda self, value: None), False
    )
    levels = in_the_middle(lambda scheduler, i: scheduler.mid_point_sigma)
    over_ve(scheduler, solvers.DPMppSDE(), n, KEY, stages=2, levels=levels)


# ---------------------------------------------------------------- EDM's preconditioning


@pytest.mark.parametrize("grid", ["karras", "exponential"])
def test_edm_euler(grid):
    scheduler = diffusers.EDMEulerScheduler(sigma_schedule=grid)
    over_ve(scheduler, solvers.Euler(), 12, output=preconditioned(0.5, 1))


@pytest.mark.parametrize("n", [10, 20])
@pytest.mark.parametrize("kind", ["midpoint", "heun", "sde"])
def test_edm_dpmsolver(kind, n, monkeypatch):
    settings = {"algorithm_type": "sde-dpmsolver++"} if kind == "sde" else {"solver_type": kind}
    ways = {
        "midpoint": solvers.DPMpp2M(),
        "heun": solvers.ExponentialAB(2).replace(low_order_below=15),
        "sde": solvers.DPMpp2MSDE(),
    }
    scheduler = diffusers.EDMDPMSolverMultistepScheduler(**settings)
    replay(monkeypatch, scheduler, noises(KEY, n))
    over_ve(scheduler, ways[kind], n, KEY, output=preconditioned(0.5, 1))


def test_cosine_dpmsolver(monkeypatch):
    module = "scheduling_cosine_dpmsolver_multistep"
    with_brownian_noise(monkeypatch, "scheduling_dpmsolver_sde", "DPMSolverSDEScheduler")
    scheduler = with_brownian_noise(monkeypatch, module, "CosineDPMSolverMultistepScheduler")()
    draws = iter(noises(KEY, 12))
    sampler = lambda a, b: torch.tensor(next(draws))  # noqa: E731
    monkeypatch.setattr(
        type(scheduler), "noise_sampler", property(lambda self: sampler, lambda self, value: None), False
    )
    over_ve(scheduler, solvers.DPMpp2MSDE(), 12, KEY, output=preconditioned(1.0, -1))


# ---------------------------------------------------------------- PNDM


@pytest.mark.parametrize("start", ["runge_kutta", "trapezoid"])
def test_pndm(start):
    """But for the last step, which theirs makes with the full order down to sigma = 0."""
    trapezoid = start == "trapezoid"
    scheduler = diffusers.PNDMScheduler(skip_prk_steps=trapezoid)
    scheduler.set_timesteps(20)
    expected = theirs(scheduler, by_index(scheduler), START)
    expected = expected[1:] if trapezoid else np.concatenate([expected[3:12:4], expected[12:]])
    grid = ratios(scheduler, np.asarray(scheduler._timesteps[::-1], int))
    assert_same(ours(solvers.PNDM(start), table(scheduler), grid, START)[:-1], expected[:-1])


def test_ipndm():
    sigmas = np.linspace(0.999, 0.02, 13).astype(np.float32)
    scheduler = diffusers.IPNDMScheduler(trained_betas=sigmas)
    scheduler.set_timesteps(12)

    def velocity(x0, eps, alpha, sigma):
        return alpha * eps - sigma * x0

    levels = lambda i, t: (float(scheduler.alphas[i]), float(scheduler.betas[i]))  # noqa: E731
    expected = theirs(scheduler, levels, START, velocity)
    wide = sigmas.astype(np.float64)
    grid = wide / np.sqrt(1 - wide**2)
    assert_same(ours(solvers.IPNDM(), jdiff.VP(), grid, START)[:-1], expected)


# ---------------------------------------------------------------- flow matching


def over_flow(scheduler, solver, n, key=None, stages=1):
    """The whole trajectories, theirs and ours."""
    scheduler.set_timesteps(n)
    sigmas = np.unique(scheduler.sigmas.numpy().astype(np.float64))[::-1]
    levels = lambda i, t: (1 - float(scheduler.sigmas[i]), float(scheduler.sigmas[i]))  # noqa: E731
    expected = theirs(scheduler, levels, START, lambda x0, eps, alpha, sigma: eps - x0)
    expected = np.concatenate([expected[:-1][stages - 1 :: stages], expected[-1:]])
    with np.errstate(divide="ignore"):
        grid = sigmas[:-1] / (1 - sigmas[:-1])
    return ours(solver, jdiff.Flow(), grid, START, key), expected


@pytest.mark.parametrize("shift", [1.0, 3.0])
def test_flow_match_euler(shift):
    assert_same(*over_flow(diffusers.FlowMatchEulerDiscreteScheduler(shift=shift), solvers.Euler(), 10))


def test_flow_match_stochastic(monkeypatch):
    """x_s = (1 - s) x_0 + s z is DDIM with all noise fresh."""
    scheduler = diffusers.FlowMatchEulerDiscreteScheduler(stochastic_sampling=True)
    replay(monkeypatch, scheduler, noises(KEY, 10))
    assert_same(*over_flow(scheduler, solvers.DDIM(1e6), 10, KEY))


def test_flow_match_heun():
    """The first step agrees; later ones are trapezoids in t there and in sigma/alpha here, O(h^2) apart."""
    apart = []
    for n in (20, 40, 80):
        a, b = over_flow(diffusers.FlowMatchHeunDiscreteScheduler(), solvers.Heun(), n, stages=2)
        assert_same(a[:1], b[:1])
        apart.append(abs(a[-1] - b[-1]).max())
    assert apart[0] < 0.02 and apart[1] < apart[0] / 3 and apart[2] < apart[1] / 3, apart
