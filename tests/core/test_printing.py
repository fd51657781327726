"""How nouns print: as the call that makes them, in one line, whatever is in them."""

import copy
import pickle

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import solvers
from jdiff.core.pytrees import in_short


def network(params, x, label, cond):
    return x


AS_WRITTEN = [
    (jdiff.VP(), "VP()"),
    (jdiff.VP(beta_min=0.2), "VP(beta_min=0.2)"),
    (jdiff.Shifted(jdiff.Flow(), 2), "Shifted(schedule=Flow(), shift=2.0)"),
    (solvers.DDIM(), "DDIM()"),
    (solvers.DDIM(0.5), "DDIM(eta=0.5)"),
    (solvers.DDPM("large"), "DDPM(variance='large')"),
    (solvers.DPMpp2M(), "DPMpp2M()"),
    (solvers.DPMpp2M("single_step"), "DPMpp2M(start='single_step')"),
    (solvers.DPMpp2MSDE(0.5), "DPMpp2MSDE(eta=0.5)"),
    (solvers.DPM2(), "DPM2()"),
    (solvers.UniPC(3), "UniPC(order=3)"),
    (solvers.EDMStochastic(3.0), "EDMStochastic(churn=3.0)"),
    (solvers.EulerAncestral(), "EulerAncestral()"),
    (solvers.Restart(solvers.DPMpp2M(), 0.1, 0.2), "Restart(base=DPMpp2M(), low=0.1, high=0.2)"),
    (jdiff.levels.Uniform(t_max=0.5), "Uniform(t_max=0.5)"),
    (jdiff.conditioning.Index(10, True), "Index(T=10.0, fractional=True)"),
]


@pytest.mark.parametrize("made,text", AS_WRITTEN, ids=[text for _, text in AS_WRITTEN])
def test_as_it_is_written(made, text):
    """The call, with names of arguments and without those at their defaults; a copy prints alike."""
    assert repr(made) == repr(pickle.loads(pickle.dumps(made))) == repr(copy.deepcopy(made)) == text


def test_what_was_changed_prints_what_it_is():
    assert repr(solvers.Heun().replace(order=3)) == "RungeKutta(order=3, rows=((1.0,), (0.5, 0.5)))"
    assert repr(solvers.DPMpp2MSDE(0.5).replace(eta=1.0)).startswith("Multistep(eta=1.0, two_nodes=midpoint")


def test_arrays_print_in_short():
    """No megabytes, no waiting, and no error for what has no numbers now: traced, deleted, keys."""
    params = {"w": jnp.ones((512, 512)), "b": [jnp.ones(512)]}
    denoise = jdiff.denoiser(network, params, jdiff.VP(), jdiff.targets.Eps(), jnp.arange(100))
    text = repr(jdiff.guidance.cfg(denoise, denoise, jnp.ones(2)))
    assert "params=<2 arrays, 262,656 numbers>" in text and "cond=int32[100]" in text and "w=[1.0, 1.0]" in text
    assert "apply=network" in text and len(text) < 500 and "\n" not in text
    assert repr(jdiff.discrete(np.full(1000, 0.1))) == "Discrete(log_nsr=float32[1000])"
    seen = []
    jax.jit(lambda solver: seen.append(repr(solver)))(solvers.DDIM(0.5))
    jax.jit(lambda d: seen.append(repr(d)))(denoise)
    assert seen[0] == "DDIM(eta=float32[])" and "beta_min=float32[]" in seen[1] and "2 arrays" in seen[1]
    assert in_short(jax.random.key(0)) == "key<fry>[]"
    assert in_short(jax.tree_util.Partial(network)) == "partial(network)"
    gone = jnp.ones(3)
    gone.delete()
    assert in_short(gone) == "float32[3]"
    assert in_short([np.ones(2), 3]) == "[[1.0, 1.0], 3]"
    assert "ShapeDtypeStruct" in repr(jax.eval_shape(lambda: solvers.DDIM(0.5)))
