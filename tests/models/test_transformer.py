"""Transformers: what must hold of attention, positions, DiT, ViT and the text encoder."""

import math
import types

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from networks import checkpoints, compiled, random_variables

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


def assert_close(a, b, tol=1e-5):
    np.testing.assert_allclose(np.asarray(a), np.asarray(b), rtol=tol, atol=tol)


@pytest.fixture(scope="module")
def small():
    model = DiT(**TINY, num_classes=3)
    arguments = normal(1, 3, 4, 4, 2), jnp.array([-1.0, 0.0, 1.5]), jnp.array([0, 2, 3])
    return model, random_variables(model, *arguments), arguments


# ---------------------------------------------------------------- attention


@X64
def test_attention_averages_where_queries_are_zero_and_picks_where_they_are_sure(x64):
    """Queries of 0 see all keys alike; a query far along one key sees only that one; a mask hides keys."""
    with jax.enable_x64(x64):
        k, v = np.eye(4)[None, :, None], np.random.default_rng(0).normal(size=(1, 4, 1, 4))
        k, v = jnp.asarray(k), jnp.asarray(v)
        attention = jax.jit(attend)
        zero, sure = jnp.zeros((1, 1, 1, 4)), 1e3 * k[:, 2:3]
        mask = jnp.array([[True, False, False, True]])
        assert_close(attention(zero, k, v), np.mean(v, 1, keepdims=True), 1e-6)
        assert_close(attention(sure, k, v), v[:, 2:3], 1e-6)
        assert_close(attention(zero, k, v, mask), np.mean(v[:, ::3], 1, keepdims=True), 1e-6)
        assert attention(sure, k, v, mask).dtype == v.dtype


def test_attention_is_differentiable_with_masked_keys():
    q, k, v = normal(0, 2, 3, 2, 4), normal(1, 2, 5, 2, 4), normal(2, 2, 5, 2, 4)
    mask = jnp.arange(5)[None] < jnp.array([[2], [4]])
    dk, dv = jax.jit(jax.grad(lambda k, v: jnp.sin(attend(q, k, v, mask)).sum(), (0, 1)))(k, v)
    chex.assert_tree_all_finite((dk, dv))
    for d in (dk, dv):
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
    truth = jax.jit(lambda q: (attend(q, k, v), attend(q, k, v, mask)))(q)
    values = lambda f, *a: jax.jit(f)(*a).astype(jnp.float32)  # noqa: E731
    monkeypatch.setattr(jax, "default_backend", lambda: "gpu")
    monkeypatch.setattr(jax.nn, "dot_product_attention", spy)
    half = [a.astype(jnp.bfloat16) for a in (q, k, v)]
    for capability, fused in (("9.0", "cudnn"), ("7.5", None), ("gfx942", None)):
        device = types.SimpleNamespace(compute_capability=capability)
        monkeypatch.setattr(jax, "local_devices", lambda device=device: [device])
        jax.eval_shape(lambda *a: attend(*a), *half)
        assert asked.pop() == fused
    monkeypatch.setattr(jax, "local_devices", lambda: [types.SimpleNamespace(compute_capability="9.0")])
    assert_close(values(lambda *a: attend(*a), *half), truth[0], 0.05)
    assert asked.pop() == "cudnn"
    assert_close(values(lambda *a: attend(*a, mask), *half), truth[1], 0.05)
    assert_close(values(lambda *a: attend(*a, mask), q, k, v), truth[1])
    jax.eval_shape(lambda q: jax.jvp(lambda q: attend(q, *half[1:], fused=False), (q,), (q,)), half[0])
    jax.eval_shape(lambda *a: attend(*a), *(a[..., :7] for a in half))
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


def test_rope_makes_attention_relative():
    """Moving all positions by the same vector changes nothing; moving one token does. On lines and in the plane."""
    attention, x = Attention(heads=2), normal(0, 2, 6, 16)
    variables = random_variables(attention, x)
    run = jax.jit(lambda turns: attention.apply(variables, x, turns=turns))
    for axes in (1, 2):
        positions = np.random.default_rng(1).normal(size=(6, axes)) * 5
        out = run(rotary_turns(positions, 8))
        moved = positions + np.array([[3.0, -20.0]])[:, :axes]
        assert_close(run(rotary_turns(moved, 8)), out)
        one = positions + (np.arange(6) == 2)[:, None]
        assert np.abs(run(rotary_turns(one, 8)) - out).max() > 1e-3


