"""Denoisers given y against closed forms: Gaussian data, where all of them are linear algebra."""

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import SCHEDULES, Bent, Diagonal, mixture, one_of
from scipy.special import dawsn
from scipy.stats import multivariate_normal

import jdiff
from jdiff import posterior
from jdiff.posterior.linear import solve

RNG = np.random.default_rng(0)
D, M, STD, SCALE, LAM = 4, 3, 0.3, 0.7, 3.0
ROOT = RNG.normal(size=(D, D))
C, MEAN = ROOT @ ROOT.T / D + 0.1 * np.eye(D), RNG.normal(size=D)
A, Y = RNG.normal(size=(M, D)), RNG.normal(size=M)
X = RNG.normal(size=(5, D))
DATA = dict(mean=MEAN, covariance=C)


@pytest.fixture(autouse=True)
def x64():
    with jax.enable_x64(True):
        yield


def given(base, A, y, std):
    """Every method, with settings that make it exact where it can be."""
    return {
        "mmps": posterior.mmps(base, A, y, std, iterations=M),
        "tmpd": posterior.tmpd(base, A, y, std),
        "pgdm": posterior.pgdm(base, A, y, std, data_std=1.3, iterations=M),
        "dps": posterior.dps(base, A, y, SCALE),
        "dps squared": posterior.dps(base, A, y, SCALE, squared=True),
        "diffpir": posterior.diffpir(base, A, y, std, lam=LAM, iterations=M),
        "ddnm": posterior.ddnm(base, A, y, iterations=M),
        "ddnm with noise": posterior.ddnm(base, A, y, std, iterations=M),
        "twisted": posterior.twisted(base, posterior.likelihood(A, y, std), iterations=M),
        "twisted, not damped": posterior.twisted(base, posterior.likelihood(A, y, std), iterations=0),
    }


def _predictions(schedule, x, t, A, y, std):
    """(alpha, sigma, the prediction of each method, the one of the exact posterior)."""
    data = jdiff.oracle.Gaussian(jnp.asarray(MEAN), jnp.asarray(C))
    base = data.denoise(schedule)
    exact = data.posterior(A, y, std).denoise(schedule)
    methods = given(base, A, y, std) | {"exact": exact}
    return schedule.alpha(t), schedule.sigma(t), {name: method.predict(x, t) for name, method in methods.items()}


predictions = jax.jit(chex.assert_max_traces(_predictions, n=1))  # one program for all schedules, times and settings


def closed_forms(a, s, x, std):
    """E[x_0 | x_t, y] by each method's own formula, in NumPy, with the covariance in closed form."""
    gain = a * C @ np.linalg.inv(a**2 * C + s**2 * np.eye(D))
    x0, cov = MEAN + (x - a * MEAN) @ gain.T, C - a * gain @ C
    r, noise = Y - x0 @ A.T, std**2 * np.eye(M)
    r2 = 1.3**2 * s**2 / (s**2 + a**2 * 1.3**2)
    rho = LAM * a**2 / s**2
    share = min(1, s / (a * std))
    return {
        "mmps": x0 + r @ np.linalg.inv(A @ cov @ A.T + noise) @ A @ cov,
        "twisted": x0 + r @ np.linalg.inv(A @ cov @ A.T + noise) @ A @ cov,
        "twisted, not damped": x0 + r / std**2 @ A @ cov,
        "tmpd": x0 + r / (A @ cov @ A.T @ np.ones(M) + std**2) @ A @ cov,
        "pgdm": x0 + r @ np.linalg.inv(r2 * A @ A.T + noise) @ A @ cov,
        "dps": x0 + SCALE * (r / np.linalg.norm(r, axis=1, keepdims=True)) @ A @ cov,
        "dps squared": x0 + SCALE * 2 * r @ A @ cov,
        "diffpir": x0 + r @ A / std**2 @ np.linalg.inv(A.T @ A / std**2 + rho * np.eye(D)),
        "ddnm": x0 + r @ np.linalg.pinv(A).T,
        "ddnm with noise": x0 + share * r @ np.linalg.pinv(A).T,
    }


