"""Transformers: what must hold of attention, positions, DiT, ViT and the text encoder."""

import math
import types

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff.models import DiT, EDM2UNet, TextEncoder, UNet, ViT, create_model, tokenize
from jdiff.models.dit import DiTBlock
from jdiff.models.text import PAD, SPECIAL, embed
from jdiff.models.transformer import (
    Attention,
    Block,
    attend,
    grid_positions,
    images,
    rotary_turns,
    rotate,
    sincos_positions,
    tokens,
)

TINY = dict(width=16, depth=1, heads=2, patch=2)
X64 = pytest.mark.parametrize("x64", [False, True], ids=["float32", "float64"])


def normal(seed, *shape):
    return jnp.asarray(np.random.default_rng(seed).normal(size=shape), jnp.float32)


def randomized(model, *arguments):
    """Random variables, also of the layers that start at zero; scales around 1."""
    shapes = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    return jax.tree_util.tree_map_with_path(
        lambda path, a: ("scale" in str(path[-1])) + 0.3 * normal(a.size, *a.shape), shapes
    )


def apply(model, variables, *arguments, **options):
    return jax.jit(lambda *a: model.apply(*a, **options))(variables, *arguments)


def assert_close(a, b, tol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


@pytest.fixture(scope="module")
def small():
    model = DiT(**TINY, num_classes=3)
    arguments = normal(1, 3, 4, 6, 2), jnp.array([-1.0, 0.0, 1.5]), jnp.array([0, 2, 3])
    return model, randomized(model, *arguments), arguments


# ---------------------------------------------------------------- attention


@X64
def test_attention_averages_where_queries_are_blind_and_picks_where_they_are_sure(x64):
    """Queries of 0 see all keys alike; a query far along one key sees only that one; a mask hides keys."""
    with jax.enable_x64(x64):
        k, v = jnp.eye(4)[None, :, None], jnp.asarray(np.random.default_rng(0).normal(size=(1, 4, 1, 4)))
        blind = jnp.zeros((1, 2, 1, 4))
        assert_close(attend(blind, k, v), jnp.broadcast_to(v.mean(1, keepdims=True), (1, 2, 1, 4)), 1e-6)
        sure = 1e3 * k[:, 2:3]
        assert_close(attend(sure, k, v), v[:, 2:3], 1e-6)
        mask = jnp.array([[True, False, False, True]])
        assert_close(attend(blind[:, :1], k, v, mask), v[:, ::3].mean(1, keepdims=True), 1e-6)
        assert attend(sure, k, v, mask).dtype == v.dtype


def test_attention_is_differentiable_with_masked_keys():
    q, k, v = normal(0, 2, 3, 2, 4), normal(1, 2, 5, 2, 4), normal(2, 2, 5, 2, 4)
    mask = jnp.arange(5)[None] < jnp.array([[2], [4]])
    dk, dv = jax.grad(lambda k, v: jnp.sin(attend(q, k, v, mask)).sum(), (0, 1))(k, v)
    for d in (dk, dv):
        assert np.all(np.isfinite(d))
        np.testing.assert_array_equal(np.where(mask[:, :, None, None], 0, d), 0)
        assert np.abs(d[0, :2]).max() > 1e-3


def test_cudnns_kernel_is_asked_only_for_what_it_can_do(monkeypatch):
    """On GPUs, in half precision, without a mask, and not where forward mode is wanted; the values are the same."""
    asked, plain = [], jax.nn.dot_product_attention

    def spy(*arguments, mask=None, implementation=None):
        asked.append(implementation)
        return plain(*arguments, mask=mask)

    q, k, v = (normal(i, 2, 5, 2, 8) for i in range(3))
    mask = jnp.arange(5)[None] < jnp.array([[2], [4]])
    truth = attend(q, k, v), attend(q, k, v, mask)
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    for capability, fused in (("9.0", "cudnn"), ("7.5", None), ("gfx942", None)):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        assert_close(attend(*half).astype(jnp.float32), truth[0], 0.05)
        assert asked.pop() == fused
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    assert_close(attend(*half, mask).astype(jnp.float32), truth[1], 0.05)
    assert_close(attend(q, k, v, mask), truth[1])
    jax.jvp(lambda q: attend(q, *half[1:], fused=False), half[:1], half[:1])
    attend(*(a[..., :7] for a in half))
    assert asked == [None] * 4

    def requests(model, *arguments):
        asked.clear()
        jax.eval_shape(model.init, jax.random.key(0), *arguments)
        return set(asked)

    x, label, bf16 = jnp.zeros((1, 4, 4, 8)), jnp.zeros(1), dict(dtype=jnp.bfloat16)
    unet = dict(channels=32, multipliers=(1,), blocks=1, attention=(0,)) | bf16
    models = [DiT(**TINY, **bf16), ViT(**TINY, **bf16), UNet(**unet), EDM2UNet(**unet, head_channels=32)]
    for model in models:
        assert requests(model, x, label) == {"cudnn"}
        assert requests(model.copy(fused=False), x, label) == {None}
    assert requests(DiT(**TINY, **bf16, context=3), x, label) == {"cudnn", None}  # without and with a mask


@pytest.mark.parametrize("axes", [1, 2])
def test_rope_makes_attention_relative(axes):
    """Moving all positions by the same vector changes nothing; moving one token does."""
    attention, x = Attention(heads=2), normal(0, 2, 6, 16)
    variables = randomized(attention, x)
    positions = np.random.default_rng(1).normal(size=(6, axes)) * 5
    out = apply(attention, variables, x, turns=rotary_turns(positions, 8))
    moved = positions + np.array([[3.0, -20.0]])[:, :axes]
    assert_close(apply(attention, variables, x, turns=rotary_turns(moved, 8)), out)
    one = positions + (np.arange(6) == 2)[:, None]
    assert np.abs(apply(attention, variables, x, turns=rotary_turns(one, 8)) - out).max() > 1e-3


def test_rotation_is_one_and_position_zero_stays():
    x = normal(0, 1, 5, 2, 8)
    turned = rotate(x, rotary_turns(np.arange(5), 8))
    assert_close(jnp.linalg.norm(turned, axis=-1), jnp.linalg.norm(x, axis=-1))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    back = rotate(turned, rotary_turns(-np.arange(5), 8))
    assert_close(back, x)


def test_sincos_positions_are_distinct_and_relative():
    """All of one length; the inner product of two depends only on the way between them."""
    table = sincos_positions(5, 7, 16)
    gram = table @ table.T
    assert_close(np.diag(gram), 8.0)
    place = grid_positions(5, 7)
    way = place[:, None] - place[None]
    seen = {}
    for i, j in np.ndindex(gram.shape):
        seen.setdefault(tuple(way[i, j]), []).append(gram[i, j])
    assert max(np.ptp(v) for v in seen.values()) < 1e-12
    assert max(v[0] for k, v in seen.items() if k != (0, 0)) < 7.9
    np.testing.assert_array_equal(place[8], [1, 1])


def test_qk_norm_forgets_the_scale_of_queries_and_keys():
    x = normal(0, 2, 5, 16)
    for qk_norm in (True, False):
        attention = Attention(heads=2, qk_norm=qk_norm)
        variables = randomized(attention, x)
        scale = jnp.concatenate([jnp.full(16, 7.0), jnp.full(16, 0.3), jnp.ones(16)])
        params = variables["params"]
        with jax.numpy_rank_promotion("allow"):
            scaled = {"params": params | {"qkv": jax.tree.map(lambda a, s=scale: a * s, params["qkv"])}}
        change = np.abs(apply(attention, scaled, x) - apply(attention, variables, x)).max()
        assert (change < 1e-4) == qk_norm


def test_attention_without_positions_does_not_know_the_order():
    """Tokens permuted: so is the output. Context permuted, with its mask: nothing."""
    x, context, mask = normal(0, 2, 6, 16), normal(1, 2, 5, 12), jnp.arange(5)[None] < jnp.array([[3], [5]])
    attention = Attention(heads=4)
    order = np.random.default_rng(0).permutation(6)
    variables = randomized(attention, x)
    assert_close(apply(attention, variables, x[:, order]), apply(attention, variables, x)[:, order])
    variables = randomized(attention, x, context, mask)
    order = np.array([4, 1, 3, 0, 2])
    out = apply(attention, variables, x, context, mask)
    assert_close(apply(attention, variables, x, context[:, order], mask[:, order]), out)
    assert_close(apply(attention, variables, x[:1], context[:1, :3]), out[:1])  # a mask is a truncation


@pytest.mark.parametrize("post", [False, True])
def test_a_masked_block_is_a_block_on_fewer_tokens(post):
    x, block = normal(0, 2, 6, 16), Block(heads=2, post=post)
    mask = jnp.arange(6)[None] < jnp.array([[4], [4]])
    variables = randomized(block, x)
    assert_close(apply(block, variables, x, mask)[:, :4], apply(block, variables, x[:, :4]))
    if post:  # normalised last
        out = apply(block, jax.jit(block.init)(jax.random.key(0), x), x)
        assert_close(out.mean(-1), 0.0)
        assert_close(out.var(-1), 1.0, 1e-3)


# ---------------------------------------------------------------- DiT


def test_a_fresh_dit_is_zero_and_its_blocks_are_identities():
    model, x = DiT(**TINY, num_classes=3, out_multiplier=2), normal(0, 2, 4, 4, 3)
    variables = jax.jit(model.init)(jax.random.key(0), x, jnp.zeros(2), None)
    np.testing.assert_array_equal(apply(model, variables, x, jnp.ones(2), jnp.array([0, 1])), jnp.zeros((2, 4, 4, 6)))
    block, h, c, context = DiTBlock(heads=2), normal(1, 2, 5, 16), normal(2, 2, 16), normal(3, 2, 4, 16)
    np.testing.assert_array_equal(apply(block, jax.jit(block.init)(jax.random.key(0), h, c, context), h, c, context), h)


# Peebles & Xie 2023, table 4 and the released code: for 32x32 latents of 4 channels, 1,000 classes, learned variance
@pytest.mark.parametrize(
    "name,millions", [("dit_s_2", 33), ("dit_b_2", 130), ("dit_l_2", 458), ("dit_xl_2", 675), ("dit_xl_8", 676)]
)
def test_published_sizes(name, millions):
    count = parameters(create_model(name, num_classes=1000, out_multiplier=2), (1, 32, 32, 4))
    assert round(count / 1e6) == millions
    if name == "dit_xl_2":  # the released checkpoint has the fixed positions as well
        assert count + 16 * 16 * 1152 == 675_129_632


# Bao et al. 2022, table 1
@pytest.mark.parametrize(
    "name,size,classes,millions",
    [("uvit_s_2", 32, 0, 44), ("uvit_m_4", 64, 1000, 131), ("uvit_l_2", 32, 1000, 287), ("uvit_h_2", 32, 1000, 501)],
)
def test_published_sizes_of_uvit(name, size, classes, millions):
    shape = (1, size, size, 4 if "2" in name and classes else 3)
    assert round(parameters(create_model(name, num_classes=classes), shape) / 1e6) == millions


def parameters(model, shape):
    x = jax.ShapeDtypeStruct(shape, jnp.float32)
    fresh = jax.eval_shape(model.init, jax.random.key(0), x, jax.ShapeDtypeStruct((1,), jnp.float32), None)
    return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(fresh))


