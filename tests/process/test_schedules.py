"""Schedules: the log-SNR falls, its inverse inverts it, and everything stays finite where alpha = 0."""

import dataclasses
import functools
from functools import partial

import chex
import helpers
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from helpers import OneOf
from jax.test_util import check_grads

import jdiff


@pytest.fixture(autouse=True)
def strict():
    with jax.numpy_dtype_promotion("strict"):
        yield


@partial(jax.tree_util.register_dataclass, data_fields=["power"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Power(jdiff.Schedule):
    """What a user would write: only alpha, sigma and the domain. alpha = 1 - t^power, sigma = t."""

    power: float = 1.5

    def alpha(self, t):
        return 1 - t**self.power

    def sigma(self, t):
        return t


SCHEDULES = {name: type(schedule) for name, schedule in helpers.SCHEDULES.items()} | {
    "linear table": lambda: jdiff.discrete(jdiff.betas.linear(1000)),
    "short table": lambda: jdiff.discrete(jdiff.betas.cosine(10)),
    "shifted flow": lambda: jdiff.Shifted(jdiff.Flow(), 3),
    "shifted vp": lambda: jdiff.Shifted(jdiff.VP(), 2),
    "shifted subvp": lambda: jdiff.Shifted(jdiff.SubVP(), 0.5),
    "shifted cosine": lambda: jdiff.Shifted(jdiff.Cosine(), 4),
    "user": Power,
    "shifted user": lambda: jdiff.Shifted(Power(), 2),
}
everywhere = pytest.mark.parametrize("name", SCHEDULES)
shiftable = pytest.mark.parametrize("make", [jdiff.VP, jdiff.SubVP, jdiff.Cosine, jdiff.Flow, Power])


@functools.cache
def members(x64):
    return tuple(make() for make in SCHEDULES.values())


def switched(name):
    """The schedule of that name as one of all of them: one program for all."""
    return OneOf(members(jax.config.jax_enable_x64), list(SCHEDULES).index(name))


def numbers(schedule, t):
    return schedule.alpha(t), schedule.sigma(t), jdiff.log_snr(schedule, t)


jitted_numbers, jitted_time_of = jax.jit(numbers), jax.jit(jdiff.time_of)


def inside(name, n=101, last=0.999):
    """Times of the domain, in its interior where alpha may end at 0."""
    return np.linspace(SCHEDULES[name]().t_min, last, n, dtype=jnp.zeros(()).dtype)


@everywhere
def test_a_switched_schedule_is_its_member(name):
    """`OneOf`, on which tests of all schedules rest: the member's own numbers, ends and inverse."""
    with jax.enable_x64(True):
        own, t = SCHEDULES[name](), inside(name)
        expected = jitted_numbers(own, t)
        got = jitted_numbers(switched(name), t)
        chex.assert_trees_all_close(got, expected, rtol=4e-15, atol=4e-15, strict=True)
        times = [jitted_time_of(schedule, expected[2]) for schedule in (switched(name), own)]
        chex.assert_trees_all_close(*times, rtol=4e-15, atol=4e-15, strict=True)
        ends = jax.jit(lambda schedule: (schedule.t_min, schedule.t_max))
        chex.assert_trees_all_equal(ends(switched(name)), (jnp.asarray(own.t_min), jnp.asarray(own.t_max)))


@everywhere
def test_log_snr_falls_and_numbers_are_in_range(name):
    t = inside(name, last=SCHEDULES[name]().t_max)
    alpha, sigma, log_snr = jitted_numbers(switched(name), t)
    assert (np.diff(log_snr) < 0).all()
    assert (alpha >= 0).all() and (sigma > 0).all() and jnp.isfinite(sigma).all()
    chex.assert_shape((alpha, sigma), t.shape)
    chex.assert_type((alpha, sigma), jnp.float32)


@everywhere
@pytest.mark.parametrize("x64, tolerance", [(False, 1e-5), (True, 1e-12)])
def test_time_of_inverts_log_snr(name, x64, tolerance):
    with jax.enable_x64(x64):
        t, schedule = inside(name), switched(name)
        back = jitted_time_of(schedule, jitted_numbers(schedule, t)[2])
        assert back.dtype == (jnp.float64 if x64 else jnp.float32)
        np.testing.assert_allclose(back, t, rtol=0, atol=tolerance)


@everywhere
def test_log_snr_is_the_log_of_the_ratio(name):
    with jax.enable_x64(True):
        alpha, sigma, log_snr = map(np.asarray, jitted_numbers(switched(name), inside(name)))
        np.testing.assert_allclose(np.exp(log_snr), alpha**2 / sigma**2, rtol=1e-12)


def between_knots(name):
    """(the schedule as one of all, with arrays as its numbers; three times, no knots of a table)."""
    schedule = SCHEDULES[name]()
    T = schedule.log_nsr.size if isinstance(schedule, jdiff.Discrete) else 1000
    every = switched(name)
    return every.replace(members=jax.tree.map(np.asarray, every.members)), (np.array([0.2, 0.5, 0.8]) * T + 0.4) / T


@jax.jit
def time_of_member(members, which, value):
    return jdiff.time_of(OneOf(members, which), value)


@jax.jit
def numbers_of_member(members, which, t):
    return numbers(OneOf(members, which), t)[:2]


@everywhere
def test_gradients_of_time_of_against_finite_differences(name):
    """With respect to the log-SNR and to the schedule's own numbers: bisection has an implicit derivative."""
    with jax.enable_x64(True):
        every, t = between_knots(name)
        value = jitted_numbers(every, t)[2]
        f = lambda members, value: time_of_member(members, every.which, value)  # noqa: E731
        check_grads(f, (every.members, value), order=1, modes=("fwd", "rev"), eps=1e-6, rtol=1e-5)


@everywhere
def test_gradients_of_alpha_and_sigma_against_finite_differences(name):
    with jax.enable_x64(True):
        every, t = between_knots(name)
        f = lambda members, t: numbers_of_member(members, every.which, t)  # noqa: E731
        check_grads(f, (every.members, jnp.asarray(t)), 1, eps=1e-6, rtol=1e-5)


@pytest.mark.parametrize("name", ["vp", "cosine", "linear table"])
def test_variance_is_preserved(name):
    with jax.enable_x64(True):
        alpha, sigma, _ = map(np.asarray, jitted_numbers(switched(name), inside(name, last=1.0)))
        np.testing.assert_allclose(alpha**2 + sigma**2, 1, rtol=1e-14)


def test_float32_keeps_its_digits_near_the_data():
    """1 - exp(-B) in float32 would have none: compare with the same schedule in float64."""
    t = np.array([1e-6, 1e-5, 1e-3, 1e-2])
    for make in (jdiff.VP, jdiff.SubVP, jdiff.Cosine):
        single = np.asarray(make().sigma(jnp.asarray(t, jnp.float32)))
        with jax.enable_x64(True):
            double = np.asarray(make().sigma(jnp.asarray(t)))
        np.testing.assert_allclose(single, double, rtol=1e-6)


def test_cosine_and_flow_end_at_alpha_exactly_0():
    for schedule in (jdiff.Cosine(), jdiff.Flow(), jdiff.Shifted(jdiff.Flow(), 3), jdiff.Shifted(jdiff.Cosine(), 3)):
        assert schedule.alpha(jnp.float32(1)) == 0 and schedule.sigma(jnp.float32(1)) == 1


# ---------------------------------------------------------------- the grid that EDM's clock makes


def test_ve_and_edm_reach_their_ends_and_continue_past_them():
    for schedule in (jdiff.VE(0.02, 30), jdiff.EDM(0.02, 30, 5)):
        np.testing.assert_allclose(schedule.sigma(jnp.array([0.0, 1.0])), [0.02, 30], rtol=1e-5)
        beyond = jdiff.time_of(schedule, -2 * jnp.log(40.0))
        assert beyond > 1
        np.testing.assert_allclose(schedule.sigma(beyond), 40, rtol=1e-5)


def test_ve_is_geometric():
    sigma = np.asarray(jdiff.VE().sigma(jnp.linspace(0, 1, 11)))
    np.testing.assert_allclose(sigma[1:] / sigma[:-1], (50 / 0.01) ** 0.1, rtol=1e-5)


# ---------------------------------------------------------------- Discrete


def test_a_table_is_constant_outside_its_knots_and_linear_between():
    with jax.enable_x64(True):
        schedule = jdiff.discrete(jdiff.betas.linear(10))
        log_snr = lambda t: np.asarray(jitted_numbers(schedule, np.append(t, [0.0, 0.05, 1.1])))[2]  # noqa: E731
        knots = log_snr(np.arange(1, 11) / 10)
        np.testing.assert_allclose(knots[10:], knots[np.array([0, 0, 9])])
        middle = log_snr(np.arange(1.5, 10) / 10)
        np.testing.assert_allclose(middle[:9], (knots[1:10] + knots[:9]) / 2, rtol=1e-12)
        np.testing.assert_array_equal(jitted_time_of(schedule, np.array([1e3, -1e3])), [0.1, 1.0])


def test_a_table_of_one():
    schedule = jdiff.discrete([0.3])
    np.testing.assert_allclose(schedule.alpha(jnp.array([0.0, 1.0])) ** 2, 0.7, rtol=1e-6)
    assert jdiff.time_of(schedule, jnp.float32(0)) == 1


# ---------------------------------------------------------------- Shifted


@pytest.mark.parametrize("shift", [0.5, 1, 3.0])
def test_shifted_flow_in_closed_form(shift):
    """Esser et al. 2024, eq. 23: t becomes shift t / (1 + (shift - 1) t)."""
    schedule, t = jdiff.Shifted(jdiff.Flow(), shift), jnp.linspace(0.0, 1.0, 33)
    clock = shift * t / (1 + (shift - 1) * t)
    np.testing.assert_allclose(schedule.sigma(t), clock, atol=1e-6)
    np.testing.assert_allclose(schedule.alpha(t), 1 - clock, atol=1e-6)


@shiftable
@pytest.mark.parametrize("shift", [0.25, 4.0])
def test_shifting_subtracts_twice_the_log(make, shift):
    """Hoogeboom et al. 2023, eq. 6, and the path stays the same: (alpha, sigma) at equal SNR are equal."""
    with jax.enable_x64(True):
        own, shifted = make(), jdiff.Shifted(make(), shift)
        t = jnp.linspace(0.1, 0.9, 17)
        np.testing.assert_allclose(
            jdiff.log_snr(shifted, t), jdiff.log_snr(own, t) - 2 * jnp.log(shift), rtol=1e-9, atol=1e-9
        )
        where = jdiff.time_of(own, jdiff.log_snr(shifted, t))
        np.testing.assert_allclose(shifted.alpha(t), own.alpha(where), rtol=1e-9)
        np.testing.assert_allclose(shifted.sigma(t), own.sigma(where), rtol=1e-9)


def test_shifts_compose():
    with jax.enable_x64(True):
        t = jnp.linspace(0.01, 1, 9)
        twice, once = jdiff.Shifted(jdiff.Shifted(jdiff.Flow(), 2), 3), jdiff.Shifted(jdiff.Flow(), 6)
        np.testing.assert_allclose(twice.sigma(t), once.sigma(t), rtol=1e-12)
        np.testing.assert_allclose(jdiff.Shifted(jdiff.VP(), 1).alpha(t), jdiff.VP().alpha(t), rtol=1e-10)


@pytest.mark.parametrize("make", [jdiff.VE, jdiff.EDM, lambda: jdiff.discrete(jdiff.betas.linear(10))])
def test_bounded_schedules_cannot_be_shifted(make):
    with pytest.raises(ValueError, match="bounded in log-SNR"):
        jdiff.Shifted(make(), 3)


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: jdiff.VP(beta_min=-1), "beta_min must be positive"),
        (lambda: jdiff.SubVP(beta_max=0), "beta_max must be positive"),
        (lambda: jdiff.VP(5, 1), "beta_min must be below beta_max"),
        (lambda: jdiff.VE(1, 0.1), "sigma_min must be below sigma_max"),
        (lambda: jdiff.EDM(sigma_min=0), "sigma_min must be positive"),
        (lambda: jdiff.EDM(rho=-1), "rho must be positive"),
        (lambda: jdiff.VE(float("nan")), "sigma_min must be positive"),
        (lambda: jdiff.Shifted(jdiff.Flow(), 0), "shift must be positive"),
    ],
)
def test_numbers_out_of_range_are_named(make, message):
    with pytest.raises(ValueError, match=message):
        make()