@pytest.mark.parametrize("name", SCHEDULES)
@pytest.mark.parametrize("t", [0.02, 0.5, 0.95])
def test_closed_forms(name, t):
    """Each method is its formula; MMPS is exact; x_0 and eps fit together. One program for all of it."""
    a, s, made = predictions(one_of(name), X, jnp.asarray(t), A, Y, STD)
    for method, x0 in closed_forms(float(a), float(s), X, STD).items():
        np.testing.assert_allclose(made[method].x0, x0, rtol=1e-7, atol=1e-7, err_msg=method)
    np.testing.assert_allclose(made["mmps"].x0, made["exact"].x0, rtol=1e-9, atol=1e-9)
    for method, (x0, eps, _) in made.items():
        np.testing.assert_allclose(a * x0 + s * eps, X, rtol=1e-9, atol=1e-9, err_msg=method)


@pytest.mark.parametrize("name", ["cosine", "flow"])
def test_from_pure_noise(name):
    """At alpha = 0, to about 1e-3, which is the alpha of the time that stands in its place."""
    _, _, made = predictions(one_of(name), X, jnp.asarray(1.0), A, Y, STD)
    exact = jdiff.oracle.Gaussian(MEAN, C).posterior(A, Y, STD).mean
    np.testing.assert_allclose(made["mmps"].x0, np.broadcast_to(exact, X.shape), atol=5e-3)
    chex.assert_tree_all_finite(made)


@jax.jit
def affine_map(method, schedule, times):
    """(image of 0, linear part) of sampling with `method` on the grid, which is affine on Gaussian data."""
    start = jnp.concatenate([jnp.zeros((1, D)), jnp.eye(D)])
    x = jdiff.sample(jdiff.solvers.RK4(), method, schedule, schedule.sigma(times[0]) * start, times)
    return x[0], (x[1:] - x[:1]).T


def moments_of(method, schedule, n):
    mean, linear = affine_map(method, schedule, jdiff.grid.uniform(n, 0.0))
    return np.asarray(mean), np.asarray(linear @ linear.T)


@pytest.mark.parametrize(
    "name,covariance,A",
    [("mmps", C, A), ("tmpd", np.diag([0.3, 0.8, 1.0, 2.0]), np.eye(D)[:M]), ("pgdm", 1.3**2 * np.eye(D), A)],
)
def test_samples_have_the_moments_of_the_posterior(name, covariance, A):
    """Of the data for which the method is exact: mean and covariance of all samples, by the affine map, no draws."""
    schedule, data = jdiff.VE(0.01, 1000.0), jdiff.oracle.Gaussian(MEAN, covariance)
    exact = data.posterior(A, Y, STD)
    mean, cov = moments_of(given(data.denoise(schedule), A, Y, STD)[name], schedule, 100)
    np.testing.assert_allclose(mean, exact.mean, atol=3e-3)
    np.testing.assert_allclose(cov, exact.covariance, atol=3e-3)


def test_the_bias_of_dps():
    """With the scale of the Gaussian likelihood its samples lie closer together than those of the posterior.

    It takes x_0 given x_t for certain, and so weighs y by 1 / noise_std^2 where 1 / (Cov + noise_std^2) is right.
    Of N(0, 1) with y = 1 and noise_std = 1 the posterior is N(1/2, 1/2), and DPS integrates in closed form: to
    the mean int_0^1 exp((q^2 - 1) / 2) dq, a Dawson integral, and to the variance 1/e.
    """
    schedule, data, first = jdiff.VE(0.01, 1000.0), jdiff.oracle.Gaussian(np.zeros(D), np.eye(D)), np.eye(D)[:1]
    exact = data.posterior(first, np.ones(1), 1.0)
    np.testing.assert_allclose([exact.mean[0], exact.covariance[0, 0]], [0.5, 0.5])
    method = posterior.dps(data.denoise(schedule), first, np.ones(1), 1 / 2, squared=True)
    mean, cov = moments_of(method, schedule, 100)
    np.testing.assert_allclose(mean[0], np.sqrt(2) * dawsn(np.sqrt(0.5)), atol=3e-3)
    np.testing.assert_allclose(cov[0, 0], np.exp(-1), atol=3e-3)
    np.testing.assert_allclose(cov[1:, 1:], np.eye(D - 1), atol=3e-3)  # what y says nothing of


# ---------------------------------------------------------------- the equations


