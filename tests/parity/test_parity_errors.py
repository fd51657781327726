"""Where diffusers' schedulers (0.42.1) are wrong, against oracles, and what jdiff does there.

Each test says what is wrong in its docstring and fails when they repair it: then the agreement belongs to
test_parity.py.
"""

import importlib

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from beside import START, WIDE, C, Exact, diffusers, network, ours, table, theirs, torch, vp

import jdiff
from jdiff import solvers
from jdiff.core.pytrees import noun
from jdiff.process.forward import rates


@noun
class Gaussian(jdiff.Denoise):
    """The denoiser of N(0, C)."""

    schedule: jdiff.Schedule

    def predict(self, x, t):
        alpha, sigma = rates(self.schedule, t, x)
        x0 = alpha * C / (alpha**2 * C + sigma**2) * x
        return jdiff.Prediction(x0, jdiff.eps_from(self.schedule, x0, x, t))


def exact_end(schedule, x, first, last):
    """x at ratio `last` of the probability-flow ODE from `first`, in float64: RK4 in 2000 steps."""
    return ours(solvers.RK4(), schedule, np.geomspace(first, last, 2001), x, dtype=jnp.float64)[-2]


def size(error):
    return float(np.sqrt(np.mean(np.square(error))))


# ---------------------------------------------------------------- orders


def dpm_3m_from_exact_start(steps):
    """Their third-order update from the exact x and the exact predictions at the first three times."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, final_sigmas_type="sigma_min", lower_order_final=False
    )
    scheduler.set_timesteps(steps)
    sigmas = np.geomspace(20.0, 0.05, steps + 1)
    scheduler.sigmas = torch.tensor(sigmas, dtype=torch.float32)
    schedule = table(scheduler)
    with jax.enable_x64(True):
        xs = [START] + [exact_end(schedule, START, sigmas[0], s) for s in sigmas[1:3]]
        known = [Exact(schedule)(jnp.asarray(x), t) for x, t in zip(xs, times(schedule, sigmas[:3]), strict=True)]
    scheduler.model_outputs = [torch.tensor(np.asarray(x0), dtype=torch.float32) for x0 in [known[0], *known[:2]]]
    scheduler.lower_order_nums, scheduler._step_index = 2, 2
    x, level = torch.tensor(xs[2], dtype=torch.float32), vp(scheduler)
    for i in range(2, steps):
        alpha, sigma = level(i, None)
        eps = network(x, alpha, sigma, torch.tanh)[1]
        x = scheduler.step(eps, scheduler.timesteps[i], x, return_dict=False)[0]
    return x.numpy(), schedule, sigmas


def times(schedule, sigmas):
    return jdiff.time_of(schedule, -2 * np.log(sigmas))


def test_dpm_3m_has_half_of_its_second_difference():
    """DPM-Solver++ 3M weighs the second difference of x_0 by half of the exact integral: its order stays 2.

    From exact starting values, its errors at 16, 32 and 64 steps are 2.0e-3, 5.5e-4, 1.5e-4 (order 1.9); here, with a
    start of third order, 1.2e-3, 1.7e-4, 2.3e-5 (order 2.9).
    """
    errors = []
    for steps in (16, 32):
        end, schedule, sigmas = dpm_3m_from_exact_start(steps)
        truth = exact_end(schedule, START, sigmas[0], sigmas[-1])
        here = ours(solvers.DPMpp3M("single_step"), schedule, sigmas, START, dtype=jnp.float64)[-2]
        errors.append((size(end - truth), size(here - truth)))
    errors = np.array(errors)
    slopes = np.log2(errors[:-1] / errors[1:])
    assert (errors[:, 1] < errors[:, 0]).all(), errors
    assert slopes[-1, 0] < 2.2 and slopes[-1, 1] > 2.7, slopes


@pytest.mark.parametrize("algorithm", ["dpmsolver++", "dpmsolver", "sde-dpmsolver++"])
def test_third_order_updates_of_a_parabola(algorithm):
    """Third-order weights integrate (c - c_t)^2 exactly here; theirs give half of it, and the SDE's a wrong sign too.

    With h = 1/4 their SDE's update is -6.3 times the integral: -1/2 stands where +1/2 belongs. (Their EDM scheduler has
    the half too, and no third-order update for its SDE: it raises UnboundLocalError.)
    """
    sde, noise = algorithm.startswith("sde"), algorithm == "dpmsolver"
    scheduler = diffusers.DPMSolverMultistepScheduler(
        solver_order=3, algorithm_type=algorithm, final_sigmas_type="sigma_min"
    )
    h, k = 0.25, 2.0 if sde else 1.0
    c = np.array([-2, -1, 0, 1]) * h
    scheduler.set_timesteps(3)
    scheduler.sigmas, scheduler._step_index = torch.tensor(np.exp(-c)), 2
    known = [torch.tensor([[v**2]]) for v in c[:3]]
    zero = torch.zeros(1, 1, dtype=torch.float64)
    there = float(scheduler.multistep_dpm_solver_third_order_update(known, sample=zero, noise=zero))

    alpha = (1 + np.exp(-2 * c[-1])) ** -0.5
    sigma = alpha * np.exp(-c[-1])
    u, mass = np.polynomial.legendre.leggauss(20)
    u, mass = 0.5 * (u + 1) * h, 0.5 * mass * h
    if noise:
        exact = -sigma * (mass * np.exp(h - u) * u**2).sum()
    else:
        exact = alpha * (mass * k * np.exp(-k * (h - u)) * u**2).sum()
    low, high = (-6.4, -6.2) if sde else (0.499, 0.501)
    assert low < there / exact < high

    solver = solvers.DPMSolverM(3) if noise else solvers.DPMpp3MSDE(1.0) if sde else solvers.DPMpp3M()
    with jax.enable_x64(True):
        times = jdiff.time_of(jdiff.VP(), jnp.asarray(2 * c))
        pulls = solver.replace(low_order_below=0).plan(jdiff.VP(), times, len(times)).weights[-1]
        np.testing.assert_allclose(pulls @ jnp.asarray([c[1] ** 2, c[0] ** 2]), exact, rtol=1e-6)


def test_ddpm_fixed_large_log_is_nan():
    """Variance "fixed_large_log" takes the square root of a negative logarithm; jdiff's "large" takes none."""
    scheduler = diffusers.DDPMScheduler(variance_type="fixed_large_log")
    scheduler.set_timesteps(10)
    x = torch.tensor(START, dtype=torch.float32)
    assert torch.isnan(scheduler.step(x, 900, x, return_dict=False)[0]).all()


