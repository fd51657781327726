"""Against diffusers' guiders: whole trajectories of Euler's method on a flow, the guider in the loop, to 1e-5."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import grid, guidance, solvers, targets

torch = pytest.importorskip("torch")
guiders = pytest.importorskip("diffusers.guiders")

FLOW, STEPS = jdiff.Flow(), 10
TIMES = grid.uniform(STEPS, 0.02, 0.98)
X = np.random.default_rng(0).normal(size=(3, 4, 4, 2)).astype(np.float32)
LOW, HIGH = guidance.interval_of_steps(FLOW, TIMES, 0.2, 0.7)


def velocity(np_or_torch, x, t, which):
    """A network of velocities, the same in both libraries; `which` is 0 for the unconditional branch."""
    return np_or_torch.sin((1.0 + 0.7 * which) * x + 2.0 * t) + 0.4 * which * x - 0.3


def branch(which):
    """Ours is E[x_0 | x_t] = x_t - t v."""
    return jdiff.as_denoise(lambda x, t: x - t * velocity(jnp, x, t, which), FLOW)


C, U, WORSE = branch(1), branch(0), branch(-1)
V = targets.Velocity()


def theirs(guider, skips=False):
    """The states after each step, and the last x_0."""
    x, path = torch.tensor(X), []
    times = [float(t) for t in TIMES]
    for i, t in enumerate(times):
        guider.set_state(step=i, num_inference_steps=STEPS, timestep=torch.tensor(t))
        guider.prepare_inputs({"x": (x, x)})
        third = (velocity(torch, x, t, -1),) if skips else ()
        v = guider.forward(velocity(torch, x, t, 1), velocity(torch, x, t, 0), *third).pred
        if i == STEPS - 1:
            return (x - t * v).numpy(), np.stack(path)
        x = x + (times[i + 1] - t) * v
        path.append(x.numpy())


APG = dict(adaptive_projected_guidance_momentum=None, adaptive_projected_guidance_rescale=0.0)
CASES = {
    "cfg": (guiders.ClassifierFreeGuidance(3.5), guidance.cfg(C, U, 3.5)),
    "cfg of the paper's scale": (
        guiders.ClassifierFreeGuidance(2.5, use_original_formulation=True),
        guidance.cfg(C, U, 3.5),
    ),
    "interval": (
        guiders.ClassifierFreeGuidance(3.5, start=0.2, stop=0.7),
        guidance.interval(guidance.cfg(C, U, 3.5), C, LOW, HIGH),
    ),
    "rescale": (
        guiders.ClassifierFreeGuidance(3.5, guidance_rescale=0.7),
        guidance.rescale(guidance.cfg(C, U, 3.5), C, 0.7, V),
    ),
    "rescaled interval": (
        guiders.ClassifierFreeGuidance(3.5, guidance_rescale=0.7, start=0.2, stop=0.7),
        guidance.interval(guidance.rescale(guidance.cfg(C, U, 3.5), C, 0.7, V), C, LOW, HIGH),
    ),
    "autoguidance": (
        guiders.AutoGuidance(2.2, auto_guidance_layers=[0], dropout=1.0),
        guidance.autoguidance(C, U, 2.2),
    ),
    "zero star": (
        guiders.ClassifierFreeZeroStarGuidance(3.5, zero_init_steps=0),
        guidance.zero_star(C, U, 3.5),
    ),
    "zero star, first steps": (
        guiders.ClassifierFreeZeroStarGuidance(3.5, zero_init_steps=2),
        guidance.zero_star(C, U, 3.5, zero_above=guidance.interval_of_steps(FLOW, TIMES, 0.2)[1]),
    ),
    "apg": (
        guiders.AdaptiveProjectedGuidance(2.5, eta=0.3, use_original_formulation=True, **APG),
        guidance.apg(C, U, 3.5, parallel=0.3, target=V),
    ),
    "apg, limit": (
        guiders.AdaptiveProjectedGuidance(
            2.5, eta=0.0, use_original_formulation=True, **APG | dict(adaptive_projected_guidance_rescale=2.0)
        ),
        guidance.apg(C, U, 3.5, limit=2.0, target=V),
    ),
    "apg, momentum": (
        guiders.AdaptiveProjectedGuidance(
            2.5, eta=0.0, use_original_formulation=True, guidance_rescale=0.5,
            adaptive_projected_guidance_momentum=-0.6, adaptive_projected_guidance_rescale=2.0,
        ),
        guidance.rescale(guidance.apg(C, U, 3.5, momentum=-0.6, limit=2.0, target=V), C, 0.5, V),
    ),
    "tcfg": (
        guiders.TangentialClassifierFreeGuidance(3.5),
        guidance.tcfg(C, U, 3.5, target=V),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", CASES)
def test_guider(name):
    guider, denoise = CASES[name]
    ours = jax.jit(lambda: jdiff.sample(solvers.Euler(), denoise, FLOW, X, TIMES, path=True))()
    for got, expected in zip(ours, theirs(guider), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


PERTURBED = {
    "attention": guiders.PerturbedAttentionGuidance(
        3.5, perturbed_guidance_scale=1.8, perturbed_guidance_layers=[0],
        perturbed_guidance_start=0.2, perturbed_guidance_stop=0.7,
    ),
    "layers": guiders.SkipLayerGuidance(
        3.5, skip_layer_guidance_scale=1.8, skip_layer_guidance_layers=[0],
        skip_layer_guidance_start=0.2, skip_layer_guidance_stop=0.7,
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", PERTURBED)
def test_perturbed_attention_and_skipped_layers(name):
    """Their sum of two guidances is two terms: away from the unconditional network, and from the perturbed one.

    The step at `start` itself has none in diffusers: `skip_start_step < self._step`.
    """
    guided = guidance.cfg(C, U, 3.5)
    both = guidance.compose(C, [(U, 1 - 3.5), (WORSE, -1.8)])
    denoise = guidance.interval(both, guided, *guidance.interval_of_steps(FLOW, TIMES, 0.3, 0.7))
    ours = jax.jit(lambda: jdiff.sample(solvers.Euler(), denoise, FLOW, X, TIMES, path=True))()
    for got, expected in zip(ours, theirs(PERTURBED[name], skips=True), strict=True):
        np.testing.assert_allclose(got, expected, rtol=0, atol=1e-5 * np.abs(expected).max())


def test_where_apg_differs_from_its_paper():
    """By default diffusers adds w times the projected difference to the unconditional prediction: not equation 9."""
    guider = guiders.AdaptiveProjectedGuidance(3.5, eta=0.0, **APG)
    x, t = torch.tensor(X), 0.5
    guider.set_state(step=1, num_inference_steps=STEPS, timestep=torch.tensor(t))
    c, u = velocity(torch, x, t, 1), velocity(torch, x, t, 0)
    update = np.asarray(guidance.apg(C, U, 2.0, target=V)(X, t) - C(X, t)) / -t
    np.testing.assert_allclose(guider.forward(c, u).pred.numpy(), u.numpy() + 3.5 * update, rtol=1e-4, atol=1e-5)