@pytest.mark.parametrize("make", [DiT, ViT], ids=["dit", "vit"])
def test_patches_know_their_place_only_from_positions(make):
    model = make(**TINY, **(dict(sincos=False) if make is DiT else {}))
    x, label = normal(0, 2, 4, 6, 3), jnp.array([0.2, -1.0])
    variables = randomized(model, x, label)
    order = np.random.default_rng(0).permutation(6)
    shuffle = lambda x: images(tokens(x, 2)[:, order], 4, 6, 2)  # noqa: E731
    if make is ViT:  # as if none had been learned
        assert (
            np.abs(apply(model, variables, shuffle(x), label) - shuffle(apply(model, variables, x, label))).max() > 0.1
        )
        variables["params"]["positions"] = jnp.zeros_like(variables["params"]["positions"])
    assert_close(apply(model, variables, shuffle(x), label), shuffle(apply(model, variables, x, label)), 1e-4)
    if make is DiT:
        for placed in (DiT(**TINY), DiT(**TINY, sincos=False, rope=True)):
            out = apply(placed, variables, x, label)
            assert np.abs(apply(placed, variables, shuffle(x), label) - shuffle(out)).max() > 1e-2


def test_images_are_their_tokens():
    x = normal(0, 2, 6, 4, 3)
    np.testing.assert_array_equal(images(tokens(x, 2), 6, 4, 2), x)
    np.testing.assert_array_equal(tokens(x, 2)[0, 3].reshape(2, 2, 3), x[0, 2:4, 2:4])  # second row, second column