# ---------------------------------------------------------------- grids


def test_ddim_linspace_steps_over_the_wrong_times():
    """With spacing "linspace" DDIM visits 999, 888, ..., 0 but steps from each to 100 below it: x has the wrong noise.

    If all data are one point m, DDIM is exact on every grid: x_t = alpha_t m + sigma_t eps, with the eps of the start.
    Theirs shows the network 888 with the noise of 899, and so on: read as that eps, x is off by 0.18 (rms) at 111 and
    by 4.7 at 0.
    """
    scheduler = diffusers.DDIMScheduler(clip_sample=False, timestep_spacing="linspace")
    scheduler.set_timesteps(10)
    grid = scheduler.timesteps.numpy()
    assert set(np.diff(grid)) == {-111}
    schedule, m = table(scheduler), 0.7
    bar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    x = torch.tensor(START, dtype=torch.float32)
    off, eps = [], (START - bar[999] ** 0.5 * m) / (1 - bar[999]) ** 0.5
    for t, s in zip(grid[:-1], grid[1:], strict=True):
        a = float(bar[t])
        x = scheduler.step((x - a**0.5 * m) / (1 - a) ** 0.5, int(t), x, return_dict=False)[0]
        off.append(size((x.numpy() - bar[s] ** 0.5 * m) / (1 - bar[s]) ** 0.5 - eps))
    with jax.enable_x64(True):
        start, times = jnp.asarray(START), jnp.asarray((grid + 1) / 1000)
        xs = jdiff.sample(solvers.DDIM(), lambda x, t: jnp.full_like(x, m), schedule, start, times, path=True)[1]
    alpha, sigma = (np.sqrt(a)[grid[1:], None, None] for a in (bar, 1 - bar))
    here = abs((np.asarray(xs) - alpha * m) / sigma - eps)
    assert off[-2] > 0.15 and off[-1] > 4 and here.max() < 1e-6


def test_flow_match_shifts_its_ends_twice():
    """`shift` is applied to sigma_min and sigma_max on construction, and to the grid between them once more.

    With shift 3 the last sigma of ten is 0.0089; 3 s / (1 + 2 s) of 1/1000 is 0.0030, which jdiff's grid has.
    """
    once = 3 / 1000 / (1 + 2 / 1000)
    for kind in (diffusers.FlowMatchEulerDiscreteScheduler, diffusers.FlowMatchHeunDiscreteScheduler):
        scheduler = kind(shift=3.0)
        scheduler.set_timesteps(10)
        last = float(scheduler.sigmas[-2])
        np.testing.assert_allclose(last, 3 * once / (1 + 2 * once), rtol=1e-4)
        assert last > 2.9 * once
    np.testing.assert_allclose(jdiff.grid.shift(jdiff.grid.uniform(10, t_min=1 / 1000), 3.0)[-1], once, rtol=1e-4)


