"""Norms beside torch.nn: outputs, running statistics, gradients, in float32 and float64."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.models.norms import BatchNorm, GroupNorm

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install jdiff[parity]")

C = 6
PAIRS = {
    "batch": (BatchNorm(), lambda: torch.nn.BatchNorm2d(C)),
    "group": (GroupNorm(groups=2, min_width=1), lambda: torch.nn.GroupNorm(2, C)),
}


@pytest.mark.parametrize("name", list(PAIRS))
@pytest.mark.parametrize("dtype,tolerance", [("float32", 1e-5), ("float64", 1e-12)])
def test_norm(name, dtype, tolerance):
    ours, theirs = PAIRS[name][0], PAIRS[name][1]().to(getattr(torch, dtype))
    draw = np.random.default_rng(0)
    with jax.enable_x64(dtype == "float64"):
        x, weights = draw.normal(1, 2, (2, 5, 4, 3, C)).astype(dtype), {}
        for key, value in theirs.named_parameters():
            weights["scale" if key == "weight" else "bias"] = draw.normal(1, 0.3, C).astype(dtype)
            value.data = torch.tensor(weights["scale" if key == "weight" else "bias"])
        state = {"params": weights}
        if name == "batch":
            state["batch_stats"] = {"mean": np.zeros(C, dtype), "var": np.ones(C, dtype)}
        for batch in x:  # two steps of training, then one of evaluation
            state = compare(ours, theirs, state, batch, tolerance, train=(True,) if name == "batch" else ())
        theirs.eval()
        compare(ours, theirs, state, x[0], tolerance)


def compare(ours, theirs, state, x, tolerance, train=()):
    """Output, gradient with respect to the input, running statistics; returns the new state."""

    def loss(x):
        y, new = ours.apply(state, x, *train, mutable=["batch_stats"])
        return jnp.sum(jnp.sin(y)), (y, new)

    (_, (y, new)), dx = jax.value_and_grad(loss, has_aux=True)(jnp.asarray(x))
    a = torch.tensor(np.moveaxis(x, -1, 1)).requires_grad_()
    b = theirs(a)
    torch.sin(b).sum().backward()
    assert y.dtype == x.dtype
    np.testing.assert_allclose(y, np.moveaxis(b.detach().numpy(), 1, -1), rtol=tolerance, atol=tolerance)
    np.testing.assert_allclose(dx, np.moveaxis(a.grad.numpy(), 1, -1), rtol=10 * tolerance, atol=10 * tolerance)
    if train:
        np.testing.assert_allclose(new["batch_stats"]["mean"], theirs.running_mean, rtol=tolerance, atol=tolerance)
        np.testing.assert_allclose(new["batch_stats"]["var"], theirs.running_var, rtol=tolerance, atol=tolerance)
    return state | new