@pytest.mark.parametrize("which", ["dit", "vit", "uvit"])
def test_label_and_class_matter_and_no_class_is_the_null_class(which):
    make = dict(dit=DiT, vit=ViT, uvit=lambda **k: ViT(**k | dict(depth=3), skips=True))[which]
    model = make(**TINY, num_classes=3)
    x, label, cond = normal(1, 3, 4, 4, 2), jnp.array([-1.0, 0.0, 1.5]), jnp.array([0, 2, 3])
    variables = randomized(model, x, label, cond)
    run = jax.jit(model.apply)
    out = run(variables, x, label, cond)
    assert np.abs(run(variables, x, label + 0.5, cond) - out).max() > 1e-3
    other = run(variables, x, label, jnp.array([1, 2, 3]))
    assert np.abs(other - out)[0].max() > 1e-3
    assert_close(other[1:], out[1:])
    assert_close(run(variables, x, label, None), run(variables, x, label, jnp.full(3, 3)))
    assert_close(run(variables, x[1:2], label[1:2], cond[1:2]), out[1:2], 1e-4)  # rows are independent


def test_learned_variance_is_beside_the_prediction(small):
    """Channels [prediction, variance]: keeping the prediction's columns of the last layer gives the plain network."""
    plain, _, arguments = small
    model = DiT(**TINY, num_classes=3, out_multiplier=2)
    variables = randomized(model, *arguments)
    both = apply(model, variables, *arguments)
    assert both.shape == (3, 4, 6, 4)
    params = variables["params"]
    keep = jax.tree.map(
        lambda a: a.reshape(*a.shape[:-1], 2, 2, 2, 2)[..., 0, :].reshape(*a.shape[:-1], 8), params["out"]
    )
    assert_close(apply(plain, {"params": params | {"out": keep}}, *arguments), both[..., :2])


