"""Methods given y are those of azula, on one network in float64."""

import jax
import numpy as np
import pytest
from helpers import Bent

import jdiff
from jdiff import posterior

pytest.importorskip("azula", reason="pip install --no-deps azula==0.11.1")
import torch  # noqa: E402
from azula import denoise, noise  # noqa: E402
from azula.guidance import diffpir, dps, mmps, pgdm, tmpd  # noqa: E402
from azula.linalg import covariance  # noqa: E402

T, S, STD, D, M = 0.4, 0.3, 0.2, 4, 3
RNG = np.random.default_rng(0)
X, A, Y = RNG.normal(size=(1, D)), RNG.uniform(0.1, 1, size=(M, D)), RNG.normal(size=M)
MATRIX, OBSERVED = torch.tensor(A), torch.tensor(Y)[None]


class Line(noise.Schedule):
    """alpha = 1 - t, sigma = t."""

    def alpha(self, t):
        return 1 - t

    def sigma(self, t):
        return t

    def forward(self, t):
        return 1 - t, t

    __call__ = forward


class Network(denoise.Denoiser):
    """The network of `Bent`."""

    schedule = Line()

    def forward(self, x, t):
        alpha, sigma = self.schedule(t)
        return denoise.DiracPosterior(torch.tanh(alpha * x / (alpha**2 * 0.3 + sigma**2)))


def project(x):
    return x @ MATRIX.T


def theirs(method):
    return method(torch.tensor(X), torch.tensor(T, dtype=torch.float64)).mean.numpy()


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


@pytest.mark.parametrize("iterations", [1, 2, M])
def test_mmps(iterations):
    noise_cov = covariance.IsotropicCovariance(torch.tensor(STD**2, dtype=torch.float64))
    other = mmps.MMPSDenoiser(Network(), OBSERVED, project, noise_cov, solver="cg", iterations=iterations)
    made = posterior.mmps(Bent(jdiff.Flow()), A, Y, STD, iterations=iterations)(X, T)
    np.testing.assert_allclose(made, theirs(other), rtol=1e-8)


def test_tmpd():
    other = tmpd.TMPDenoiser(Network(), OBSERVED, project, STD**2)
    np.testing.assert_allclose(posterior.tmpd(Bent(jdiff.Flow()), A, Y, STD)(X, T), theirs(other), rtol=1e-8)


def test_diffpir():
    """There in the space of x, here in that of y: the same once both are solved."""
    other = diffpir.DiffPIRDenoiser(Network(), OBSERVED, project, STD**2, lmbda=7.0, solver="cg", iterations=D)
    made = posterior.diffpir(Bent(jdiff.Flow()), A, Y, STD, lam=7.0, iterations=M)(X, T)
    np.testing.assert_allclose(made, theirs(other), rtol=1e-6)


def step(sampler, monkeypatch):
    """x_s of a sampler, without its noise."""
    monkeypatch.setattr(torch, "randn_like", torch.zeros_like)
    t, s = (torch.tensor(u, dtype=torch.float64) for u in (T, S))
    return sampler.step(torch.tensor(X), t, s).detach().numpy()


def test_dps(monkeypatch):
    """The published step subtracts zeta grad |y - A x_0| from x_s; the scale that this is, in a step of DDPM."""
    zeta, schedule = 0.3, jdiff.Flow()
    other = step(dps.DPSSampler(Network(), OBSERVED, project, zeta=zeta, steps=2), monkeypatch)
    fresh = -np.expm1(jdiff.log_snr(schedule, T) - jdiff.log_snr(schedule, S))
    scale = zeta * (1 - T) / (T**2 * (1 - S) * fresh)
    x0, eps, _ = posterior.dps(Bent(schedule), A, Y, float(scale)).predict(X, T)
    np.testing.assert_allclose((1 - S) * x0 + S * np.sqrt(1 - fresh) * eps, other, rtol=1e-7)


def test_pgdm(monkeypatch):
    """There x_s moves by alpha_s alpha_t J^T A^+ (y - A x_0); here x_0 by sigma^2 / (alpha r^2) times the same."""
    inverse = torch.tensor(np.linalg.pinv(A))
    other = pgdm.PGDMSampler(Network(), OBSERVED, project, lambda y: y @ inverse.T, steps=2)
    base = Bent(jdiff.Flow())
    x0, eps, _ = base.predict(X, T)
    there = (step(other, monkeypatch) - ((1 - S) * x0 + S * eps)) / ((1 - S) * (1 - T))
    made = posterior.pgdm(base, A, Y, 0.0, iterations=M)(X, T) - x0
    r2 = T**2 / (T**2 + (1 - T) ** 2)
    np.testing.assert_allclose(made * (1 - T) * r2 / T**2, there, rtol=1e-5)
