"""Transformers against PyTorch's: DiT beside diffusers' through the published names, a text block beside torch's."""

import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff import convert
from jdiff.convert import dit
from jdiff.models.dit import label_features
from jdiff.models.transformer import Block, sincos_positions

torch = pytest.importorskip("torch", reason="parity with PyTorch: pip install jdiff[parity]")
diffusers = pytest.importorskip("diffusers", reason="parity with diffusers: pip install jdiff[parity]")
hooks = pytest.importorskip("diffusers.hooks")

# heads, width of one, channels, patch, layers, side, out channels
CASES = {
    "latents": (2, 16, 4, 2, 2, 8, 8),
    "odd, patch 3": (3, 8, 3, 3, 1, 9, 3),
    "patch 1": (2, 24, 5, 1, 2, 5, 10),
}
X64 = pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])


def randomize(net):
    torch.manual_seed(0)
    with torch.no_grad():
        for name, weight in net.named_parameters():
            fan = weight[0].numel() if weight.ndim > 1 else 16
            weight.copy_(torch.randn(weight.shape) / math.sqrt(1.5 * fan) + ("norm" in name and weight.ndim == 1))
    return net


def published(state: dict, layers: int) -> dict:
    """diffusers' names to those of facebookresearch/DiT; each of its blocks holds the one embedding."""
    names = {
        "pos_embed.proj": "x_embedder.proj",
        "proj_out_1": "final_layer.adaLN_modulation.1",
        "proj_out_2": "final_layer.linear",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_1": "t_embedder.mlp.0",
        "transformer_blocks.0.norm1.emb.timestep_embedder.linear_2": "t_embedder.mlp.2",
        "transformer_blocks.0.norm1.emb.class_embedder.embedding_table": "y_embedder.embedding_table",
    }
    for i in range(layers):
        theirs, ours = f"transformer_blocks.{i}", f"blocks.{i}"
        names |= {
            f"{theirs}.norm1.linear": f"{ours}.adaLN_modulation.1",
            f"{theirs}.attn1.to_out.0": f"{ours}.attn.proj",
            f"{theirs}.ff.net.0.proj": f"{ours}.mlp.fc1",
            f"{theirs}.ff.net.2": f"{ours}.mlp.fc2",
        }
    pairs = [(f"{old}.{k}", f"{new}.{k}") for old, new in names.items() for k in ("weight", "bias")]
    tensors = {new: state[old] for old, new in pairs if old in state}
    for i in range(layers):
        parts = [f"transformer_blocks.{i}.attn1.to_{part}" for part in "qkv"]
        for k in ("weight", "bias"):
            tensors[f"blocks.{i}.attn.qkv.{k}"] = np.concatenate([state[f"{part}.{k}"] for part in parts])
    return tensors


