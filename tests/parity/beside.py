"""What the parity tests share: one network in two frameworks, and loops over published schedulers.

The network is exact: x_0 is +-1 with variance 0.2 around, in each of two dimensions, so that x_0 and eps are closed
forms in (x, alpha, sigma) without cancellation. Both frameworks run them in float32, and whole trajectories are
compared; jdiff's coefficients come from float64 times.
"""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff.core.keys import each, fold, normal
from jdiff.core.pytrees import noun
from jdiff.process.forward import rates

torch = pytest.importorskip("torch", reason="parity with diffusers: pip install jdiff[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install jdiff[parity]")

C = 0.2
WIDE = jdiff.VE(1e-4, 1e3)  # whatever sigmas a scheduler has, they are times of this
START = np.array([[1.3, -0.4], [0.2, 0.9], [-1.7, 0.6]])


def network(x, alpha, sigma, tanh):
    """(x_0, eps) given x."""
    v = alpha * alpha * C + sigma * sigma
    pull = tanh(alpha / v * x)
    return (alpha * C / v) * x + (sigma * sigma / v) * pull, sigma / v * (x - alpha * pull)


@noun
class Exact(jdiff.Denoise):
    """The network as a denoiser."""

    schedule: jdiff.Schedule

    def predict(self, x, t):
        return jdiff.Prediction(*network(x, *rates(self.schedule, t, x), jnp.tanh))


_sample = jax.jit(jdiff.sample, static_argnames=("path", "checkpoint"))


def ours(solver, schedule, sigmas, x, key=None, dtype=jnp.float32, around=lambda denoise, schedule: denoise):
    """States after each step over the ratios sigma/alpha, the last denoise being the last: (N, B, 2)."""
    with jax.enable_x64(True):
        times = times_of(schedule, sigmas)
        x = jnp.asarray(np.asarray(x), dtype)
        x0, xs = _sample(
            solver, around(Exact(schedule), schedule), schedule, x, times, key, path=True, checkpoint=False
        )
        return np.concatenate([np.asarray(xs), np.asarray(x0)[None]])


def times_of(schedule, sigmas):
    """Times with these ratios sigma/alpha; Flow's are 1/(1 + 1/ratio), exact at infinity."""
    ratios = np.asarray(sigmas, np.float64)
    if isinstance(schedule, jdiff.Flow):
        return jnp.asarray(1 / (1 + 1 / ratios))
    return jdiff.time_of(schedule, -2 * np.log(ratios))


def table(scheduler):
    """A scheduler's own table, which it has accumulated in float32, as a schedule."""
    bar = scheduler.alphas_cumprod.numpy().astype(np.float64)
    with jax.enable_x64(True):
        return jdiff.discrete(1 - bar / np.concatenate([[1.0], bar[:-1]]))


def vp(scheduler):
    """(alpha, sigma) at step i, for schedulers that keep sigma/alpha and step a variance-preserving x."""

    def level(i, t):
        ratio = float(scheduler.sigmas[i])
        alpha = (1 + ratio**2) ** -0.5
        return alpha, ratio * alpha

    return level


def ve(scheduler):
    """The same for schedulers that step x / alpha."""
    return lambda i, t: (1.0, float(scheduler.sigmas[i]))


def by_index(scheduler):
    """The same for schedulers that look alpha up by the timestep."""

    def level(i, t):
        bar = float(scheduler.alphas_cumprod[int(t)])
        return bar**0.5, (1 - bar) ** 0.5

    return level


def theirs(scheduler, levels, x, output=lambda x0, eps, alpha, sigma: eps, options=lambda i: {}):
    """States after each call of a scheduler, (calls, B, 2)."""
    x, states = torch.tensor(np.asarray(x), dtype=torch.float32), []
    for i, t in enumerate(scheduler.timesteps):
        alpha, sigma = levels(i, t)
        predicted = output(*network(x, alpha, sigma, torch.tanh), alpha, sigma)
        if hasattr(scheduler, "scale_model_input"):  # some insist on being asked
            scheduler.scale_model_input(x, t)
        x = scheduler.step(predicted, t, x, return_dict=False, **options(i))[0]
        states.append(x.numpy())
    return np.stack(states)


def preconditioned(sigma_data, sign):
    """What a network under EDM's preconditioning returns, given x_0 and eps."""

    def output(x0, eps, alpha, sigma):
        skip = sigma_data**2 / (sigma**2 + sigma_data**2)
        return (x0 - skip * (x0 + sigma * eps)) / (sign * sigma * sigma_data / (sigma**2 + sigma_data**2) ** 0.5)

    return output


def noises(key, steps, shape=START.shape, part=None):
    """The noise that `jdiff.sample` draws in each step, or in `part` of it, and zeros for the last."""
    with jax.enable_x64(True):
        keys = [fold(each(key, shape[0]), i) for i in range(steps - 1)]
        keys = keys if part is None else [fold(k, part) for k in keys]
        return [np.asarray(normal(k, shape, jnp.float32)) for k in keys] + [np.zeros(shape, np.float32)]


def replay(monkeypatch, scheduler, draws):
    """Make a scheduler draw these."""
    draws = iter(draws)
    module = __import__(type(scheduler).__module__, fromlist=["x"])
    monkeypatch.setattr(module, "randn_tensor", lambda *args, **kwargs: torch.tensor(np.array(next(draws))))


def whole_step(t, m, s, first, second):
    """The unit noise of a step from ratio t to s, of unit noise in (t, m) and in (m, s), as one path of the SDE has."""
    mixed = (s / m) * np.sqrt(1 - (m / t) ** 2) * first + np.sqrt(1 - (s / m) ** 2) * second
    return (mixed / np.sqrt(1 - (s / t) ** 2)).astype(np.float32)


def difference(a, b):
    """The largest difference over a whole trajectory, relative to its largest value at each step."""
    assert a.shape == b.shape, (a.shape, b.shape)
    return float((abs(a - b).max((1, 2)) / abs(b).max((1, 2))).max())


def assert_same(a, b, most=1e-5):
    assert difference(a, b) < most, difference(a, b)