def test_rotation_is_one_and_position_zero_stays():
    x, turn = normal(0, 1, 5, 2, 8), jax.jit(rotate)
    turned = turn(x, rotary_turns(np.arange(5), 8))
    assert_close(np.linalg.norm(turned, axis=-1), np.linalg.norm(x, axis=-1))
    np.testing.assert_array_equal(turned[:, 0], x[:, 0])
    assert_close(turn(turned, rotary_turns(-np.arange(5), 8)), x)


def test_sincos_positions_are_distinct_and_relative():
    """All of one length; the inner product of two depends only on the way between them."""
    table = sincos_positions(5, 7, 16)
    gram = table @ table.T
    assert_close(np.diag(gram), 8.0)
    place = grid_positions(5, 7)
    way = place[:, None] - place[None]
    products = {}
    for i, j in np.ndindex(gram.shape):
        products.setdefault(tuple(way[i, j]), []).append(gram[i, j])
    assert max(np.ptp(v) for v in products.values()) < 1e-12
    assert max(v[0] for k, v in products.items() if k != (0, 0)) < 7.9
    np.testing.assert_array_equal(place[8], [1, 1])


def test_qk_norm_forgets_the_scale_of_queries_and_keys():
    x = normal(0, 2, 5, 16)
    scale = np.concatenate([np.full(16, 7.0), np.full(16, 0.3), np.ones(16)]).astype("f")
    for qk_norm in (True, False):
        attention = Attention(heads=2, qk_norm=qk_norm)
        params = random_variables(attention, x)["params"]
        larger = {"params": params | {"qkv": {name: np.asarray(a) * scale for name, a in params["qkv"].items()}}}
        run = compiled(attention)
        change = np.abs(run(larger, x) - run({"params": params}, x)).max()
        assert (change < 1e-4) == qk_norm


def test_attention_without_positions_does_not_know_the_order():
    """Tokens permuted: so is the output. Context permuted, with its mask: nothing."""
    x, context, mask = normal(0, 2, 6, 16), normal(1, 2, 5, 12), jnp.arange(5)[None] < jnp.array([[3], [3]])
    attention = Attention(heads=4)
    run, order = compiled(attention), np.random.default_rng(0).permutation(6)
    variables = random_variables(attention, x)
    assert_close(run(variables, x[:, order]), run(variables, x)[:, order])
    variables = random_variables(attention, x, context, mask)
    order = np.array([4, 1, 3, 0, 2])
    out = run(variables, x, context, mask)
    assert_close(run(variables, x, context[:, order], mask[:, order]), out)
    assert_close(run(variables, x, context[:, :3]), out)  # a mask is a truncation


@pytest.mark.parametrize("post", [False, True])
def test_a_masked_block_is_a_block_on_fewer_tokens(post):
    x, block = normal(0, 2, 6, 16), Block(heads=2, post=post)
    mask = jnp.arange(6)[None] < jnp.array([[4], [4]])
    variables, run = random_variables(block, x), compiled(block)
    assert_close(run(variables, x, mask)[:, :4], run(variables, x[:, :4]))
    if post:  # normalised last
        variables["params"]["norm_1"] = dict(scale=jnp.ones(16), bias=jnp.zeros(16))
        out = np.asarray(run(variables, x, mask))
        assert_close(out.mean(-1), 0.0)
        assert_close(out.var(-1), 1.0, 1e-3)


# ---------------------------------------------------------------- DiT


def test_a_fresh_dit_is_zero_and_its_blocks_are_identities():
    model, x = DiT(**TINY, num_classes=3, out_multiplier=2), normal(0, 2, 4, 4, 3)

    @jax.jit
    def last_layer(key):  # the others are not computed, and not compiled
        return model.init(key, x, jnp.ones(2), jnp.array([0, 1]))["params"]["out"]

    assert not any(np.any(leaf) for leaf in jax.tree.leaves(last_layer(jax.random.key(0))))
    h, c, context = normal(1, 2, 5, 16), normal(2, 2, 16), normal(3, 2, 4, 16)
    start = jax.jit(lambda key: DiTBlock(heads=2).init_with_output(key, h, c, context)[0])
    np.testing.assert_array_equal(start(jax.random.key(0)), h)


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
    """Their number, from networks of fewer blocks: each more adds the same; with skips, each two more."""
    first, step = (3, 2) if getattr(model, "skips", False) else (1, 1)
    x, label = jax.ShapeDtypeStruct(shape, jnp.float32), jax.ShapeDtypeStruct((1,), jnp.float32)

    def count(depth):
        fresh = jax.eval_shape(model.clone(depth=depth).init, jax.random.key(0), x, label, None)
        return sum(math.prod(leaf.shape) for leaf in jax.tree.leaves(fresh))

    return count(first) + (model.depth - first) // step * (count(first + step) - count(first))


