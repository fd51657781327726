"""Trajectories of jdiff's solvers beside k-diffusion's: `python parity/k_diffusion.py CHECKOUT`.

Both walk the same 16 Karras sigmas from 80 to 0.01 in float32, with the same network and the same noise; the largest
difference of any state is printed, relative to that state's largest entry. Exit status 1 if one that should agree does
not, to 1e-5. k-diffusion's 3M has half of the second-difference term, and is shown to differ.
"""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
from checkout import find

import jdiff
from jdiff import config as configs
from jdiff import solvers
from jdiff.core.keys import each, fold, normal
from jdiff.core.pytrees import noun

TOLERANCE = 1e-5
SCHEDULE = jdiff.EDM()
KEY = jax.random.key(1)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """Compare with a checkout of k-diffusion."""

    checkout: Path
    """The folder that holds k_diffusion/sampling.py."""


def network(sin, x, sigma):
    """A denoiser that both frameworks can run: nonlinear in x, near x for little noise."""
    return (x + 0.3 * sin(2 * x)) / (1 + sigma**2)


@noun
class Denoiser:
    """The network as jdiff calls it, on EDM's schedule."""

    schedule: object

    def __call__(self, x, t):
        return network(jnp.sin, x, self.schedule.sigma(jnp.asarray(t)).astype(x.dtype))


def pairs(sampling) -> dict:
    """{name: (jdiff's solver, k-diffusion's sampler, its options, whether it draws noise, whether it should agree)}."""
    s = sampling
    churn = dict(s_churn=8.0, s_tmin=0.05, s_tmax=50.0, s_noise=1.003)
    return {
        "euler": (solvers.Euler(), s.sample_euler, {}, False, True),
        "euler ancestral": (solvers.EulerAncestral(), s.sample_euler_ancestral, {}, True, True),
        "euler ancestral, eta 1/2": (solvers.DDIM(0.5), s.sample_euler_ancestral, dict(eta=0.5), True, True),
        "heun": (solvers.Heun(), s.sample_heun, {}, False, True),
        "euler, churn": (solvers.Churn(solvers.Euler(), 8.0, 0.05, 50.0, 1.003), s.sample_euler, churn, True, True),
        "heun, churn": (solvers.EDMStochastic(8.0), s.sample_heun, churn, True, True),
        "dpm_2": (solvers.DPM2(), s.sample_dpm_2, {}, False, True),
        "dpm_2 ancestral": (solvers.DPM2Ancestral(), s.sample_dpm_2_ancestral, {}, True, True),
        "lms 4": (solvers.LMS(), s.sample_lms, {}, False, True),
        "dpmpp_2s": (solvers.DPMpp2S(), s.sample_dpmpp_2s_ancestral, dict(eta=0.0), False, True),
        "dpmpp_2s ancestral": (solvers.DPMpp2SAncestral(), s.sample_dpmpp_2s_ancestral, {}, True, True),
        "dpmpp_2m": (solvers.DPMpp2M(), s.sample_dpmpp_2m, {}, False, True),
        "dpmpp_2m_sde": (solvers.DPMpp2MSDE(), s.sample_dpmpp_2m_sde, {}, True, True),
        "dpmpp_2m_sde, eta 1/2": (solvers.DPMpp2MSDE(0.5), s.sample_dpmpp_2m_sde, dict(eta=0.5), True, True),
        "dpmpp_2m_sde heun": (
            solvers.DPMpp2MSDE().replace(two_nodes=None), s.sample_dpmpp_2m_sde, dict(solver_type="heun"), True, True,
        ),
        "dpmpp_3m_sde": (solvers.DPMpp3MSDE().replace(low_order_below=0), s.sample_dpmpp_3m_sde, {}, True, False),
    }  # fmt: skip


def difference(solver, sampler, options, noisy, torch) -> float:
    """The largest relative difference of a state along both trajectories."""
    times = jdiff.grid.karras(SCHEDULE, 16, sigma_min=0.01)
    sigmas = np.asarray(SCHEDULE.sigma(times))
    x = np.asarray(jdiff.prior(SCHEDULE, jax.random.key(0), (8, 3)))
    ours = np.asarray(jdiff.sample(solver, Denoiser(SCHEDULE), SCHEDULE, jnp.asarray(x), times, KEY, path=True)[1])
    draws = [torch.tensor(np.array(normal(fold(each(KEY, 8), i), x.shape))) for i in range(len(times))]
    step, seen = [0], []

    def noise(*_):
        return draws[step[0]]

    def watch(now):
        step[0] = now["i"] + 1  # it is called in the middle of a step: count from the states seen
        seen.append(now["x"].numpy())

    torch.randn_like = lambda like, **_: draws[len(seen)]  # churn draws directly, before the step's callback
    extra = dict(noise_sampler=lambda *_: draws[len(seen) - 1]) if noisy and "s_churn" not in options else {}
    end = sampler(
        lambda x, sigma: network(torch.sin, x, sigma[:, None]), torch.tensor(x), torch.tensor(sigmas),
        callback=watch, disable=True, **options, **extra,
    )  # fmt: skip
    if "s_churn" in options:
        theirs = [end.numpy()]  # its callbacks see churned states
        ours = ours[-1:]
    else:
        theirs = [*seen[1:], end.numpy()]
    return max(float(np.abs(a - b).max() / np.abs(b).max()) for a, b in zip(ours, theirs, strict=True))


def main(argv: list[str]) -> int:
    a = configs.parse(Arguments, argv, prog="parity/k_diffusion.py")
    try:
        import torch
    except ImportError:
        configs.fail("this compares with PyTorch code: pip install torch==2.13.0")
    sampling = find("k_diffusion", "sampling", a.checkout)
    drawn, failed = torch.randn_like, 0
    for name, (solver, sampler, options, noisy, agrees) in pairs(sampling).items():
        found = difference(solver, sampler, options, noisy, torch)
        torch.randn_like = drawn
        wrong = (found < TOLERANCE) != agrees
        failed += wrong
        print(f"{name:28s} {found:.1e}" + (" UNEXPECTED" if wrong else "" if agrees else " (differs, as it must)"))
    return int(failed > 0)


if __name__ == "__main__":
    configs.run_script(main)