def test_looking_ahead_to_the_likelihood():
    """log p(y | x_t) = log N(y; A x_0, A Cov A^T + noise_std^2), at M iterations; of a convex reward, by its slope."""
    schedule, t = jdiff.VE(), jnp.asarray(0.6)
    base, s = jdiff.oracle.Gaussian(MEAN, C).denoise(schedule), float(schedule.sigma(t))
    cov = C - C @ np.linalg.inv(C + s**2 * np.eye(D)) @ C
    methods = [
        posterior.twisted(base, posterior.likelihood(A, Y, STD), iterations=M),
        posterior.twisted(base, lambda x0: 0.5 * (x0**2).sum(1), iterations=1),
    ]
    x0, (exact, convex) = jax.jit(lambda x: (base(x, t), [method.ahead(x, t) for method in methods]))(X)
    expected = [multivariate_normal(A @ row, A @ cov @ A.T + STD**2 * np.eye(M)).logpdf(Y) for row in np.asarray(x0)]
    np.testing.assert_allclose(exact.value, expected, rtol=1e-8)
    np.testing.assert_allclose(convex.moved.x0, x0 + x0 @ cov, rtol=1e-8)
    rise = np.einsum("bi,ij,bj->b", x0, cov, x0)
    np.testing.assert_allclose(convex.value, 0.5 * (x0**2).sum(1) + 0.5 * rise, rtol=1e-8)


def test_conjugate_gradients():
    """Each row by itself: NumPy's solution after as many steps as unknowns, and the residual of fewer."""
    root = RNG.normal(size=(3, 4, 4))
    K, b = root @ root.swapaxes(1, 2) + 0.1 * np.eye(4), RNG.normal(size=(3, 4))
    b[1] = 0
    found = [jax.jit(lambda b, k=k: solve(lambda v: jnp.einsum("bij,bj->bi", K, v), b, k))(b) for k in (2, 4, 9)]
    for x, residual in found:
        left = np.linalg.norm(b - np.einsum("bij,bj->bi", K, x), axis=1)
        expected = left[[0, 2]] / np.linalg.norm(b[[0, 2]], axis=1)
        np.testing.assert_allclose(residual[np.array([0, 2])], expected, rtol=1e-6, atol=1e-10)
        assert residual[1] == 0 and not x[1].any()
    for x, _ in found[1:]:
        np.testing.assert_allclose(x, np.linalg.solve(K, b[..., None])[..., 0], rtol=1e-6)


def test_the_residual_of_mmps():
    """That of the equations with the covariance in closed form; it falls to 0 at M iterations."""
    schedule, t = jdiff.VE(), jnp.asarray(0.6)
    data = jdiff.oracle.Gaussian(MEAN, C)
    s = float(schedule.sigma(t))
    cov = C - C @ np.linalg.inv(C + s**2 * np.eye(D)) @ C
    K, r = A @ cov @ A.T + STD**2 * np.eye(M), Y - np.asarray(data.denoise(schedule)(X, t)) @ A.T
    v = ((r**2).sum(1) / np.einsum("bi,ij,bj->b", r, K, r))[:, None] * r  # the first step goes down the residual
    expected = np.linalg.norm(r - v @ K, axis=1) / np.linalg.norm(r, axis=1)
    first, last = (posterior.mmps(data.denoise(schedule), A, Y, STD, iterations=k) for k in (1, M))
    left_after_one, left_after = jax.jit(lambda x: (first.residual(x, t), last.residual(x, t)))(X)
    np.testing.assert_allclose(left_after_one, expected, rtol=1e-7)
    assert left_after.max() < 1e-10


def test_a_jacobian_that_is_no_covariance():
    """x_0 = -x has a negative one, and x_0 = 1 none: MMPS leaves x_0 as it is, at any number of iterations."""
    for f in (lambda x, t: -x, lambda x, t: jnp.ones_like(x)):
        method = posterior.mmps(jdiff.as_denoise(f, jdiff.VE()), np.eye(D), Y[:1] * np.ones(D), 1e-3, iterations=3)
        made = method(X, 0.3)
        chex.assert_tree_all_finite(made)
        np.testing.assert_allclose(made, f(X, 0.3))


