"""Post-hoc averages: reconstructed profiles against averages that were tracked, and the files they are kept in."""

import contextlib
import functools
import io
import json
import re
import runpy
import shutil
import sys
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from jdiff import ema, parallel
from jdiff.train import params_file, posthoc
from jdiff.train.checkpoint import CheckpointError, CheckpointWarning

ROOT = Path(__file__).parents[2]
WIDTHS = (0.05, 0.10)
STEPS = 1200


def taken(count, end=STEPS):
    """(steps, gammas) of `count` times two snapshots, evenly spaced."""
    steps = np.repeat(np.arange(1, count + 1) * end // count, 2)
    return steps, np.tile([ema.gamma_of(width) for width in WIDTHS], count)


def profile(step, gamma):
    """The weight of each step, (STEPS,), in an average that ends at `step`: eq. 127 unrolled, which telescopes."""
    return np.diff(np.minimum(np.arange(STEPS + 1) / step, 1) ** (gamma + 1))


def error(count, step, sigma_rel, path):
    """The reconstruction's error, relative to how far that average is from the last parameters."""
    gamma = ema.gamma_of(sigma_rel)
    steps, gammas = taken(count)
    weights = posthoc.coefficients(steps, gammas, step, gamma)
    got = weights @ np.stack([profile(t, g) @ path for t, g in zip(steps, gammas, strict=True)])
    want = profile(step, gamma) @ path
    return np.linalg.norm(got - want) / np.linalg.norm(path[int(step) - 1] - want)


@pytest.fixture(scope="module")
def path():
    """A random walk of 30 parameters far from zero."""
    return 100 + np.cumsum(np.random.default_rng(0).normal(size=(STEPS, 30)), axis=0)


@pytest.mark.parametrize("sigma_rel,most", [(0.03, 0.1), (0.075, 2e-3), (0.15, 2e-3), (0.2, 1e-2)])
def test_reconstruction(path, sigma_rel, most):
    """From 16 pairs of snapshots; half the snapshots at least triple the error."""
    errors = [error(count, STEPS, sigma_rel, path) for count in (4, 8, 16, 32)]
    assert errors[2] < most
    assert all(few > 3 * many for few, many in zip(errors, errors[1:], strict=False)), errors


def test_any_end(path):
    """At the end of any snapshot as well as at the last; in between, as well as the snapshots around it allow."""
    assert error(32, STEPS // 2, 0.075, path) < 2e-3
    assert error(64, 1000, 0.075, path) < 0.02


def test_tracked_by_the_training_step():
    """The same through `ema.update` and `ema.power` in float32, as a run tracks them."""
    walk = 10 + jnp.cumsum(jax.random.normal(jax.random.key(0), (320, 5)) / 10, axis=0)
    widths = (*WIDTHS, 0.075)

    def body(averages, xs):
        i, params = xs
        averages = [ema.update(a, params, ema.power(width)(i)) for a, width in zip(averages, widths, strict=True)]
        return averages, averages

    _, (*tracked, want) = jax.lax.scan(body, [jnp.zeros(5)] * 3, (jnp.arange(320), walk))
    steps = np.arange(20, 321, 20)
    trees = [{"p": np.asarray(average)[t - 1]} for average in tracked for t in steps]
    gammas = np.repeat([ema.gamma_of(width) for width in WIDTHS], len(steps))
    weights = posthoc.coefficients(np.tile(steps, 2), gammas, 320, ema.gamma_of(0.075))
    got = posthoc.combine(iter(trees), weights)
    assert got["p"].dtype == np.float32
    np.testing.assert_allclose(got["p"], want[-1], atol=1e-3)  # the average is 0.4 from the last parameters
    assert np.abs(want[-1] - walk[-1]).max() > 0.1


def test_coefficients_are_the_least_squares():
    """Against NumPy's own, on the profiles' integrals over each of 4,800 steps, sum fixed by a heavy row."""
    steps, gammas = taken(4, 4800)
    gamma = ema.gamma_of(0.08)
    edges = np.arange(4801.0)
    table = np.stack([np.diff(np.minimum(edges / t, 1) ** (g + 1)) for t, g in zip(steps, gammas, strict=True)], 1)
    want = np.diff((edges / 4800) ** (gamma + 1))
    want, *_ = np.linalg.lstsq(np.vstack([table, np.full(8, 1e3)]), np.append(want, 1e3), rcond=None)
    got = posthoc.coefficients(steps, gammas, 4800, gamma)
    np.testing.assert_allclose(got, want, atol=2e-4)
    assert abs(got.sum() - 1) < 1e-12


def test_coefficients_sum_to_one():
    for count in (1, 3, 16, 100):
        for step, width in ((STEPS, 0.02), (STEPS, 0.075), (900.5, 0.2)):
            weights = posthoc.coefficients(*taken(count), step, ema.gamma_of(width))
            assert weights.dtype == np.float64 and abs(weights.sum() - 1) < 1e-9


def test_a_stored_profile_comes_back_exactly():
    steps, gammas = taken(8)
    for i in (0, 5, 15):
        weights = posthoc.coefficients(steps, gammas, steps[i], gammas[i])
        np.testing.assert_array_equal(weights, np.eye(16)[i])
        assert posthoc.misfit(steps, gammas, weights, steps[i], gammas[i]) < 1e-7
        near = posthoc.coefficients(steps, gammas, steps[i], gammas[i] * (1 + 1e-9))  # without the short cut
        np.testing.assert_allclose(near, np.eye(16)[i], atol=1e-6)


def test_misfit_by_quadrature():
    from scipy.integrate import quad

    steps, gammas = taken(3)
    step, gamma = 1000, ema.gamma_of(0.12)
    weights = posthoc.coefficients(steps, gammas, step, gamma)

    def p(tau, t, g):
        return (g + 1) * (tau / t) ** g / t * (tau <= t)

    def difference(tau):
        return p(tau, step, gamma) - sum(w * p(tau, t, g) for w, t, g in zip(weights, steps, gammas, strict=True))

    above = quad(lambda tau: difference(tau) ** 2, 0, STEPS, points=[400, 800, 1000])[0]
    below = quad(lambda tau: p(tau, step, gamma) ** 2, 0, step)[0]
    np.testing.assert_allclose(posthoc.misfit(steps, gammas, weights, step, gamma), np.sqrt(above / below), rtol=1e-6)


@pytest.mark.parametrize(
    "arguments,message",
    [
        (([], [], 1, 1), "at least one snapshot"),
        (([[4]], 2.0, 1, 1), "at least one snapshot"),
        (([0, 4], 2.0, 4, 1), "1 or more"),
        (([4], -0.6, 4, 1), "above -0.5"),
        (([4, 8, 8], 2.0, 4, 1), "given twice"),
        (([4, 8], 2.0, 9, 1), "step 9 is past the last snapshot, which is of step 8"),
    ],
)
def test_errors_of_coefficients(arguments, message):
    with pytest.raises(ValueError, match=message):
        posthoc.coefficients(*arguments)


def test_combine():
    """A generator, one at a time; float64 sums, the snapshots' dtypes; what does not float is the last's."""
    alive = []

    def trees():
        for i in range(3):
            alive.append(i)
            yield {"a": np.full(2, 10.0**i, np.float32), "b": jnp.full((), i, jnp.bfloat16), "n": np.int32(i)}

    got = posthoc.combine(trees(), [0.5, -1.0, 1.5])
    np.testing.assert_array_equal(got["a"], np.full(2, 140.5, np.float32))
    assert got["b"].dtype == jnp.bfloat16 and float(got["b"]) == 2.0
    assert got["n"] == 2 and alive == [0, 1, 2]
    big = [{"a": np.float32([1e8])}, {"a": np.float32([1e8])}, {"a": np.float32([1.0])}]
    assert posthoc.combine(big, [1.0, -1.0, 1.0])["a"] == 1.0
    for bad in (([], []), (iter(big), [1.0]), (iter(big[:1]), [1.0, 2.0])):
        with pytest.raises(ValueError):
            posthoc.combine(*bad)


# ---------------------------------------------------------------- files


def params(value=1.0):
    return {"params": {"file": {"kernel": jnp.full((2, 3), float(value))}, "bias": [jnp.arange(3, dtype=jnp.bfloat16)]}}


same = functools.partial(chex.assert_trees_all_equal, strict=True)


def test_store_and_load(tmp_path):
    for step in (4, 12, 8):
        posthoc.store(tmp_path / "deep" / "snapshots", step, {0.1: params(step), "0.05": params(-step), 1e-5: params()})
    (tmp_path / "deep" / "snapshots" / "tmp0123abcd.npz").write_bytes(b"what a killed write leaves")
    found = posthoc.snapshots(tmp_path / "deep" / "snapshots")
    assert [s[:2] for s in found] == [(t, w) for t in (4, 8, 12) for w in (1e-5, 0.05, 0.1)]
    for s in found:
        value = 1.0 if s.sigma_rel == 1e-5 else s.step if s.sigma_rel == 0.1 else -s.step
        same(params_file.load_params(s.path, params()), params(value))
        assert s.gamma == ema.gamma_of(s.sigma_rel)
    posthoc.store(tmp_path / "deep" / "snapshots", 4, {0.1: params(9.0)})  # a resumed run writes them again
    same(params_file.load_params(found[2].path, params()), params(9.0))
    assert posthoc.snapshots(tmp_path / "none") == []


def test_a_sharded_average(tmp_path):
    mesh = parallel.mesh()
    value = jnp.arange(16.0).reshape(8, 2)
    sharded = jax.device_put(value, jax.sharding.NamedSharding(mesh, PartitionSpec(mesh.axis_names[0])))
    (path,) = posthoc.store(tmp_path, 1, {0.1: {"a": sharded}})
    same(params_file.load_params(path, {"a": value}), {"a": value})


def rewrite(path, change):
    """Write the file again with `change(arrays, record)`, as a program that knows nothing of records might."""
    with np.load(path) as archive:
        arrays = dict(archive)
    record = json.loads(arrays.pop("jdiff/record").tobytes())
    change(arrays, record)
    raw = np.frombuffer(json.dumps(record).encode(), np.uint8)
    np.savez(path, **arrays, **({"jdiff/record": raw} if record else {}))


HARMS = {  # harm to snapshots of steps 2 and 4 and widths .05 and .1: what is said
    "swapped": (lambda d: swap(d / "2-0.1.npz", d / "4-0.1.npz"), "2-0.1.npz holds the average of step 4 and"),
    "widths swapped": (lambda d: swap(d / "2-0.1.npz", d / "2-0.05.npz"), "2-0.05.npz holds .* sigma_rel 0.1: it was"),
    "renamed": (lambda d: (d / "4-0.1.npz").rename(d / "3-0.1.npz"), "3-0.1.npz holds the average of step 4"),
    "step 0": (lambda d: (d / "4-0.1.npz").rename(d / "0-0.1.npz"), "0-0.1.npz is no snapshot: it is of step 0"),
    "no width": (lambda d: (d / "4-0.1.npz").rename(d / "4-0.9.npz"), r"4-0.9.npz is no snapshot: .*in \(0, 0.3002\]"),
    "no number": (lambda d: (d / "4-0.1.npz").rename(d / "4-0.1.2.npz"), "4-0.1.2.npz is no snapshot: could not"),
    "twice": (lambda d: shutil.copy(d / "4-0.1.npz", d / "4-0.10.npz"), "4-0.10.npz and 4-0.1.npz are of one step and"),
    "another model": (
        lambda d: posthoc.store(d, 4, {0.1: {"params": {"file": {"kernel": np.ones((2, 4))}, "bias": [np.ones(3)]}}}),
        r"4-0.1.npz is of another model than 2-0.05.npz: params/file/kernel has shape \(2, 4\), expected \(2, 3\)",
    ),
    "other numbers": (
        lambda d: rewrite(d / "4-0.1.npz", lambda a, r: a.update({"ema/params/bias/0": np.zeros(3, np.float32)})),
        "4-0.1.npz is damaged .*do not match their checksums",
    ),
    "an array lost": (
        lambda d: rewrite(d / "4-0.1.npz", lambda a, r: a.pop("ema/params/bias/0")),
        "4-0.1.npz is damaged .*do not match their checksums",
    ),
    "no model noted": (lambda d: rewrite(d / "4-0.1.npz", lambda a, r: r.pop("model")), "4-0.1.npz is damaged"),
    "a foreign array": (lambda d: rewrite(d / "4-0.1.npz", lambda a, r: a.update(b=np.ones(1))), "damaged .b is not"),
    "old": (lambda d: rewrite(d / "4-0.1.npz", lambda a, r: r.clear()), None),
    "all old": (lambda d: [rewrite(path, lambda a, r: r.clear()) for path in d.iterdir()], None),
}  # fmt: skip


def swap(a, b):
    a.rename(a.with_name("aside"))
    b.rename(a)
    a.with_name("aside").rename(b)


@pytest.fixture(scope="module")
def four(tmp_path_factory):
    directory = tmp_path_factory.mktemp("four")
    for step in (2, 4):
        posthoc.store(directory, step, {0.05: params(step), 0.1: params(-step)})
    return directory


@pytest.mark.parametrize("harm", HARMS)
def test_a_snapshot_is_what_it_says(four, tmp_path, harm):
    """Not its name decides which average it is; an old one is used with one line, not in silence."""
    change, said = HARMS[harm]
    directory = shutil.copytree(four, tmp_path / "snapshots")
    change(directory)
    code, _, err = script(tmp_path, "--sigma-rel", 0.075, "--step", 3)
    if said is None:
        files = "2-0.05.npz and 3 more are" if harm == "all old" else "4-0.1.npz is"
        assert f"warning: {directory}/{files} unverified: written by an earlier version" in err
        assert code == 0 and err.count("unverified") == 1
        with pytest.warns(CheckpointWarning, match="4-0.1.npz is unverified"):
            got = params_file.read(directory / "4-0.1.npz")
        chex.assert_trees_all_equal(got, params_file.read(four / "4-0.1.npz"), strict=True)
        assert script(tmp_path, "--sigma-rel", 0.075, "--step", 3, "--out", tmp_path / "a.npz")[0] == 0
        script(shutil.copytree(four, tmp_path / "whole" / "snapshots").parent, "--sigma-rel", 0.075, "--step", 3)
        want = params_file.read(tmp_path / "whole" / "posthoc" / "0.075-3.npz")
        chex.assert_trees_all_equal(params_file.read(tmp_path / "a.npz"), want, strict=True)
    else:
        assert code == 2 and err.startswith("error: ") and err.count("\n") == 1 and re.search(said, err), err


def test_errors_of_files(tmp_path):
    (path,) = posthoc.store(tmp_path, 1, {0.1: params()})
    for like, message in (
        ({"params": {"bias": jnp.zeros(3)}}, "of another model: missing params/bias"),
        (params() | {"more": jnp.zeros(1)}, "of another model: missing more"),
        ({"params": params()["params"] | {"bias": []}}, "of another model: unexpected params/bias/0"),
        (jax.tree.map(lambda a: a[..., :2], params()), r"params/bias/0 has shape \(3,\), expected \(2,\)"),
    ):
        with pytest.raises(CheckpointError, match=message):
            params_file.load_params(path, like)
    with pytest.raises(CheckpointError, match="there is no"):
        params_file.load_params(tmp_path / "2-0.1.npz", params())
    with pytest.raises(ValueError, match="keyed by their sigma_rel, such as 0.05; got 'main'"):
        posthoc.store(tmp_path, 1, {"main": params()})
    with pytest.raises(ValueError, match="1 or later; got 0"):
        posthoc.store(tmp_path, 0, {0.1: params()})
    with pytest.raises(OSError, match="cannot write .*1-0.1.npz"):
        posthoc.store(path, 1, {0.1: params()})
    np.savez(tmp_path / "2-0.1.npz", a=np.array([{}], object))
    with pytest.raises(CheckpointError, match="damaged .*object"):
        params_file.read(tmp_path / "2-0.1.npz")


# ---------------------------------------------------------------- the script


def script(*words):
    """(exit status, stdout, stderr) of scripts/posthoc_ema.py."""
    out, err, code, argv = io.StringIO(), io.StringIO(), 0, sys.argv
    sys.argv = ["posthoc_ema.py", *map(str, words)]
    try:
        with contextlib.redirect_stdout(out), contextlib.redirect_stderr(err):
            runpy.run_path(str(ROOT / "scripts" / "posthoc_ema.py"), run_name="__main__")
    except SystemExit as stop:
        code = stop.code or 0
    finally:
        sys.argv = argv
    return code, out.getvalue(), err.getvalue()


def test_script(tmp_path, path):
    for step in range(100, STEPS + 1, 100):
        averages = {width: {"p": np.float32(profile(step, ema.gamma_of(width)) @ path)} for width in WIDTHS}
        posthoc.store(tmp_path / "snapshots", step, averages)
    like = averages[0.1]
    code, out, err = script(tmp_path, "--sigma-rel", 0.075)
    assert code == 0 and "sigma_rel 0.075 at step 1,200 from 24 snapshots, profile error 0." in out and not err
    got = params_file.load_params(tmp_path / "posthoc" / "0.075-1200.npz", like)
    np.testing.assert_allclose(got["p"], profile(STEPS, ema.gamma_of(0.075)) @ path, atol=0.05)
    # one that was stored comes back in its bits; snapshots after its end are not needed
    code, out, _ = script(tmp_path, "--sigma-rel", 0.1, "--step", 600, "--out", tmp_path / "here.npz")
    assert code == 0 and "from 1 snapshots, profile error 0.00%" in out
    same(params_file.load_params(tmp_path / "here.npz", like),
         params_file.load_params(tmp_path / "snapshots" / "600-0.1.npz", like))  # fmt: skip
    code, out, err = script(tmp_path, "--sigma-rel", 0.01)
    assert code == 0 and "warning: the snapshots are too few for this profile" in err
    code, out, _ = script(tmp_path, "--list")
    assert code == 0 and "      600  0.05" in out and "0.01-1200" in out and "0.075-1200" in out


def test_script_says_what_is_wrong(tmp_path):
    posthoc.store(tmp_path / "snapshots", 10, {0.1: params()})
    (tmp_path / "empty").mkdir()
    for words, message in (
        ((tmp_path,), "--sigma-rel is missing"),
        ((tmp_path, "--sigma-rel", 0.5), "sigma_rel must be in (0, 0.3002]"),
        ((tmp_path, "--sigma-rel", 0.1, "--step", 11), "expected a step from 1 to 10"),
        ((tmp_path, "--sigma-rel", 0.1, "--out", "a.png"), "ends in .npz"),
        ((tmp_path, "--sigma_relative", 0.1), "--sigma_relative"),
        ((tmp_path / "no", "--sigma-rel", 0.1), "there is no directory"),
        ((tmp_path / "empty", "--sigma-rel", 0.1), "no snapshots in"),
    ):
        code, _, err = script(*words)
        assert code == 2 and err.startswith("error: ") and message in err and err.count("\n") == 1, (words, err)
    (tmp_path / "snapshots" / "10-0.1.npz").write_bytes(b"PK")
    code, _, err = script(tmp_path, "--sigma-rel", 0.1)
    assert code == 2 and "10-0.1.npz is damaged" in err