def test_a_grid_that_repeats_its_last_sigma_ends_in_nan():
    """A Karras grid with final_sigmas_type "sigma_min" visits sigma_min twice: the "heun" update is 0/0 there."""
    scheduler = diffusers.DPMSolverMultistepScheduler(
        algorithm_type="dpmsolver", solver_type="heun", final_sigmas_type="sigma_min", use_karras_sigmas=True
    )
    scheduler.set_timesteps(20)
    sigmas = scheduler.sigmas.numpy()
    np.testing.assert_allclose(sigmas[-1], sigmas[-2], rtol=1e-5)
    assert np.isnan(theirs(scheduler, vp(scheduler), START)[-1]).all()
    assert np.isfinite(ours(solvers.ExponentialAB(2, "eps"), table(scheduler), sigmas, START)).all()


def test_the_table_in_float32():
    """Tables are accumulated in float32: 1 - alpha_bar at the first knot, 1e-4, is off by up to 2e-4 of itself."""
    scheduler = diffusers.DDIMScheduler()
    exact = np.cumprod(1 - np.linspace(1e-4, 0.02, 1000))
    off = (1 - scheduler.alphas_cumprod.double().numpy()) / (1 - exact) - 1
    mine = jax.nn.sigmoid(jdiff.discrete(jdiff.betas.linear(1000)).log_nsr) / (1 - exact) - 1
    assert abs(off).max() > 1e-4 and abs(mine).max() < 1e-5


# ---------------------------------------------------------------- churn


@noun
class Units:
    """In place of a key: noise i is the i-th unit vector, so that a linear sampler's x is its own coefficients."""

    z: jax.Array

    def normal(self, shape, dtype):
        return self.z.astype(dtype)

    def fold(self, data):
        return self

    def part(self, t, s, j):
        return self


def variance_here(solver, sigmas):
    """Var[x] at the last sigma over its exact value, for N(0, C) data: the squares of all coefficients add up."""
    n = len(sigmas)
    with jax.enable_x64(True):
        times = jdiff.time_of(WIDE, -2 * np.log(np.asarray(sigmas, np.float64)))
        steps = solvers.Now(jnp.arange(n - 1), times[:-1], times[1:], solver.plan(WIDE, times, n))

        def body(x, now_z):
            now, z = now_z
            return solver.step(Gaussian(WIDE), WIDE, x, now, (), Units(z))[0], None

        z = jnp.eye(n)
        x, _ = jax.lax.scan(body, z[:1] * (sigmas[0] ** 2 + C) ** 0.5, (steps, z[1:, None]))
        return float((x**2).sum() / (sigmas[-1] ** 2 + C))


def variance_there(scheduler, output, churn, monkeypatch):
    """The same of a scheduler's."""
    n = len(scheduler.timesteps)
    units = iter(np.eye(n, dtype=np.float32)[1:, None])
    module = importlib.import_module(type(scheduler).__module__)
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(next(units)))
    sigmas = scheduler.sigmas.double().numpy()[:n]
    x = torch.zeros(1, n)
    x[0, 0] = (sigmas[0] ** 2 + C) ** 0.5
    for sigma, t in zip(sigmas[:-1], scheduler.timesteps, strict=False):
        scheduler.scale_model_input(x, t)
        predicted = output(C / (sigma**2 + C) * x, sigma / (sigma**2 + C) * x, 1.0, sigma)
        x = scheduler.step(predicted, t, x, s_churn=churn, return_dict=False)[0]
    return float((x.double() ** 2).sum() / (sigmas[-1] ** 2 + C))


def test_churn_asks_the_network_before_the_noise(monkeypatch):
    """With `s_churn` the Euler schedulers add the noise after the network has been asked, and at the sigma before.

    EDM's algorithm 2 evaluates at the raised sigma, with the noise in x: theirs takes none of the new noise off in its
    step. On N(0, 0.2) data with churn 20 the end's variance, exact by propagating the coefficient of every draw, is
    1.37 times the true one at 50 steps and 1.08 at 200: no longer on the side of algorithm 2 over Euler (0.75 at 50),
    whose error Heun removes (1.06). A first-order difference, but not the paper's method.
    """
    for n, wide in ((50, (1.3, 1.4)), (200, (1.06, 1.1))):
        scheduler = diffusers.EulerDiscreteScheduler(use_karras_sigmas=True)
        scheduler.set_timesteps(n)
        there = variance_there(scheduler, lambda x0, eps, alpha, sigma: eps, 20.0, monkeypatch)
        sigmas = scheduler.sigmas.double().numpy()[:-1]
        euler, heun = (variance_here(solvers.Churn(base, 20.0), sigmas) for base in (solvers.Euler(), solvers.Heun()))
        assert wide[0] < there < wide[1] and euler < 1 and abs(heun - 1) < 3 / n