def test_an_operator_that_is_not_linear():
    """DPS is the gradient of the norm by autodiff; MMPS and TMPD linearise where the estimate is."""
    schedule, t, y = jdiff.VP(), jnp.asarray(0.4), np.array([0.3, -0.4])
    base, x = mixture().denoise(schedule), X[:, :2]
    f = lambda x0: jnp.tanh(x0) * jnp.roll(x0, 1, 1)  # noqa: E731
    scale = schedule.sigma(t) ** 2 / schedule.alpha(t)

    @jax.jit
    def run(x):
        x0 = base(x, t)
        away = lambda x: jnp.linalg.norm(y[None] - f(base(x, t)), axis=1).sum()  # noqa: E731
        slope = x0 - 0.5 * scale * jax.grad(away)(x)
        J = jax.jacobian(lambda x0: f(x0[None])[0])(x0[0])
        cov = scale * jax.jacobian(lambda x: base(x[None], t)[0])(x[0]).T
        methods = posterior.dps(base, f, y, 0.5), posterior.mmps(base, f, y, 0.3, iterations=2)
        made = [method(x, t) for method in (*methods, posterior.tmpd(base, f, y, 0.3))]
        return made, slope, x0[0], J, cov, y - f(x0)[0]

    (dps, mmps, tmpd), slope, x0, J, cov, away = jax.tree.map(np.asarray, run(x))
    np.testing.assert_allclose(dps, slope, rtol=1e-9)
    exact = x0 + cov @ J.T @ np.linalg.solve(J @ cov @ J.T + 0.09 * np.eye(2), away)
    np.testing.assert_allclose(mmps[0], exact, rtol=1e-7)
    sums = (J @ cov @ J.T).sum(1) + 0.09
    projected = x0 + cov @ J.T @ (away / np.where(sums > 0, sums, 0.09))
    np.testing.assert_allclose(tmpd[0], projected, rtol=1e-7)


# ---------------------------------------------------------------- what goes in, and around


def test_a_y_for_each_sample_and_noise_for_each_number():
    """(B, M) is row by row; marked or not; numbers of y with a noise of their own are scaled rows of A."""
    base, t = jdiff.oracle.Gaussian(MEAN, C).denoise(jdiff.VP()), jnp.asarray(0.5)
    each, std = RNG.normal(size=(len(X), M)), np.array([0.2, 0.5, 1.0])

    @jax.jit
    def run(y, x):
        return posterior.mmps(base, A, y, STD, iterations=M)(x, t), posterior.dps(base, A, y)(x, t)

    together, marked = run(each, X), run(posterior.PerSample(each), X)
    chex.assert_trees_all_close(together, marked, rtol=1e-12)
    for i in range(2):
        one = run(each[i], X[i : i + 1])
        chex.assert_trees_all_close(jax.tree.map(lambda a, i=i: a[i : i + 1], together), one, rtol=1e-9)
    scaled = A / std[:, None], Y / std, 1.0
    both = jax.jit(lambda x: [posterior.mmps(base, *args, iterations=M)(x, t) for args in ((A, Y, std), scaled)])(X)
    np.testing.assert_allclose(*both, rtol=1e-8)


@pytest.mark.slow
def test_adaptive_steps_follow_marked_observations():
    """Each sample meets its own y, and the flow ends where the exact posterior's does."""
    schedule, each = jdiff.VP(), RNG.normal(size=(len(X), M))
    data = jdiff.oracle.Gaussian(MEAN, C)
    method = posterior.mmps(data.denoise(schedule), A, posterior.PerSample(each), STD, iterations=M)
    x0, _ = jdiff.sample_adaptive(method, schedule, X, rtol=1e-8, atol=1e-8)
    for i in range(2):
        exact = data.posterior(A, each[i], STD).denoise(schedule)
        alone, _ = jdiff.sample_adaptive(exact, schedule, X[i : i + 1], rtol=1e-8, atol=1e-8)
        np.testing.assert_allclose(x0[i], alone[0], rtol=1e-4, atol=1e-6)