@pytest.mark.parametrize("model", [
    DiT(**TINY), DiT(**TINY, rope=True, qk_norm=True, context=3), ViT(**TINY, qk_norm=True),
], ids=["dit", "dit with everything", "vit"])  # fmt: skip
def test_remat_changes_nothing(model):
    arguments = normal(1, 2, 4, 4, 2), jnp.array([-1.0, 1.5]), None
    variables = randomized(model, *arguments)

    def run(remat):
        return jax.jit(jax.value_and_grad(lambda v: jnp.sin(model.copy(remat=remat).apply(v, *arguments)).sum()))

    for a, b in zip(*(jax.tree.leaves(run(remat)(variables)) for remat in (False, True)), strict=True):
        assert_close(a, b, 1e-4)
    assert "remat" in str(jax.make_jaxpr(run(True))(variables)) or "checkpoint" in str(
        jax.make_jaxpr(run(True))(variables)
    )


@pytest.mark.parametrize("options", [{}, dict(qk_norm=True, rope=True)], ids=["plain", "qk_norm, rope"])
def test_bf16_computes_in_bf16_and_keeps_float32_parameters(options):
    arguments = normal(1, 3, 4, 6, 2), jnp.array([-1.0, 0.0, 1.5]), None
    exact = DiT(**TINY, **options)
    variables = randomized(exact, *arguments)
    model = DiT(**TINY, **options, dtype=jnp.bfloat16)
    out, truth = apply(model, variables, *arguments), apply(exact, variables, *arguments)
    assert out.dtype == jnp.float32
    assert 1e-6 < np.abs(out - truth).max() / np.abs(truth).max() < 0.1  # rounded, but the same network
    fresh = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    gradient = jax.grad(lambda v: jnp.mean(apply(model, v, *arguments) ** 2))(variables)
    assert all(leaf.dtype == jnp.float32 and np.all(np.isfinite(leaf)) for leaf in jax.tree.leaves(gradient))