# ---------------------------------------------------------------- transformations


@jax.jit
def transformed(schedule, t, value):
    """jit and vmap of the numbers and of their inverse, and the derivatives of both."""

    def derivatives(f, u):
        out, back = jax.vjp(f, schedule, u)
        return back(jax.tree.map(jnp.ones_like, out))

    plain, back = numbers(schedule, t), jdiff.time_of(schedule, value[:7])
    mapped, mapped_back = (jax.vmap(f, (None, 0))(schedule, u) for f, u in ((numbers, t), (jdiff.time_of, value[:7])))
    return plain, back, mapped, mapped_back, derivatives(numbers, t), derivatives(jdiff.time_of, value)


@everywhere
def test_jit_vmap_grad(name):
    t = np.append(inside(name, 7), np.float32(1))
    plain = numbers(SCHEDULES[name](), jnp.asarray(t))
    jitted, back, mapped, mapped_back, *gradients = transformed(switched(name), t, plain[2])
    # Written as differences of logs: one rounding in alpha is worth 1e-7 / alpha in it
    for other in (jitted, mapped):
        chex.assert_trees_all_close(other[:2], plain[:2], rtol=2e-5, atol=1e-6)
    np.testing.assert_allclose(mapped_back, back, atol=2e-6)
    np.testing.assert_allclose(back, t[:7], atol=1e-5)
    chex.assert_tree_all_finite(gradients)