@X64
@pytest.mark.parametrize("name", CASES)
def test_dit(name, x64):
    """Outputs, and gradients with respect to the input, for several labels and classes."""
    heads, each, channels, patch, layers, side, out = CASES[name]
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=each, in_channels=channels, out_channels=out, num_layers=layers,
        sample_size=side, patch_size=patch, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    randomize(net)
    # small: at label 999 the last bit of a rate, where exp in float32 differs, moves an angle by 6e-5
    label, cond = np.array([0, 91, 37]), np.array([3, 10, 0])
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        net = net.to(torch.float64) if x64 else net
        for block in net.transformer_blocks:
            emb = block.norm1.emb
            emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
            # the published features end one step short of 1/10,000, diffusers' at it; diffusers' are float32 always
            emb.time_proj.downscale_freq_shift = 0
            if x64:
                exact = torch.tensor(np.asarray(label_features(jnp.asarray(label, dtype))))
                emb.time_proj = Features(exact)
        if x64:  # their table is float32
            positions = sincos_positions(side // patch, side // patch, heads * each)
            np.testing.assert_allclose(net.pos_embed.pos_embed[0].numpy(), positions, atol=1e-6)
            net.pos_embed.pos_embed = torch.tensor(positions)[None]
        tensors = published({k: v.numpy() for k, v in net.state_dict().items()}, layers)
        module = dit.build(tensors, dict(num_heads=heads))
        variables = convert.variables_of(module, "dit", tensors, dtype)
        rng = np.random.default_rng(0)
        x = rng.normal(size=(3, side, side, channels)).astype(dtype)
        projection = rng.normal(size=(3, side, side, out)).astype(dtype)
        y = torch.tensor(x.transpose(0, 3, 1, 2).copy(), requires_grad=True)
        theirs = net(y, torch.tensor(label), torch.tensor(cond)).sample.movedim(1, 3)
        (theirs * torch.tensor(projection)).sum().backward()
        run = jax.jit(lambda x, variables: module.apply(variables, x, jnp.asarray(label, dtype), jnp.asarray(cond)))
        ours, back = jax.vjp(lambda x: run(x, variables), jnp.asarray(x))
        tol = 1e-10 if x64 else 1e-5
        np.testing.assert_allclose(np.asarray(ours), theirs.detach().numpy(), rtol=0, atol=tol)
        grad = y.grad.movedim(1, 3).numpy()
        ours = np.asarray(back(jnp.asarray(projection))[0])
        np.testing.assert_allclose(ours, grad, rtol=0, atol=tol * max(np.abs(grad).max(), 1))


@pytest.mark.parametrize("how", ["perturbed", "skipped"])
def test_a_dit_made_worse_on_purpose(how):
    """Perturbed attention and a skipped block, by diffusers' hooks and by ours."""
    heads, each, channels, patch, layers, side, out = CASES["latents"]
    net = diffusers.DiTTransformer2DModel(
        num_attention_heads=heads, attention_head_dim=each, in_channels=channels, out_channels=out, num_layers=layers,
        sample_size=side, patch_size=patch, num_embeds_ada_norm=10, norm_eps=1e-6,
    ).eval()  # fmt: skip
    randomize(net)
    for block in net.transformer_blocks:
        block.norm1.emb.load_state_dict(net.transformer_blocks[0].norm1.emb.state_dict())
        block.norm1.emb.time_proj.downscale_freq_shift = 0
    tensors = published({k: v.numpy() for k, v in net.state_dict().items()}, layers)
    module = dit.build(tensors, dict(num_heads=heads))
    variables = convert.variables_of(module, "dit", tensors, np.float32)
    x = np.random.default_rng(0).normal(size=(3, side, side, channels)).astype(np.float32)
    label, cond = np.array([0, 91, 37]), np.array([3, 10, 0])
    scores = how == "perturbed"
    config = hooks.LayerSkipConfig([1], skip_attention=not scores, skip_ff=not scores, skip_attention_scores=scores)
    hooks.apply_layer_skip(net, config)
    with torch.no_grad():
        theirs = net(torch.tensor(x.transpose(0, 3, 1, 2)), torch.tensor(label), torch.tensor(cond)).sample
    theirs = theirs.movedim(1, 3)
    modules = module.clone(**{how: (1,)}), module
    worse, plain = (m.apply(variables, x, label.astype(np.float32), cond) for m in modules)
    np.testing.assert_allclose(worse, theirs.numpy(), rtol=0, atol=1e-5)
    assert np.abs(worse - plain).max() > 1e-2


class Features(torch.nn.Module):
    """Given features, in place of those of the timestep."""

    def __init__(self, features):
        super().__init__()
        self.features = features

    def forward(self, timestep):
        return self.features


@X64
@pytest.mark.parametrize("post", [True, False])
def test_block(post, x64):
    """A text encoder's block, with padding, is torch's TransformerEncoderLayer."""
    net = torch.nn.TransformerEncoderLayer(
        16, 4, 64, dropout=0.0, activation="gelu", norm_first=not post, batch_first=True
    ).train()  # its fast path for inference sets padding to 0
    randomize(net)
    with jax.enable_x64(x64):
        dtype = np.float64 if x64 else np.float32
        net = net.to(torch.float64) if x64 else net
        w = {k: v.detach().numpy() for k, v in net.named_parameters()}
        pair = lambda name: {"kernel": w[f"{name}.weight"].T, "bias": w[f"{name}.bias"]}  # noqa: E731
        params = {
            "attention": {
                "qkv": {"kernel": w["self_attn.in_proj_weight"].T, "bias": w["self_attn.in_proj_bias"]},
                "out": pair("self_attn.out_proj"),
            },
            "feed": {"in": pair("linear1"), "out": pair("linear2")},
            "norm_0": {"scale": w["norm1.weight"], "bias": w["norm1.bias"]},
            "norm_1": {"scale": w["norm2.weight"], "bias": w["norm2.bias"]},
        }
        x = np.random.default_rng(0).normal(size=(2, 7, 16)).astype(dtype)
        mask = np.arange(7)[None] < np.array([[7], [4]])
        theirs = net(torch.tensor(x), src_key_padding_mask=torch.tensor(~mask)).detach().numpy()
        ours = Block(heads=4, post=post).apply({"params": jax.tree.map(jnp.asarray, params)}, x, jnp.asarray(mask))
        np.testing.assert_allclose(np.asarray(ours)[mask], theirs[mask], rtol=0, atol=1e-10 if x64 else 1e-5)