@pytest.mark.parametrize("make", [DiT, ViT], ids=["dit", "vit"])
def test_patches_know_their_place_only_from_positions(make):
    model = make(**TINY, **(dict(sincos=False) if make is DiT else {}))
    x, label = normal(0, 2, 4, 6, 3), jnp.array([0.2, -1.0])
    variables, run = random_variables(model, x, label), compiled(model)
    order = np.random.default_rng(0).permutation(6)
    shuffle = lambda x: images(tokens(x, 2)[:, order], 4, 6, 2)  # noqa: E731
    shuffled = shuffle(x)
    if make is ViT:  # as if no positions had been learned
        assert np.abs(run(variables, shuffled, label) - shuffle(run(variables, x, label))).max() > 0.1
        variables["params"]["positions"] = jnp.zeros_like(variables["params"]["positions"])
    assert_close(run(variables, shuffled, label), shuffle(run(variables, x, label)), 1e-4)
    if make is DiT:
        for placed in (DiT(**TINY), DiT(**TINY, sincos=False, rope=True)):
            out = compiled(placed)(variables, x, label)
            assert np.abs(compiled(placed)(variables, shuffled, label) - shuffle(out)).max() > 1e-2


def test_images_are_their_tokens():
    x = normal(0, 2, 6, 4, 3)
    np.testing.assert_array_equal(images(tokens(x, 2), 6, 4, 2), x)
    np.testing.assert_array_equal(tokens(x, 2)[0, 3].reshape(2, 2, 3), x[0, 2:4, 2:4])  # second row, second column


@pytest.mark.parametrize("which", ["dit", "vit", "uvit"])
def test_label_and_class_matter_and_no_class_is_the_null_class(which):
    make = dict(dit=DiT, vit=ViT, uvit=lambda **k: ViT(**k | dict(depth=3), skips=True))[which]
    model = make(**TINY, num_classes=3)
    x, label, cond = normal(1, 3, 4, 4, 2), jnp.array([-1.0, 0.0, 1.5]), jnp.array([0, 2, 3])
    variables, run = random_variables(model, x, label, cond), compiled(model)
    out = run(variables, x, label, cond)
    assert np.abs(run(variables, x, label + 0.5, cond) - out).max() > 1e-3
    other = run(variables, x, label, jnp.array([1, 2, 3]))
    assert np.abs(other - out)[0].max() > 1e-3
    assert_close(other[1:], out[1:])
    assert_close(run(variables, x.at[::2].add(1.0), label, cond)[1], out[1], 1e-4)  # rows are independent
    if which == "dit":  # the others have the same embedding of classes
        assert_close(run(variables, x, label, None), run(variables, x, label, jnp.full(3, 3)))


def test_learned_variance_is_beside_the_prediction(small):
    """Channels [prediction, variance]: keeping the prediction's columns of the last layer gives the plain network."""
    plain, _, arguments = small
    model = DiT(**TINY, num_classes=3, out_multiplier=2)
    variables = random_variables(model, *arguments)
    both = compiled(model)(variables, *arguments)
    assert both.shape == (3, 4, 4, 4)
    params = variables["params"]
    keep = jax.tree.map(
        lambda a: np.asarray(a).reshape(*a.shape[:-1], 2, 2, 2, 2)[..., 0, :].reshape(*a.shape[:-1], 8), params["out"]
    )
    assert_close(compiled(plain)({"params": params | {"out": keep}}, *arguments), both[..., :2])


