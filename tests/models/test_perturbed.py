"""Networks made worse on purpose, for perturbed-attention and skip-layer guidance: of the same parameters."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import guidance, solvers
from jdiff.models.attention import SelfAttention
from jdiff.models.dit import DiT
from jdiff.models.transformer import Attention
from jdiff.models.unet import UNet

KEY = jax.random.key(0)
X = np.asarray(jax.random.normal(KEY, (2, 8, 8, 4)))
LABEL, SCHEDULE = jnp.array([0.3, -0.2]), jdiff.Flow()
DIT = DiT(width=16, depth=2, heads=2, patch=4)
UNET = UNet(channels=8, multipliers=(1, 2), blocks=2, attention=(1,), heads=2, groups=4)


def variables(model, *args):
    """Random ones, none of them 0."""
    shapes = jax.eval_shape(lambda: model.init(KEY, *args))
    leaves, tree = jax.tree.flatten(shapes)
    keys = jax.random.split(KEY, len(leaves))
    return jax.tree.unflatten(tree, [0.3 * jax.random.normal(k, a.shape) for k, a in zip(keys, leaves, strict=True)])


DIT_V, UNET_V = variables(DIT, X, LABEL), variables(UNET, X, LABEL)


@pytest.mark.parametrize("module", [Attention(2, qk_norm=True), SelfAttention(2, norm=(1, 8, 1e-5), skip_scale=0.7)])
def test_attention_alone_is_attention_in_sequences_of_one(module):
    x = X.reshape(2, 64, 4).repeat(2, -1)
    if isinstance(module, SelfAttention):  # whose norm is over all positions: x of unit variance in each group already
        x = (x - x.mean((1, 2), keepdims=True)) / np.sqrt(x.var((1, 2), keepdims=True) + 1e-5)
        module = module.clone(norm=(1, 8, 0.0))
    v = variables(module, x)
    alone = module.clone(alone=True).apply(v, x)
    if isinstance(module, SelfAttention):
        bare = Attention(2)
        own = v["params"]
        x_normed = x * own["norm"]["scale"][None, None] + own["norm"]["bias"][None, None]
        mixed = bare.apply({"params": {k: own[k] for k in ("qkv", "out")}}, jnp.asarray(x_normed).reshape(128, 1, 8))
        expected = 0.7 * (x + mixed.reshape(x.shape))
    else:
        expected = module.apply(v, jnp.asarray(x).reshape(128, 1, 8)).reshape(x.shape)
    np.testing.assert_allclose(alone, expected, rtol=1e-4, atol=1e-4)
    assert np.abs(alone - module.apply(v, x)).max() > 1e-2


def test_perturbed_blocks_of_a_dit():
    """With all perturbed a patch depends on itself alone, and with one of them on the others."""
    x = jnp.asarray(X[:1])

    @jax.jit
    def outside():
        """The derivative of the first patch by all pixels."""
        return {
            blocks: jax.grad(lambda x, b=blocks: DIT.clone(perturbed=b).apply(DIT_V, x, LABEL[:1])[0, :4, :4].sum())(x)
            for blocks in ((0, 1), (1,), ())
        }

    away = {blocks: jnp.abs(g).at[:, :4, :4].set(0).max() for blocks, g in outside().items()}
    assert away[0, 1] == 0 and away[1,] > 1e-4 and away[()] > 1e-4


def test_skipped_blocks_of_a_dit():
    """One without its last block is a shallower one, and one without any is the layers around them."""
    for skipped, depth in (((1,), 1), ((0, 1), 0)):
        kept = [name for name in DIT_V["params"] if not name.startswith("block") or int(name[6:]) < depth]
        fewer = {"params": {name: DIT_V["params"][name] for name in kept}}
        got = DIT.clone(skipped=skipped).apply(DIT_V, X, LABEL)
        chex.assert_trees_all_close(got, DIT.clone(depth=depth).apply(fewer, X, LABEL), rtol=1e-5, atol=1e-5)


def test_skipped_stages_of_a_unet():
    """A stage that is skipped is one whose last layers are 0."""
    stages, last = ("middle_0", "middle_0_attention", "down_0_1"), ("conv_1", "out")

    def mute(path, a):
        return 0 * a if path[1].key in stages and path[2].key in last else a

    muted = jax.tree_util.tree_map_with_path(mute, UNET_V)
    got = jax.jit(UNET.clone(skipped=("middle_0", "down_0_1")).apply)(UNET_V, X, LABEL)
    np.testing.assert_allclose(got, jax.jit(UNET.apply)(muted, X, LABEL), rtol=1e-4, atol=1e-4)


WORSE = {
    "perturbed dit": (DIT, DIT_V, dict(perturbed=(1,))),
    "skipped dit": (DIT, DIT_V, dict(skipped=(0,))),
    "perturbed unet": (UNET, UNET_V, dict(perturbed=("middle_0",))),
}


@pytest.mark.parametrize("name", WORSE)
def test_guidance_by_a_worse_network(name):
    """Samples are those of the formula; the scale of the papers is w - 1."""
    model, v, worse = WORSE[name]
    good = jdiff.denoiser(model.apply, v, SCHEDULE, jdiff.targets.Velocity())
    bad = good.replace(apply=model.clone(**worse).apply)
    guided = guidance.autoguidance(good, bad, 1 + 2.0)

    @jax.jit
    def three(x, t):
        return guided(x, t), good(x, t), bad(x, t)

    got, a, b = three(X, 0.4)
    np.testing.assert_allclose(got, a + 2.0 * (a - b), rtol=1e-4, atol=1e-4)
    assert np.abs(a - b).max() > 1e-3


def test_parts_that_are_not_there():
    for model, v in ((DIT.clone(perturbed=(2,)), DIT_V), (DIT.clone(skipped=("0",)), DIT_V)):
        with pytest.raises(ValueError, match="DiT: .* expected some of 0, 1"):
            model.apply(v, X, LABEL)
    with pytest.raises(ValueError, match="UNet: perturbed has 'down_0_0'; expected some of down_1_0"):
        UNET.clone(perturbed=("down_0_0",)).apply(UNET_V, X, LABEL)
    with pytest.raises(ValueError, match="UNet: up_0_0 changes the size or the width"):
        UNET.clone(skipped=("up_0_0",)).apply(UNET_V, X, LABEL)
    sampled = guidance.autoguidance(
        good := jdiff.denoiser(DIT.apply, DIT_V, SCHEDULE, jdiff.targets.Velocity()),
        good.replace(apply=DIT.clone(perturbed=(5,)).apply), 3.0,
    )  # fmt: skip
    with pytest.raises(ValueError, match="DiT: perturbed has 5"):
        jdiff.sample(solvers.DDIM(), sampled, SCHEDULE, X, jdiff.grid.uniform(3))