SILENT = {
    "flow": jdiff.Flow(),
    "cosine": jdiff.Cosine(),
    "shifted flow": jdiff.Shifted(jdiff.Flow(), 3),
    "shifted cosine": jdiff.Shifted(jdiff.Cosine(), 3),
    "exact table": jdiff.discrete(jdiff.betas.zero_terminal_snr(jdiff.betas.linear(100)), exact=True),
    "table": jdiff.discrete(jdiff.betas.zero_terminal_snr(jdiff.betas.linear(100))),
    "user": Power(),
    "shifted user": jdiff.Shifted(Power(), 3),
}


@jax.jit
def at_the_end(schedule):
    def f(schedule, t):
        value = jdiff.log_snr(schedule, t)
        return schedule.alpha(t), schedule.sigma(t), value, jdiff.time_of(schedule, value)

    t = jnp.float32(1)
    return f(schedule, t), [differentiate(f, (0, 1))(schedule, t) for differentiate in (jax.jacrev, jax.jacfwd)]


@pytest.mark.parametrize("name", SILENT)
def test_where_alpha_is_0_everything_is_finite(name):
    values, derivatives = at_the_end(OneOf(tuple(SILENT.values()), list(SILENT).index(name)))
    chex.assert_tree_all_finite((values, derivatives))
    assert values[0] < 1e-7  # a rounding of pi/2, where the program is compiled
    np.testing.assert_allclose(values[3], 1, atol=1e-6)


def test_no_recompilation_for_other_numbers():
    traces = []

    @jax.jit
    def f(schedule, t):
        traces.append(schedule)
        return jdiff.time_of(schedule, jdiff.log_snr(schedule, t))

    for schedule in (jdiff.VP(), jdiff.VP(0.2, 10), jdiff.VP(beta_max=25)):
        f(schedule, 0.5)
    for shift in (1, 2.5):
        f(jdiff.Shifted(jdiff.Flow(), shift), 0.5)
    assert len(traces) == 2