@pytest.mark.parametrize("model", [
    DiT(**TINY), DiT(**TINY, rope=True, qk_norm=True, context=3), ViT(**TINY, qk_norm=True),
], ids=["dit", "dit with everything", "vit"])  # fmt: skip
def test_remat_changes_nothing(model):
    """The values; the gradients, of the same shapes, are computed with a checkpoint in each block."""
    arguments = normal(1, 2, 4, 4, 2), jnp.array([-1.0, 1.5]), None
    variables, again = random_variables(model, *arguments), model.copy(remat=True)
    assert_close(compiled(again)(variables, *arguments), compiled(model)(variables, *arguments), 1e-4)
    assert checkpoints(model, variables, *arguments) < checkpoints(again, variables, *arguments)
    grad = jax.grad(lambda v: jnp.sin(again.apply(v, *arguments)).sum())
    chex.assert_trees_all_equal_shapes_and_dtypes(jax.eval_shape(grad, variables), variables)


@pytest.mark.parametrize("options", [{}, dict(qk_norm=True, rope=True)], ids=["plain", "qk_norm, rope"])
def test_bf16_computes_in_bf16_and_keeps_float32_parameters(options):
    arguments = normal(1, 3, 4, 4, 2), jnp.array([-1.0, 0.0, 1.5]), None
    exact, model = DiT(**TINY, **options), DiT(**TINY, **options, dtype=jnp.bfloat16)
    variables = random_variables(exact, *arguments)

    def run(variables):
        y = model.apply(variables, *arguments)
        return jnp.mean(y**2), y

    (_, out), gradient = jax.jit(jax.value_and_grad(run, has_aux=True))(variables)
    truth = compiled(exact)(variables, *arguments)
    assert out.dtype == jnp.float32
    assert 1e-6 < np.abs(out - truth).max() / np.abs(truth).max() < 0.1  # rounded, but the same network
    fresh = jax.eval_shape(model.init, jax.random.key(0), *arguments)
    assert {leaf.dtype for leaf in jax.tree.leaves(fresh)} == {jnp.dtype("float32")}
    chex.assert_tree_all_finite(gradient)
    chex.assert_trees_all_equal_shapes_and_dtypes(gradient, variables)


def test_double_precision_is_double():
    """In float64 the network agrees with finite differences of itself to far below float32's precision."""
    arguments = normal(1, 1, 4, 4, 2), jnp.array([0.7]), None
    model = DiT(**TINY, qk_norm=True, rope=True)
    variables = random_variables(model, *arguments)
    with jax.enable_x64(True):
        variables, x, label = jax.tree.map(lambda a: np.asarray(a, np.float64), (variables, *arguments[:2]))
        f = jax.jit(jax.value_and_grad(lambda x: jnp.sin(model.apply(variables, x, label)).sum()))
        d = np.random.default_rng(0).normal(size=x.shape)
        slope = (f(x + 1e-5 * d)[0] - f(x - 1e-5 * d)[0]) / 2e-5
        assert abs(float(slope - np.vdot(f(x)[1], d))) < 1e-7 * abs(float(slope))


def test_errors(small):
    model, variables, (x, label, cond) = small
    fresh = lambda model, *arguments: jax.eval_shape(model.init, jax.random.key(0), *arguments)  # noqa: E731
    run = lambda model, *arguments: jax.eval_shape(model.apply, *arguments)  # noqa: E731
    with pytest.raises(ValueError, match="multiples of 2, got 3x4"):
        run(model, variables, x[:, :3], label, cond)
    with pytest.raises(ValueError, match="takes images"):
        run(model, variables, x[..., 0], label, cond)
    with pytest.raises(ValueError, match="class labels"):
        run(model, variables, x, label, jnp.ones(3))
    with pytest.raises(ValueError, match="no classes"):
        run(DiT(**TINY), variables, x, label, cond)
    with pytest.raises(ValueError, match="takes 4 channels, got 2"):
        run(DiT(**TINY, channels=4), variables, x, label)
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
    learned = fresh(vit, x, label)
    with pytest.raises(ValueError, match="learned the positions of 5 tokens, got images of 3"):
        run(vit, learned, x[:, :, :2], label)


# ---------------------------------------------------------------- text and sets


@pytest.fixture(scope="module")
def conditioned():
    model = DiT(**TINY, context=5)
    x, label = normal(0, 2, 4, 4, 3), jnp.array([0.2, -1.0])
    context, mask = normal(1, 2, 4, 5), jnp.array([[True, True, False, False]] * 2)
    return model, random_variables(model, x, label, (context, mask)), x, label, context, mask