def test_with_guidance_in_any_order():
    """Around guidance and inside it: the composition of the formulas."""
    schedule, t = jdiff.VP(), jnp.asarray(0.4)
    c, u, x = Diagonal(schedule), Diagonal(schedule, 0.0, 1.0), X

    def mmps(base):
        return posterior.mmps(base, A, Y, 0.2)

    inside = jdiff.guidance.cfg(mmps(c), mmps(u), 2.0)
    both = jdiff.guidance.interval(mmps(c), c, 0.0, float("inf"))
    of_c, of_u, of_cfg, of_interval = jax.jit(lambda x: [m(x, t) for m in (mmps(c), mmps(u), inside, both)])(x)
    np.testing.assert_allclose(of_cfg, 2 * of_c - of_u, rtol=1e-10)
    np.testing.assert_allclose(of_interval, of_c, rtol=1e-12)
    plain = mmps(jdiff.guidance.cfg(lambda x, t: c(x, t), lambda x, t: u(x, t), 2.0))
    guided = mmps(lambda x, t: 2 * c(x, t) - u(x, t))
    times = jdiff.grid.log_snr(schedule, 4)
    run = jax.jit(lambda: [jdiff.sample(jdiff.solvers.DPMpp2M(), m, schedule, x, times) for m in (plain, guided)])
    np.testing.assert_allclose(*run(), rtol=1e-9)


def test_around_a_memory_and_around_noise_of_its_own():
    """An A of 0 says nothing: then MMPS around APG with momentum and around CFG++ samples what they do."""
    schedule, empty = jdiff.VP(), np.zeros((1, D))
    c, u = Bent(schedule), Diagonal(schedule, 0.0, 1.0)
    times = jdiff.grid.log_snr(schedule, 6)
    inner = [jdiff.guidance.apg(c, u, 3.0, momentum=-0.5), jdiff.guidance.cfg_pp(c, u, 0.6)]
    outer = [posterior.mmps(one, empty, np.ones(1), 0.1) for one in inner]
    run = jax.jit(lambda x: [jdiff.sample(jdiff.solvers.DDIM(), one, schedule, x, times) for one in inner + outer])
    found = run(X)
    np.testing.assert_allclose(found[2], found[0], rtol=1e-9)
    np.testing.assert_allclose(found[3], found[1], rtol=1e-9)
    half = jax.eval_shape(run, jax.ShapeDtypeStruct(X.shape, jnp.bfloat16))
    assert {out.dtype for out in half} == {jnp.dtype(jnp.bfloat16)}


def test_replacement():
    """y where it is observed, x_0 elsewhere; what y is outside the mask, even nan, is no matter."""
    schedule, t, mask = jdiff.Flow(), jnp.asarray(0.4), np.array([1.0, 0.0, 0.0, 1.0])
    base = jdiff.oracle.Gaussian(MEAN, C).denoise(schedule)
    y = np.array([0.5, np.nan, np.inf, -2.0])
    x0, eps, _ = posterior.replace(base, mask, y).predict(X, t)
    np.testing.assert_allclose(x0, np.where(mask > 0, y, base(X, t)), rtol=1e-12)
    np.testing.assert_allclose(eps, jdiff.eps_from(schedule, x0, X, t), rtol=1e-12)
    traced = jax.jit(lambda y: posterior.replace(base, mask, y)(X, t))(y)
    marked = posterior.replace(base, mask, posterior.PerSample(np.broadcast_to(y, X.shape)))(X, t)
    np.testing.assert_allclose(traced, x0, rtol=1e-12)
    np.testing.assert_allclose(marked, x0, rtol=1e-12)


def test_half_precision_and_both_ends():
    """Computed in float32 and rounded; finite with its gradients at alpha = 0 and sigma = 0."""
    schedule, dtype = jdiff.Flow(), jnp.bfloat16
    base = jdiff.oracle.Gaussian(np.float32(MEAN), np.float32(C)).denoise(schedule)
    x = jnp.asarray(X, dtype)

    @jax.jit
    def run(x, t):
        methods = given(base, np.float32(A), np.float32(Y), 0.1)
        methods = {name: methods[name] for name in ("mmps", "dps", "diffpir", "ddnm with noise")}
        made = {name: method.predict(x, t) for name, method in methods.items()}
        made = {"x0": {k: p.x0 for k, p in made.items()}, "eps": {k: p.eps for k, p in made.items()}}
        return made, jax.grad(lambda x: sum(m(x, t).astype(jnp.float32).sum() for m in methods.values()))(x)

    for t in (0.0, 0.5, 1.0):
        (made, gradient), (wide, _) = run(x, jnp.float32(t)), run(x.astype(jnp.float32), jnp.float32(t))
        made, wide = (p if t else p["x0"] for p in (made, wide))  # this denoiser has no eps at sigma = 0
        chex.assert_tree_all_finite((made, gradient))
        chex.assert_trees_all_close(jax.tree.map(lambda a: a.astype(dtype), wide), made, rtol=1e-2, atol=1e-2)
        chex.assert_trees_all_equal_dtypes(made, jax.tree.map(lambda a: a.astype(dtype), wide))


