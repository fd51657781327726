"""Floor 0: pytrees of numbers, safe functions, and randomness by position."""

import dataclasses

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

from jdiff.core.arrays import as_time, expand, safe_divide, safe_log, safe_sqrt
from jdiff.core.checks import check_same_shape, check_time
from jdiff.core.keys import BatchKey, each, fold, normal, positions, split
from jdiff.core.pytrees import concrete, noun, static


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@noun
class Line:
    slope: float = 1.0
    offset: float = 0.0
    power: int = static(1)

    def __call__(self, x):
        return self.slope * x**self.power + self.offset

    def check(self):
        if concrete(self.slope) and np.any(np.asarray(self.slope) == 13):
            raise ValueError("unlucky slope")


# ---------------------------------------------------------------- noun


@pytest.mark.parametrize("two", [2, np.int32(2), np.int64(2), 2.0])
def test_integers_given_for_numbers_become_floats(two):
    line = Line(two)
    assert line.slope == 2.0 and isinstance(line.slope, float)
    assert Line().replace(slope=two) == line


def test_ints_and_floats_are_one_program():
    apply = jax.jit(chex.assert_max_traces(lambda line, x: line(x), n=1))
    for slope, expected in ((2, 6.0), (0.5, 1.5), (np.int64(7), 21.0), (0, 0.0)):
        assert apply(Line(slope, 0), jnp.float32(3)) == expected
    with pytest.raises(AssertionError, match="traced > 1"):  # a static field is part of the type
        apply(Line(1, power=2), jnp.float32(3))


def test_booleans_and_statics_are_left_alone():
    assert Line(power=3).power == 3 and isinstance(Line(power=3).power, int)
    assert Line(slope=True).slope is True


def test_a_noun_is_a_frozen_pytree_of_its_numbers():
    line = Line(2, 3, power=2)
    assert jax.tree.leaves(line) == [2.0, 3.0]
    paths = [jax.tree_util.keystr(path) for path, _ in jax.tree_util.tree_flatten_with_path(line)[0]]
    assert paths == [".slope", ".offset"]
    assert jax.tree.map(lambda x: 2 * x, line) == Line(4, 6, power=2)
    with pytest.raises(dataclasses.FrozenInstanceError):
        line.slope = 1.0


def test_check_runs_on_construction_but_not_on_rebuilding():
    with pytest.raises(ValueError, match="unlucky"):
        Line(13)
    with pytest.raises(ValueError, match="unlucky"):
        Line(1).replace(slope=13)
    assert jax.tree.map(lambda _: 13, Line()).slope == 13  # a tree of anything: neither check nor conversion
    jax.tree.map(lambda _: object(), Line())


def test_nouns_under_grad_and_vmap():
    gradient = jax.grad(lambda line: line(jnp.float32(3)))(Line(2, 1, power=2))
    assert (gradient.slope, gradient.offset) == (9.0, 1.0)
    lines = Line(jnp.arange(4.0), jnp.ones(4))
    np.testing.assert_array_equal(jax.vmap(lambda line: line(2.0))(lines), [1, 3, 5, 7])


def test_concrete():
    assert concrete(1.0, jnp.ones(2), Line(), None)
    seen = []
    jax.jit(lambda x: seen.append(concrete(1.0, Line(x))) or x)(1.0)
    assert seen == [False]


# ---------------------------------------------------------------- shapes and safe functions


@pytest.mark.parametrize(
    "given, expected",
    [(jnp.bfloat16, jnp.float32), (jnp.float16, jnp.float32), (jnp.float32, jnp.float32), (jnp.int32, jnp.float32)],
)
def test_times_are_at_least_float32(given, expected):
    t = as_time(jnp.ones(3, given))
    assert t.dtype == expected and (t == 1).all()
    assert as_time(0.25).dtype == jnp.float32


def test_times_stay_float64():
    with jax.enable_x64(True):
        assert as_time(np.float64(0.1)).dtype == jnp.float64
        assert as_time(np.float32(0.5)).dtype == jnp.float32
        assert as_time(1).dtype == jnp.float64


@pytest.mark.parametrize("shape", [(2,), (1,), (3, 1), (4, 4)])
def test_check_time_raises_on_other_shapes(shape):
    with pytest.raises(ValueError, match=r"expected \(\) or \(3,\)"):
        check_time(jnp.ones(shape), jnp.ones((3, 4)))


def test_check_time_accepts_one_or_one_per_row():
    check_time(0.5, jnp.ones((3, 4)))
    check_time(jnp.ones(3), jnp.ones((3, 4)))


def test_check_same_shape_names_both():
    with pytest.raises(ValueError, match=r"eps has shape \(3,\) but x0 has \(3, 1\)"):
        check_same_shape("eps", jnp.ones(3), "x0", jnp.ones((3, 1)))


def test_expand_scales_rows_in_the_dtype_of_x():
    x = jnp.ones((3, 2, 4), jnp.bfloat16)
    scaled = expand(jnp.arange(3.0), x) * x
    assert scaled.dtype == jnp.bfloat16
    np.testing.assert_array_equal(scaled[:, 1, 2], [0, 1, 2])
    assert (expand(2.0, x) * x == 2).all()


def test_safe_sqrt_at_and_away_from_zero():
    u = jnp.array([-1.0, 0.0, 0.25, 4.0])
    np.testing.assert_array_equal(safe_sqrt(u), [0, 0, 0.5, 2])
    np.testing.assert_array_equal(jax.vmap(jax.grad(safe_sqrt))(u), [0, 0, 1, 0.25])
    assert not jnp.isfinite(jax.grad(jnp.sqrt)(0.0))  # what it is for