def test_a_set_has_no_order_and_masked_elements_do_not_exist(conditioned):
    model, variables, x, label, context, mask = conditioned
    run = compiled(model)
    out = run(variables, x, label, (context, mask))
    order = np.array([2, 0, 3, 1])
    assert_close(run(variables, x, label, (context[:, order], mask[:, order])), out)
    assert_close(run(variables, x, label, (context[:, :2], mask[:, :2])), out)
    hidden = jnp.where(mask[:, :, None], context, 1e3)
    assert_close(run(variables, x, label, (hidden, mask)), out)
    assert np.abs(run(variables, x, label, (context, mask | True)) - out)[0].max() > 1e-3
    assert_close(run(variables, x, label, context), run(variables, x, label, (context, mask | True)))


def test_no_context_is_an_empty_one(conditioned):
    """None, nothing but masked elements and a length of 0 are the same; parameters do not depend on the choice."""
    model, variables, x, label, context, mask = conditioned
    run = compiled(model)
    out = run(variables, x, label, (context, mask & False))
    assert_close(run(variables, x, label, None), out)
    assert_close(run(variables, x, label, (context[:, :0], mask[:, :0])), out)
    assert np.abs(run(variables, x, label, (context, mask)) - out).max() > 1e-3
    fresh = jax.eval_shape(model.init, jax.random.key(0), x, label, None)
    chex.assert_trees_all_equal_shapes_and_dtypes(fresh, variables)


def test_tokenize_keeps_the_text():
    prompts = ["a red square", "", "größer"]
    ids, mask = tokenize(prompts, 16)
    for row, text, prompt in zip(ids, mask, prompts, strict=True):
        assert bytes((row[text][1:-1] - SPECIAL).tolist()).decode() == prompt
        np.testing.assert_array_equal(row[~text], PAD)
    cut, text = tokenize("a red square", 5)
    assert text.all() and bytes((cut[0, 1:-1] - SPECIAL).tolist()) == b"a r"
    with pytest.raises(ValueError, match="at least 2"):
        tokenize("", 1)


def test_text_encoder_does_not_see_padding_but_order():
    encoder = TextEncoder(width=16, depth=1, heads=2, length=12)
    ids, mask = tokenize(["abc", "a longer one"], 12)
    variables, run = random_variables(encoder, ids, mask), compiled(encoder)
    sequence, pooled = run(variables, ids, mask)
    short, short_pooled = run(variables, ids[:1, :5])
    assert_close(sequence[:1, :5], short)
    assert_close(pooled[:1], short_pooled)
    swapped = run(variables, ids[:1, [0, 2, 1, 3, 4]])[0]
    assert np.abs(swapped[:, [0, 2, 1, 3, 4]] - short).max() > 1e-2
    with pytest.raises(ValueError, match="up to length=12"):
        jax.eval_shape(encoder.apply, variables, np.zeros((1, 13), int))
    with pytest.raises(ValueError, match="integers"):
        jax.eval_shape(encoder.apply, variables, np.zeros((1, 3)))


@pytest.mark.slow
def test_sampling_from_a_prompt_with_guidance():
    """Embedded prompts are the `cond` of a denoiser; None is the unconditional one, and a weight of 0 is that."""
    encoder, model = TextEncoder(width=8, depth=1, heads=2, length=8), DiT(**TINY, context=8)
    text = embed(encoder, random_variables(encoder, *tokenize(["a", "bc"], 8)), ["a", "bc"])
    schedule = jdiff.VP()
    x = jdiff.prior(schedule, jax.random.key(0), (2, 4, 4, 1))
    params = random_variables(model, x, jnp.zeros(2), text)

    def sample(denoise):
        return jax.jit(jdiff.sample)(jdiff.solvers.DDIM(), denoise, schedule, x, jdiff.grid.log_snr(schedule, 3))

    with_text, without = (
        jdiff.denoiser(model.apply, params, schedule, jdiff.targets.Eps(), cond=cond) for cond in (text, None)
    )
    guided = sample(jdiff.guidance.cfg(with_text, without, 0.0))
    assert_close(guided, sample(without), 1e-4)
    assert np.abs(sample(with_text) - guided).max() > 1e-3