BASE = lambda x, t: x  # noqa: E731
GRID = jdiff.grid.uniform(3)
BAD = [
    (lambda: posterior.mmps(3, A, Y, STD), "denoise is 3; expected a denoiser, or a function (x, t) ->"),
    (lambda: posterior.mmps(BASE, "A", Y, STD), "A is 'A'; expected a matrix (M, D), or a function from x"),
    (lambda: posterior.mmps(BASE, posterior.Identity, Y, STD), "A is the class Identity; expected a matrix (M, D)"),
    (lambda: posterior.mmps(BASE, A[0], Y, STD), "A has shape (4,); expected a matrix (M, D), or a function"),
    (lambda: posterior.mmps(BASE, A, "y", STD), "y is 'y'; expected an observation, an array of the shape of A(x)[0]"),
    (lambda: posterior.mmps(BASE, A, Y * np.nan, STD), "y has numbers that are not finite; where a mask hides y, give"),
    (lambda: posterior.mmps(BASE, A, Y, -1.0), "noise_std must be 0 or more and finite"),
    (lambda: posterior.mmps(BASE, A, Y, "low"), "noise_std must be 0 or more and finite"),
    (lambda: posterior.mmps(BASE, A, Y, STD, iterations=0), "mmps: iterations must be a whole number"),
    (lambda: posterior.pgdm(BASE, A, Y, STD, data_std=0.0), "PGDM: data_std must be positive"),
    (lambda: posterior.diffpir(BASE, A, Y, STD, lam=0.0), "DiffPIR: lam must be positive"),
    (lambda: posterior.dps(BASE, A, Y, -1.0), "scale must be from 0 to 1e+09; got -1.0"),
    (lambda: posterior.dps(BASE, A, Y, "1"), "scale must be finite: a number, one a sample (B,), or a function of t"),
    (lambda: posterior.replace(BASE, np.full(D, 0.5), Y), "mask has other numbers than 0 and 1"),
    (lambda: posterior.PerSample("y"), "the y of PerSample is 'y'; expected an array (B, ...)"),
    (lambda: sampled(posterior.mmps(BASE, A, Y[:2], STD)), "A makes (5, 3) of x (5, 4), and y has shape (2,)"),
    (lambda: sampled(posterior.mmps(BASE, A, Y[None], STD)), "A makes (5, 3) of x (5, 4), and y has shape (1, 3)"),
    (lambda: sampled(posterior.mmps(BASE, A[:, :3], Y, STD)), "A has shape (3, 3) for an x of (5, 4); expected (M, 4)"),
    (lambda: sampled(posterior.mmps(BASE, A, Y, np.ones(2))), "noise_std has shape (2,); expected () or that of one y"),
    (lambda: sampled(posterior.mmps(BASE, lambda x: x[0], Y, STD)), "A makes (4,) of x (5, 4), and y has shape (3,)"),
    (lambda: sampled(posterior.mmps(BASE, lambda x: None, Y, STD)), "what A returned is None; expected an array (B,"),
    (lambda: sampled(posterior.replace(BASE, np.ones(3), Y)), "mask has shape (3,) for samples of (4,); give a mask"),
    (lambda: sampled(posterior.dps(BASE, A, Y, np.ones(2))), "scale has shape (2,); expected () or (5,)"),
]


def sampled(method):
    return jdiff.sample(jdiff.solvers.DDIM(), method, jdiff.VP(), X, GRID)


@pytest.mark.parametrize("call,message", BAD, ids=[message[:40] for _, message in BAD])
def test_bad_calls(call, message):
    with pytest.raises((ValueError, TypeError)) as caught:
        call()
    assert message in str(caught.value) and "\n" not in str(caught.value), str(caught.value)