def test_double_precision_is_double():
    """In float64 the network agrees with finite differences of itself to far below float32's precision."""
    arguments = normal(1, 1, 4, 4, 2), jnp.array([0.7]), None
    model = DiT(**TINY, qk_norm=True, rope=True)
    variables = randomized(model, *arguments)
    with jax.enable_x64(True):
        variables, x, label = jax.tree.map(
            lambda a: jnp.asarray(np.asarray(a), jnp.float64), (variables, *arguments[:2])
        )
        f = jax.jit(lambda x: jnp.sin(apply(model, variables, x, label)).sum())
        d = jnp.asarray(np.random.default_rng(0).normal(size=x.shape))
        slope = (f(x + 1e-5 * d) - f(x - 1e-5 * d)) / 2e-5
        assert abs(float(slope - jnp.vdot(jax.grad(f)(x), d))) < 1e-7 * abs(float(slope))


def test_errors(small):
    model, variables, (x, label, cond) = small
    fresh = lambda model, *arguments: jax.eval_shape(model.init, jax.random.key(0), *arguments)  # noqa: E731
    with pytest.raises(ValueError, match="multiples of 2, got 3x6"):
        model.apply(variables, x[:, :3], label, cond)
    with pytest.raises(ValueError, match="takes images"):
        model.apply(variables, x[..., 0], label, cond)
    with pytest.raises(ValueError, match="class labels"):
        model.apply(variables, x, label, jnp.ones(3))
    with pytest.raises(ValueError, match="no classes"):
        DiT(**TINY).apply(variables, x, label, cond)
    with pytest.raises(ValueError, match="takes 4 channels, got 2"):
        DiT(**TINY, channels=4).apply(variables, x, label)
    with pytest.raises(ValueError, match="width of 16 does not divide into 3 heads"):
        fresh(DiT(**TINY | dict(heads=3)), x, label)
    with pytest.raises(ValueError, match="head width that 4 divides, got 2"):
        fresh(DiT(**TINY | dict(heads=8), rope=True), x, label)
    with pytest.raises(ValueError, match="classes or a context, not both"):
        fresh(DiT(**TINY, num_classes=2, context=3), x, label)
    with pytest.raises(ValueError, match=r"a context is \(3, length, 5\), got \(3, 2, 4\)"):
        fresh(DiT(**TINY, context=5), x, label, jnp.zeros((3, 2, 4)))
    with pytest.raises(ValueError, match="mask is"):
        fresh(DiT(**TINY, context=4), x, label, (jnp.zeros((3, 2, 4)), jnp.ones((3, 3), bool)))
    with pytest.raises(ValueError, match="odd depth"):
        fresh(ViT(**TINY | dict(depth=2), skips=True), x, label)
    vit = ViT(**TINY)
    learned = randomized(vit, x, label)
    with pytest.raises(ValueError, match="learned the positions of 7 tokens, got images of 5"):
        vit.apply(learned, x[:, :, :4], label)


# ---------------------------------------------------------------- text and sets


@pytest.fixture(scope="module")
def conditioned():
    model = DiT(**TINY, context=5)
    x, label = normal(0, 2, 4, 4, 3), jnp.array([0.2, -1.0])
    context, mask = normal(1, 2, 4, 5), jnp.array([[True, True, False, False], [True] * 4])
    return model, randomized(model, x, label, (context, mask)), x, label, context, mask


