"""Optimisers against their own formulas, by hand in NumPy, and against PyTorch's; learning rates in closed form."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

import jdiff
from jdiff import optim

GRADS = [np.array([3.0, -4.0]), np.array([0.3, 0.4]), np.array([-1.0, 0.5])]


def run(tx, params):
    """The parameters after each gradient of GRADS."""

    def step(carry, grad):
        updates, state = tx.update(grad, carry[1], carry[0])
        params = optax.apply_updates(carry[0], updates)
        return (params, state), params

    @jax.jit
    def path(params):
        return jax.lax.scan(step, (params, tx.init(params)), np.array(GRADS, np.float32))[1]

    return np.asarray(path(np.array(params, np.float32)))


def first_step(tx, grads, params):
    """The update that the optimiser makes of its first gradients."""
    return jax.jit(lambda grads, params: tx.update(grads, tx.init(params), params)[0])(grads, params)


def adam(params, lr, b1=0.9, b2=0.999, eps=1e-8, decay=0.0, grads=GRADS):
    """Kingma & Ba 2014, arXiv:1412.6980, algorithm 1; with decoupled decay, 1711.05101."""
    m = v = np.zeros(2)
    path = []
    for t, grad in enumerate(grads, 1):
        rate = lr(t - 1) if callable(lr) else lr
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        step = (m / (1 - b1**t)) / (np.sqrt(v / (1 - b2**t)) + eps)
        params = params - rate * (step + decay * params)
        path.append(params)
    return np.array(path)


def adamax(lr=0.1, b1=0.9, b2=0.999):
    """1412.6980, algorithm 2."""
    params, m, u, path = np.ones(2), 0, 0, []
    for t, grad in enumerate(GRADS, 1):
        m, u = b1 * m + (1 - b1) * grad, np.maximum(b2 * u, np.abs(grad))
        params = params - lr / (1 - b1**t) * m / u
        path.append(params)
    return np.array(path)


def nadam(lr=0.1, b1=0.9, b2=0.999):
    """Dozat 2016 with a constant momentum."""
    params, m, v, path = np.ones(2), 0, 0, []
    for t, grad in enumerate(GRADS, 1):
        m, v = b1 * m + (1 - b1) * grad, b2 * v + (1 - b2) * grad**2
        look = b1 * m / (1 - b1 ** (t + 1)) + (1 - b1) * grad / (1 - b1**t)
        params = params - lr * look / np.sqrt(v / (1 - b2**t))
        path.append(params)
    return np.array(path)


def rmsprop(lr=0.1, decay=0.9):
    params, v, path = np.ones(2), 0, []
    for grad in GRADS:
        v = decay * v + (1 - decay) * grad**2
        params = params - lr * grad / np.sqrt(v)
        path.append(params)
    return np.array(path)


def adagrad(lr=0.1, start=0.1):
    """Duchi, Hazan & Singer 2011."""
    sums = start + np.cumsum(np.square(GRADS), axis=0)
    return np.ones(2) - lr * np.cumsum(np.asarray(GRADS) / np.sqrt(sums), axis=0)


def sgd(lr=0.1, momentum=0.9, nesterov=False, decay=0.0):
    params, m, path = np.ones(2), 0, []
    for grad in GRADS:
        grad = grad + decay * params
        m = momentum * m + grad
        params = params - lr * (grad + momentum * m if nesterov else m)
        path.append(params)
    return np.array(path)


def lion(lr=0.1, b1=0.9, b2=0.99, decay=0.5):
    """Chen et al. 2023, arXiv:2302.06675, algorithm 2."""
    params, m, path = np.ones(2), np.zeros(2), []
    for grad in GRADS:
        params = params - lr * (np.sign(b1 * m + (1 - b1) * grad) + decay * params)
        m = b2 * m + (1 - b2) * grad
        path.append(params)
    return np.array(path)


BY_HAND = {
    "adam": (dict(b2=0.99), adam(np.ones(2), 0.1, b2=0.99)),
    "adamw": (dict(weight_decay=0.5), adam(np.ones(2), 0.1, decay=0.5)),
    "adamax": (dict(b1=0.8), adamax(b1=0.8)),
    "nadam": (dict(b1=0.8), nadam(b1=0.8)),
    "rmsprop": (dict(decay=0.8), rmsprop(decay=0.8)),
    "adagrad": (dict(initial_accumulator_value=0.3), adagrad(start=0.3)),
    "sgd": (dict(), sgd(momentum=0.0)),
    "sgd momentum": (dict(momentum=0.8), sgd(momentum=0.8)),
    "sgd nesterov": (dict(momentum=0.8, nesterov=True), sgd(momentum=0.8, nesterov=True)),
    "sgd decay": (dict(momentum=0.8, weight_decay=0.5), sgd(momentum=0.8, decay=0.5)),
    "lion": (dict(b2=0.9, weight_decay=0.5), lion(b2=0.9)),
}


@pytest.mark.parametrize("case", BY_HAND)
def test_by_hand(case):
    args, want = BY_HAND[case]
    tx = optim.optimizer(case.split()[0], 0.1, weight_decay_mask="all", **args)
    np.testing.assert_allclose(run(tx, [1, 1]), want, rtol=1e-5)


@pytest.mark.parametrize("name,plain", [("adamaxw", "adamax"), ("nadamw", "nadam")])
def test_decoupled_decay(name, plain):
    """Decay comes on top of the plain step: p (1 - lr decay) - step, and no decay is the plain optimiser."""
    np.testing.assert_array_equal(
        run(optim.optimizer(name, 0.1, weight_decay=0.0), [1, 1]), run(optim.optimizer(plain, 0.1), [1, 1])
    )
    steps = np.diff(np.vstack([[1, 1], run(optim.optimizer(plain, 0.1), [1, 1])]), axis=0)  # gradients are fixed here
    want, params = [], np.ones(2)
    for step in steps:
        params = params * (1 - 0.1 * 0.5) + step
        want.append(params)
    tx = optim.optimizer(name, 0.1, weight_decay=0.5, weight_decay_mask="all")
    np.testing.assert_allclose(run(tx, [1, 1]), want, rtol=1e-4)


def test_muon_orthogonalises_kernels():
    """Its step is lr 0.2 sqrt(max side) U V^T, singular values to 30%; a convolution is the matrix (h w in, out)."""
    rng = np.random.default_rng(0)
    shapes = {"kernel": (3, 3, 4, 16), "bias": (16,), "table": {"embedding": (5, 4)}}
    grads = jax.tree.map(lambda shape: np.float32(rng.normal(size=shape)), shapes, is_leaf=lambda a: type(a) is tuple)
    params = jax.tree.map(np.zeros_like, grads)
    step = first_step(optim.optimizer("muon", 0.1), grads, params)
    u, _, v = np.linalg.svd(np.reshape(grads["kernel"], (36, 16)), full_matrices=False)
    inner = u.T @ np.reshape(step.pop("kernel"), (36, 16)) @ v.T / (-0.1 * 0.2 * 6)
    np.testing.assert_allclose(np.diag(inner), 1, atol=0.35)
    np.testing.assert_allclose(inner - np.diag(np.diag(inner)), 0, atol=1e-3)
    want = first_step(optim.optimizer("nadam", 0.1), grads, params)
    del want["kernel"]
    chex.assert_trees_all_close(step, want, rtol=1e-5, strict=True)


def test_adafactor_first_step():
    """1804.04235, algorithm 4: v of a rank-one g^2 is g^2 exactly, so the step is lr rms(p) sign(g); clipped to 1."""
    rows, columns = np.array([1.0, 2.0, 3.0]), np.array([0.5, 1.0])
    grads = {"kernel": np.float32(np.outer(rows, columns))}
    tx = optim.optimizer("adafactor", 0.1, min_dim_size_to_factor=2)
    step = first_step(tx, grads, {"kernel": np.full((3, 2), 2, np.float32)})
    chex.assert_trees_all_close(step, {"kernel": np.full((3, 2), -0.2, np.float32)}, rtol=1e-4, strict=True)


def test_clipping_is_before_adam_and_only_above_the_norm():
    """Of norms 5, 0.5 and 1.118 only the first and the last are scaled down to 1."""
    clipped = [grad / max(1.0, np.linalg.norm(grad)) for grad in GRADS]
    want = adam(np.ones(2), 0.1, grads=clipped)
    np.testing.assert_allclose(run(optim.optimizer("adam", 0.1, clip=1.0), [1, 1]), want, rtol=1e-5)


@pytest.mark.parametrize(
    "name,args,theirs",
    [
        ("adam", {}, ("Adam", {})),
        ("adamw", dict(weight_decay=0.1), ("AdamW", dict(weight_decay=0.1))),
        ("adamax", {}, ("Adamax", {})),
        ("rmsprop", dict(decay=0.99, eps_in_sqrt=False, momentum=0.5), ("RMSprop", dict(alpha=0.99, momentum=0.5))),
        ("adagrad", dict(eps=1e-10), ("Adagrad", dict(initial_accumulator_value=0.1))),
        ("sgd", dict(momentum=0.9, nesterov=True, weight_decay=0.1),
         ("SGD", dict(momentum=0.9, nesterov=True, weight_decay=0.1))),
    ],
)  # fmt: skip
def test_like_pytorch(name, args, theirs):
    """20 steps on f(p) = sum p^4 / 4 + p, from the same start."""
    torch = pytest.importorskip("torch")
    start = np.linspace(-1, 1, 6).reshape(2, 3)
    tx = optim.optimizer(name, 0.05, weight_decay_mask="all", **args)
    params = np.float32(start)
    state = tx.init(params)

    @jax.jit
    def step(params, state):
        updates, state = tx.update(params**3 + 1, state, params)
        return optax.apply_updates(params, updates), state

    p = torch.nn.Parameter(torch.tensor(start, dtype=torch.float32))
    reference = getattr(torch.optim, theirs[0])([p], lr=0.05, **theirs[1])
    for _ in range(20):
        params, state = step(params, state)
        p.grad = p.detach() ** 3 + 1
        reference.step()
    np.testing.assert_allclose(params, p.detach().numpy(), rtol=2e-4, atol=1e-5)


# ---------------------------------------------------------------- all of them train a network

RATES = {"sgd": 0.1, "adagrad": 0.2, "adafactor": 0.1, "muon": 0.05, "lion": 0.003}
ARGS = {"sgd": dict(momentum=0.9), "adafactor": dict(min_dim_size_to_factor=8)}


@pytest.mark.slow
@pytest.mark.parametrize("name", optim.OPTIMIZERS)
def test_trains_a_network(name):
    """An MLP fits x -> |x|, to 2% of its variance; the state is arrays, the same before and after, nothing else."""
    import flax.linen as nn

    net = nn.Sequential([nn.Dense(32), nn.tanh, nn.Dense(16), nn.tanh, nn.Dense(1)])
    x = jnp.linspace(-1, 1, 64)[:, None]
    params = net.init(jax.random.key(0), x)
    tx = optim.optimizer(
        name, optim.lr_schedule("cosine", RATES.get(name, 0.01), 400, 20), clip=1.0, **ARGS.get(name, {})
    )
    state = tx.init(params)
    assert jax.tree.leaves(state) and all(isinstance(leaf, jax.Array) for leaf in jax.tree.leaves(state))

    def loss(params):
        return jnp.mean((net.apply(params, x) - jnp.abs(x)) ** 2)

    def body(carry, _):
        params, state = carry
        updates, state = tx.update(jax.grad(loss)(params), state, params)
        return (optax.apply_updates(params, updates), state), None

    (params, after), _ = jax.jit(lambda *carry: jax.lax.scan(body, carry, None, 400))(params, state)
    assert loss(params) < 0.02 * jnp.var(jnp.abs(x))
    chex.assert_trees_all_equal_shapes_and_dtypes(after, state)


# ---------------------------------------------------------------- where weight decay acts


@pytest.mark.parametrize("model,shape", [("unet_digits", (8, 8, 1)), ("uvit_s_2", (8, 8, 4)), ("mlp_step", (2,))])
def test_decay_acts_on_kernels(model, shape):
    """Of our networks: what is called kernel decays, all else does not; and AdamW leaves that as it is."""
    fields = dict(num_classes=3) if shape != (2,) else {}
    net = jdiff.create_model(model, **fields)
    inputs = jnp.zeros((1, *shape)), jnp.zeros(1), jnp.zeros(1, jnp.int32) if fields else None
    params = jax.eval_shape(lambda: net.init(jax.random.key(0), *inputs))
    marked = jax.tree_util.tree_flatten_with_path(optim.kernels(params))[0]
    assert all(decays == (path[-1].key == "kernel") for path, decays in marked)
    assert {decays for _, decays in marked} == {True, False}


def test_decay_on_other_names_and_masks():
    """Zero gradients: AdamW then only decays, p (1 - lr decay), where the mask is true."""
    params = {
        "conv": {"weight": np.ones((3, 4)), "bias": np.ones(4)},
        "upscale": {"weight": np.ones((2, 2))},
        "token_embedding": {"weight": np.ones((9, 4))},
        "nothing": np.ones((1, 1, 4)),
        "norm": {"scale": np.ones((2, 4))},
        "out": {"kernel": np.ones((4, 1))},
    }
    params = jax.tree.map(np.float32, params)
    vectors = lambda params: jax.tree.map(lambda a: a.ndim == 1, params)  # noqa: E731
    masks = {"kernels": "kernels", "all": "all", "a tree": vectors(params), "a function": vectors}

    @jax.jit
    def decayed(params):
        found = {}
        for name, mask in masks.items():
            tx = optim.optimizer("adamw", 0.5, weight_decay=0.5, weight_decay_mask=mask)
            updates, _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
            found[name] = jax.tree.map(lambda a, u: (a + u).ravel()[0], params, updates)
        return found

    no, yes = np.float32(1.0), np.float32(0.75)
    only_vectors = jax.tree.map(lambda is_vector: yes if is_vector else no, vectors(params))
    want = {
        "kernels": {
            "conv": {"weight": yes, "bias": no}, "upscale": {"weight": yes}, "token_embedding": {"weight": no},
            "nothing": no, "norm": {"scale": no}, "out": {"kernel": yes},
        },
        "all": jax.tree.map(lambda a: yes, params), "a tree": only_vectors, "a function": only_vectors,
    }  # fmt: skip
    chex.assert_trees_all_equal(decayed(params), want, strict=True)


def test_the_mask_reaches_every_decay():
    """Zero gradients: the kernel moves by its decay alone, the bias not at all."""
    decays = dict.fromkeys(["lion", "muon", "sgd", "nadamw", "adamaxw"], "weight_decay")
    decays["adafactor"] = "weight_decay_rate"
    params = {"kernel": np.ones((4, 4), np.float32), "bias": np.ones(4, np.float32)}

    @jax.jit
    def updates(params):
        found = {}
        for name, argument in decays.items():
            tx = optim.optimizer(name, 0.5, **{argument: 0.5})
            found[name], _ = tx.update(jax.tree.map(jnp.zeros_like, params), tx.init(params), params)
        return found

    found = updates(params)
    for name in decays:
        decay = 0.5 if name == "adafactor" else 0.25  # adafactor's is not multiplied by the learning rate
        np.testing.assert_allclose(found[name]["kernel"], -decay, rtol=1e-6, err_msg=name)
        np.testing.assert_array_equal(found[name]["bias"], 0, err_msg=name)


# ---------------------------------------------------------------- learning rates


def test_warm_up_reaches_the_optimizer():
    """Step k of a warm-up over 2 has the rate lr k / 2."""
    rates = optim.lr_schedule("constant", 0.1, 100, warmup_steps=2)
    found = jax.jit(jax.vmap(rates))(np.array([0, 1, 2, 3, 1000]))
    np.testing.assert_allclose(found, [0, 0.05, 0.1, 0.1, 0.1], rtol=1e-6)
    want = np.ones(2) - np.cumsum([k * np.asarray(g) for k, g in zip((0, 0.05, 0.1), GRADS, strict=True)], axis=0)
    np.testing.assert_allclose(run(optim.optimizer("sgd", rates), [1, 1]), want, rtol=1e-5)


K = np.array([0, 1, 7, 10, 25, 50, 75, 100, 110, 150])
U = np.clip((K - 10) / 100, 0, 1)
RAMP = np.minimum(K / 10, 1)


@pytest.mark.parametrize(
    "name,args,want",
    [
        ("constant", {}, RAMP),
        ("cosine", {}, RAMP * (1 + np.cos(np.pi * U)) / 2),
        ("cosine", dict(end=0.2), RAMP * (0.2 + 0.8 * (1 + np.cos(np.pi * U)) / 2)),
        ("linear", {}, RAMP * (1 - U)),
        ("linear", dict(end=0.1), RAMP * (1 - 0.9 * U)),
        ("inverse_sqrt", dict(reference=20), RAMP / np.sqrt(np.maximum(K / 20, 1))),
        ("inverse_sqrt", dict(reference=5), RAMP / np.sqrt(np.maximum(K / 5, 1))),  # below the warm-up: no jump
    ],
)
def test_schedules(name, args, want):
    rates = optim.lr_schedule(name, 2.0, 110, warmup_steps=10, **args)
    no_warmup = optim.lr_schedule(name, 2.0, 100, **args)
    found, late = jax.jit(jax.vmap(lambda k: (rates(k), no_warmup(k - 10))))(K)
    np.testing.assert_allclose(found, 2 * want, rtol=1e-5, atol=1e-6)
    np.testing.assert_allclose(rates(25), 2 * want[4], rtol=1e-5)
    if name != "inverse_sqrt":
        np.testing.assert_allclose(late[3:], 2 * want[3:], rtol=1e-5, atol=1e-6)


def test_inverse_sqrt_of_edm2():
    """2312.02696, ImageNet-512, size S: 0.01, decay from 70,000 batches on; 2^31 images are 2^20 batches of 2048."""
    rates = optim.lr_schedule("inverse_sqrt", 0.01, 1_048_576, warmup_steps=4_883, reference=70_000)
    np.testing.assert_allclose(rates(70_000), 0.01, rtol=1e-6)
    np.testing.assert_allclose(rates(1_048_576), 0.01 / np.sqrt(14.97966), rtol=1e-5)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "make,message",
    [
        (lambda: optim.optimizer("lyon", 0.1), r"unknown optimizer 'lyon' \(did you mean 'lion'\?\); one of adam, "),
        (lambda: optim.optimizer("adam", 0.1, beta1=0.9), "optimizer 'adam' has no argument 'beta1'.*; valid: b1, b2,"),
        (lambda: optim.optimizer("adam", 0.1, weight_decay=0.1), "'adam' has no argument 'weight_decay'"),
        (lambda: optim.optimizer("sgd", 0.1, momentun=0.9), r"'momentun' \(did you mean 'momentum'\?\)"),
        (lambda: optim.optimizer("muon", 0.1, mask=None), "'muon' has no argument 'mask'.*; valid: ns_coeffs"),
        (lambda: optim.optimizer("adam", 0.1, clip=0), "clip"),
        (lambda: optim.optimizer("adam", 0.1, b1=1.0), r"b1 must be in \[0, 1\), got 1.0"),
        (lambda: optim.optimizer("adam", 0.1, b1="0,9"), r"b1 must be in \[0, 1\), got '0,9'"),
        (lambda: optim.optimizer("adamw", 0.1, weight_decay=-1), "weight_decay must be a number, 0 or more; got -1"),
        (lambda: optim.optimizer("adamw", 0.1, weight_decay_mask="some"), "_mask 'some'; one of kernels, all"),
        (lambda: optim.lr_schedule("step", 0.1, 10), "unknown learning-rate schedule 'step'; one of constant, cosine"),
        (lambda: optim.lr_schedule("constant", 0.1, 10, -1), "warm-up"),
        (lambda: optim.lr_schedule("cosine", 0.1, 10, final=1), "'cosine' has no argument 'final'; valid: end"),
        (lambda: optim.lr_schedule("constant", 0.1, 10, end=1), "no argument 'end'; valid: none"),
        (lambda: optim.lr_schedule("linear", 0.1, 10, end=2), r"end must be in \[0, 1\], got 2"),
        (lambda: optim.lr_schedule("inverse_sqrt", 0.1, 10), "'inverse_sqrt' needs the argument 'reference'"),
        (lambda: optim.lr_schedule("inverse_sqrt", 0.1, 10, reference=0), "reference is the step"),
    ],
)  # fmt: skip
def test_errors_are_one_line(make, message):
    with pytest.raises(ValueError, match=message) as caught:
        make()
    assert "\n" not in str(caught.value)