def test_safe_log_at_and_away_from_zero():
    u = jnp.array([-1.0, 0.0, 1.0, jnp.e])
    np.testing.assert_allclose(safe_log(u), [np.log(1e-20), np.log(1e-20), 0, 1], rtol=1e-6)
    np.testing.assert_allclose(jax.vmap(jax.grad(safe_log))(u), [0, 0, 1, 1 / np.e], rtol=1e-6)
    assert jnp.isfinite(jax.grad(jax.grad(safe_log))(0.0))


def test_safe_divide_at_and_away_from_zero():
    a, b = jnp.array([0.0, 3.0, 3.0]), jnp.array([0.0, 0.0, 2.0])
    np.testing.assert_array_equal(safe_divide(a, b), [0, 0, 1.5])
    by_a, by_b = jax.vmap(jax.grad(safe_divide, (0, 1)))(a, b)
    np.testing.assert_array_equal(by_a, [0, 0, 0.5])
    np.testing.assert_array_equal(by_b, [0, 0, -0.75])


# ---------------------------------------------------------------- randomness by position


draw = jax.jit(normal, static_argnums=1)  # one program a shape


def data(key):
    return np.asarray(jax.random.key_data(key))


@pytest.mark.parametrize("shape", [(), (3,), (4, 4, 2)])
def test_noise_is_a_function_of_key_and_position(shape):
    key = jax.random.key(0)
    whole = draw(key, (64, *shape))
    chex.assert_trees_all_equal(draw(key, (7, *shape)), whole[:7], strict=True)


def test_noise_is_the_same_compiled_or_not():
    key = jax.random.key(0)
    for n in (1, 64):
        chex.assert_trees_all_equal(normal(key, (n, 3)), draw(key, (64, 3))[:n], strict=True)


def test_keys_are_a_function_of_position():
    key = jax.random.key(3)
    whole = data(each(key, 64))
    assert len(np.unique(whole, axis=0)) == 64
    for n in (1, 7):
        np.testing.assert_array_equal(data(each(key, n)), whole[:n])


@pytest.mark.parametrize("start", [0, 5, 60])
def test_a_slice_of_the_global_batch_draws_its_own_rows(start):
    key = jax.random.key(0)
    whole = draw(key, (64, 3))
    chex.assert_trees_all_equal(draw(BatchKey(key, start, 64), (4, 3)), whole[start : start + 4], strict=True)
    for n in (1, 4):
        np.testing.assert_array_equal(data(each(BatchKey(key, start, 64), n)), data(each(key, 64))[start : start + n])
    index, size = positions(BatchKey(key, start, 64), 4)
    assert size == 64 and index.tolist() == list(range(start, start + 4))


def test_one_key_per_row():
    keys = jax.random.split(jax.random.key(0), 5)
    np.testing.assert_array_equal(data(each(keys, 5)), data(keys))
    rows = jax.jit(lambda keys: jnp.stack([jax.random.normal(key, (3,)) for key in keys]))(keys)
    chex.assert_trees_all_equal(draw(keys, (5, 3)), rows, strict=True)


def test_raw_keys_draw_as_typed_ones():
    """Noise depends on a key through `each` alone."""
    raw, key = jax.random.PRNGKey(7), jax.random.key(7)
    np.testing.assert_array_equal(draw(raw, (7, 3)), draw(key, (7, 3)))
    np.testing.assert_array_equal(data(fold(raw, 3)), data(fold(key, 3)))
    raws = jax.random.split(raw, 4)
    np.testing.assert_array_equal(data(each(raws, 4)), np.asarray(raws))
    np.testing.assert_array_equal(data(each(BatchKey(raw, 2, 8), 3)), data(each(key, 8))[2:5])


def test_fold_and_split_for_every_kind_of_key():
    key = jax.random.key(0)
    keys = jax.random.split(key, 3)
    np.testing.assert_array_equal(data(fold(keys, 9)), np.stack([data(jax.random.fold_in(k, 9)) for k in keys]))
    np.testing.assert_array_equal(data(fold(key, 9)), data(jax.random.fold_in(key, 9)))
    a, b, c = (np.asarray(draw(k, (64, 3))) for k in split(key, 3))
    assert (a != b).any() and (b != c).any() and (a != c).any()
    for whole, k in zip((a, b, c), split(BatchKey(key, 10, 64), 3), strict=True):
        np.testing.assert_array_equal(draw(k, (4, 3)), whole[10:14])


@pytest.mark.parametrize("bad", [jnp.zeros(2), jnp.zeros(3, jnp.uint32), jnp.zeros((), jnp.int32)])
def test_what_is_not_a_key_is_refused(bad):
    with pytest.raises(ValueError, match="expected a PRNG key"):
        normal(bad, (4, 2))


def test_keys_of_another_batch_are_refused():
    keys = jax.random.split(jax.random.key(0), 6)
    with pytest.raises(ValueError, match="6 keys for a batch of 4"):
        normal(keys, (4, 2))
    with pytest.raises(ValueError, match=r"keys have shape \(2, 3\)"):
        normal(keys.reshape(2, 3), (2, 2))


def test_noise_is_standard_normal():
    from scipy import stats

    draws = np.asarray(draw(jax.random.key(0), (2000, 3)))
    assert stats.kstest(draws.ravel(), "norm").pvalue > 1e-3
    assert np.abs(np.corrcoef(draws[:-1, 0], draws[1:, 0])[0, 1]) < 4 / np.sqrt(2000)
    assert jax.eval_shape(lambda key: normal(key, (2, 3), jnp.bfloat16), jax.random.key(0)).dtype == jnp.bfloat16
