"""Predictor-correctors that cost one evaluation a step: UniPC and SA-Solver."""

import jax.numpy as jnp

from jdiff.core.arrays import Number, safe_divide
from jdiff.solvers.base import check_order
from jdiff.solvers.multistep import Multistep, starting
from jdiff.solvers.polynomial import DATA, NOISE, midpoint


def _bh1_data(h):
    return 0.5 * safe_divide(h, -jnp.expm1(-h))


def _bh1_noise(h):
    return 0.5 * safe_divide(h, jnp.expm1(h))


def UniPC(order: int = 2, variant: str = "bh2", prediction: str = "x0", start: str = "low_order") -> Multistep:
    """UniPC: an exponential predictor UniP and the corrector UniC with the prediction at the predicted point.

    `order` predictions are interpolated by the predictor, one more by the corrector. `variant` B(h) = h ("bh1") or
    exp(h) - 1 ("bh2") matters only where two predictions meet.  Zhao et al. 2023, arXiv:2302.04867, algorithms 5 to 8.
    Raises ValueError for an order below 1, another variant or prediction.
    """
    check_order("UniPC", order)
    rules = {"x0": DATA, "eps": NOISE}
    variants = {"bh1": {"x0": _bh1_data, "eps": _bh1_noise}, "bh2": {"x0": midpoint, "eps": midpoint}}
    if variant not in variants:
        raise ValueError(f"UniPC: unknown variant {variant!r}; one of {', '.join(variants)}")
    if prediction not in rules:
        raise ValueError(f"UniPC: unknown prediction {prediction!r}; one of {', '.join(rules)}")
    rule = rules[prediction]
    begin = starting("UniPC", start, order, rule)
    return Multistep(None, order, rule, variants[variant][prediction], order, begin)


def SASolver(order: int = 2, corrector: int = 2, tau: Number = 1.0, variant: str = "exact") -> Multistep:
    """SA-Solver: stochastic Adams methods on x_0, with noise tau; tau = 0 is the probability-flow ODE.

    Predictor of `order` predictions, corrector of `corrector` old ones and the new (0: none); fresh noise of share
    1 - exp(-2 tau^2 h). Where two predictions meet, `variant` "exact" integrates their line, "bh1" takes (1 + tau^2) h
    for 1 - exp(-(1 + tau^2) h) in its slope's weight, as published code does.
    Xue et al. 2023, arXiv:2309.05019, eq. 15 and 18. Raises ValueError for an order below 1 or another variant.
    """
    check_order("SASolver", order)
    if corrector:
        check_order("SASolver's corrector", corrector)
    variants = {"exact": None, "bh1": _bh1_data}
    if variant not in variants:
        raise ValueError(f"SASolver: unknown variant {variant!r}; one of {', '.join(variants)}")
    return Multistep(tau**2, order, DATA, variants[variant], corrector)