def test_a_set_has_no_order_and_masked_elements_do_not_exist(conditioned):
    model, variables, x, label, context, mask = conditioned
    out = apply(model, variables, x, label, (context, mask))
    order = np.array([2, 0, 3, 1])
    assert_close(apply(model, variables, x, label, (context[:, order], mask[:, order])), out)
    assert_close(apply(model, variables, x[:1], label[:1], context[:1, :2]), out[:1])
    hidden = jnp.where(mask[:, :, None], context, 1e3)
    assert_close(apply(model, variables, x, label, (hidden, mask)), out)
    assert np.abs(apply(model, variables, x, label, context) - out)[0].max() > 1e-3


def test_no_context_is_an_empty_one(conditioned):
    """None, nothing but masked elements, and a length of 0 are the same; parameters do not depend on which was seen."""
    model, variables, x, label, context, mask = conditioned
    out = apply(model, variables, x, label, None)
    assert_close(apply(model, variables, x, label, (context, mask & False)), out)
    assert_close(apply(model, variables, x, label, context[:, :0]), out)
    assert np.abs(apply(model, variables, x, label, context) - out).max() > 1e-3
    shapes = jax.tree.map(jnp.shape, jax.eval_shape(model.init, jax.random.key(0), x, label, None))
    assert shapes == jax.tree.map(jnp.shape, variables)


def test_tokenize_keeps_the_text():
    prompts = ["a red square", "", "größer"]
    ids, mask = tokenize(prompts, 16)
    for row, seen, prompt in zip(ids, mask, prompts, strict=True):
        assert bytes((row[seen][1:-1] - SPECIAL).tolist()).decode() == prompt
        np.testing.assert_array_equal(row[~seen], PAD)
    cut, seen = tokenize("a red square", 5)
    assert seen.all() and bytes((cut[0, 1:-1] - SPECIAL).tolist()) == b"a r"
    with pytest.raises(ValueError, match="at least 2"):
        tokenize("", 1)


def test_text_encoder_does_not_see_padding_but_order():
    encoder = TextEncoder(width=16, depth=2, heads=2, length=12)
    ids, mask = tokenize(["abc", "a longer one"], 12)
    variables = randomized(encoder, ids, mask)
    sequence, pooled = apply(encoder, variables, ids, mask)
    short, short_pooled = apply(encoder, variables, ids[:1, :5])
    assert_close(sequence[:1, :5], short)
    assert_close(pooled[:1], short_pooled)
    swapped = apply(encoder, variables, ids[:1, [0, 2, 1, 3, 4]])[0]
    assert np.abs(swapped[:, [0, 2, 1, 3, 4]] - short).max() > 1e-2
    with pytest.raises(ValueError, match="up to length=12"):
        apply(encoder, variables, np.zeros((1, 13), int))
    with pytest.raises(ValueError, match="integers"):
        apply(encoder, variables, np.zeros((1, 3)))


@pytest.mark.slow
def test_sampling_from_a_prompt_with_guidance():
    """Embedded prompts are the `cond` of a denoiser; None is the unconditional one, and a weight of 0 is that."""
    encoder, model = TextEncoder(width=8, depth=1, heads=2, length=8), DiT(**TINY, context=8)
    seen = embed(encoder, randomized(encoder, *tokenize(["a", "bc"], 8)), ["a", "bc"])
    schedule = jdiff.VP()
    x = jdiff.prior(schedule, jax.random.key(0), (2, 4, 4, 1))
    params = randomized(model, x, jnp.zeros(2), seen)

    def sample(denoise):
        return jax.jit(jdiff.sample)(jdiff.solvers.DDIM(), denoise, schedule, x, jdiff.grid.log_snr(schedule, 3))

    with_text, without = (
        jdiff.denoiser(model.apply, params, schedule, jdiff.targets.Eps(), cond=cond) for cond in (seen, None)
    )
    guided = sample(jdiff.guidance.cfg(with_text, without, 0.0))
    assert_close(guided, sample(without), 1e-4)
    assert np.abs(sample(with_text) - guided).max() > 1e-3
