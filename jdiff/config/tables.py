"""What the names in a config stand for, one table for each kind of name.

A function's first parameters may be what the run gives; the others are the arguments of a config.
"""

import dataclasses
import functools
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from jdiff import guidance, losses, solvers
from jdiff.config.schema import ConfigError, Named, check_kinds, first_line
from jdiff.core import names
from jdiff.core.checks import LARGEST
from jdiff.data import DATASETS, DataError
from jdiff.denoisers import conditioning, targets
from jdiff.losses import coupling, levels, weights
from jdiff.models import MODELS, model_arguments
from jdiff.process import betas, grid, schedules
from jdiff.process.table import Discrete
from jdiff.process.times import LOWEST_LOG_SNR
from jdiff.train import ema, optim

# ---------------------------------------------------------------- from a name to what it stands for


def make(kind: str, table: dict, choice: Named, *given, **fixed):
    """Call what a name stands for.

    Args:
        kind: what the names of the table name, for the messages, as "solver".
        table: what each name stands for: a function of its arguments.
        choice: the name, and the arguments that the config gives.
        given: the first arguments of the function, which a config does not give.
        fixed: other arguments that a config does not give.

    Returns:
        `table[choice.name](*given, **choice.args, **fixed)`.

    Raises:
        ConfigError: the name or an argument is unknown, an argument is missing, of the wrong kind or out of range.
    """
    what = f"{kind} {choice.name!r}"
    try:
        function = names.choose(kind, choice.name, table)
        parameters = parameters_of(function)
        names.check_arguments(what, function, choice.args, [*list(parameters)[: len(given)], *fixed])
    except ValueError as error:
        raise ConfigError(str(error)) from error
    check_kinds(what, choice.args, parameters)
    try:
        return function(*given, **choice.args, **fixed)
    except ConfigError:
        raise
    except DataError as error:  # its text names the set already
        raise ConfigError(str(error)) from error
    except (TypeError, ValueError, ArithmeticError, MemoryError) as error:
        raise ConfigError(f"{what}: {first_line(error)}") from error


def parameters_of(function: Callable) -> dict:
    """{name: (annotation, default)} of a function's parameters."""
    return {name: (p.annotation, p.default) for name, p in inspect.signature(function).parameters.items()}


# ---------------------------------------------------------------- functions that need more than their name


def _discrete(table: str = "linear", T: int = 1000, **args):
    """A table of T betas, as of DDPM; its other arguments are those of the beta table."""
    return betas.discrete(make("beta table", BETAS, Named(table, dict(args, T=T))))


def _denoising():
    """The denoising regression."""
    return losses.denoising


def _hybrid(vlb: float = 1e-3, bins: int | None = 256):
    """The regression with learned variances: `vlb` times the variational bound of uint8 data of `bins` values."""
    if not 0 <= vlb <= LARGEST or (bins is not None and bins < 2):
        raise ValueError(f"vlb must be 0 or more, at most {LARGEST:g}, and bins 2 or more; got {vlb} and {bins}")
    return functools.partial(losses.hybrid, vlb=vlb, bins=bins)


def _uncertain():
    """The regression weighted by an uncertainty that the network learns, as in EDM2."""
    return losses.uncertain


def _predictor_corrector(eta: float = 1.0, snr: float = 0.16, steps: int = 1):
    """Euler-Maruyama steps, each followed by `steps` of Langevin dynamics at its time."""
    return solvers.PredictorCorrector(solvers.EulerMaruyama(eta), solvers.Langevin(snr, steps))


def _restart(low: float = 0.06, high: float = 0.3, rounds: int = 2, steps: int = 4):
    """Heun's method that goes back from sigma/alpha `low` to `high`, `rounds` times, and down again in `steps`."""
    return solvers.Restart(solvers.Heun(), low, high, rounds, steps)


def _autoguidance(conditional, worse, w, run: str, step: int | None = None):
    """Away from a worse model of the same data: that of the run directory `run`, at `step` or its newest checkpoint."""
    return guidance.autoguidance(conditional, worse, w)


def _perturbed(conditional, worse, w, at: tuple | str | int):
    """Away from the same network without attention in the parts `at`: stages of a UNet, numbers of a DiT's blocks."""
    return guidance.autoguidance(conditional, worse, w)


def _skipped(conditional, worse, w, at: tuple | str | int):
    """Away from the same network without the parts `at`: stages of a UNet, numbers of a DiT's blocks."""
    return guidance.autoguidance(conditional, worse, w)


# ---------------------------------------------------------------- grids of n times on a schedule


def _uniform(schedule, n):
    """Times evenly spaced in t."""
    return grid.uniform(n, schedule.t_min, schedule.t_max)


def _log_snr(schedule, n, lowest: float = LOWEST_LOG_SNR):
    """Times evenly spaced in log-SNR, the first at log-SNR `lowest` or above."""
    return grid.log_snr(schedule, n, lowest=lowest)


def _karras(schedule, n, rho: float = 7.0):
    """Times evenly spaced in (sigma/alpha)^(1/rho), as in EDM."""
    return grid.karras(schedule, n, _rho(rho))


def _exponential(schedule, n, lowest: float = LOWEST_LOG_SNR):
    """Times evenly spaced in log(sigma/alpha), as in k-diffusion."""
    return grid.exponential(schedule, n, lowest=lowest)


def _polyexponential(schedule, n, rho: float = 1.0):
    """As `exponential`, on a ramp to the power of rho."""
    return grid.polyexponential(schedule, n, _rho(rho))


def _beta(schedule, n, alpha: float = 0.6, beta: float = 0.6):
    """Times at the quantiles of a beta distribution."""
    return grid.beta(schedule, n, alpha, beta)


def _shifted(schedule, n, shift: float = 3.0):
    """Uniform times moved towards the noise, as for large images in flow matching."""
    return grid.shift(grid.uniform(n, schedule.t_min, schedule.t_max), shift)


def _sigmas(schedule, n, sigmas: tuple):
    """Times at the values of sigma/alpha that are listed, interpolated to n."""
    if not all(type(sigma) in (int, float) for sigma in sigmas):
        raise ValueError(f"sigmas must be a list of numbers, got {sigmas}")
    return grid.of_sigmas(schedule, sigmas, n)


def _knots(schedule, n, spacing: str = "leading"):
    """Knots of a table, spaced as in diffusers: leading, trailing or linspace."""
    return grid.discrete(table_length(schedule), n, spacing)


def _rho(rho: float) -> float:
    if not 0.1 <= rho <= 100:
        raise ValueError(f"rho must be from 0.1 to 100, got {rho}")
    return rho


def table_length(schedule) -> int:
    """The number of knots of a discrete schedule. Raises ConfigError for another one."""
    if not isinstance(schedule, Discrete):
        raise ConfigError("grid 'discrete' picks knots of a table, and needs schedule 'discrete'; use 'log_snr'")
    return schedule.log_nsr.shape[0]


# ---------------------------------------------------------------- the tables

BETAS = {
    "linear": betas.linear, "scaled_linear": betas.scaled_linear, "cosine": betas.cosine, "sigmoid": betas.sigmoid,
}  # fmt: skip
SCHEDULES = {
    "vp": schedules.VP, "subvp": schedules.SubVP, "ve": schedules.VE, "edm": schedules.EDM,
    "cosine": schedules.Cosine, "flow": schedules.Flow, "discrete": _discrete,
}  # fmt: skip
TARGETS = {
    "x0": targets.X0, "eps": targets.Eps, "score": targets.Score, "v": targets.V, "velocity": targets.Velocity,
    "edm": targets.EDM,
}  # fmt: skip
CONDITIONINGS = {
    "log_snr": conditioning.LogSNR, "edm": conditioning.EDM, "index": conditioning.Index,
    "continuous": conditioning.Continuous, "sigma": conditioning.Sigma,
}  # fmt: skip
LEVELS = {
    "uniform": levels.Uniform, "knots": levels.Knots, "antithetic": levels.Antithetic,
    "log_normal": levels.LogNormal, "logit_normal": levels.LogitNormal, "independent": levels.Independent,
    "loss_aware": levels.LossAware,
}  # fmt: skip
WEIGHTS = {
    "flat": weights.Flat, "simple": weights.Simple, "edm": weights.EDM, "min_snr": weights.MinSNR, "p2": weights.P2,
    "sigmoid": weights.Sigmoid, "likelihood": weights.Likelihood,
}  # fmt: skip
ON_KNOTS = ("knots", "antithetic", "loss_aware")
COUPLINGS = {"independent": coupling.Independent, "nearest": coupling.Nearest, "assignment": coupling.Assignment}
LOSSES = {"denoising": _denoising, "hybrid": _hybrid, "uncertain": _uncertain}
SOLVERS = {
    "ddpm": solvers.DDPM, "ddim": solvers.DDIM, "euler": solvers.Euler, "euler_ancestral": solvers.EulerAncestral,
    "heun": solvers.Heun, "rk4": solvers.RK4, "edm_stochastic": solvers.EDMStochastic, "dpm2": solvers.DPM2,
    "dpm2_ancestral": solvers.DPM2Ancestral, "lms": solvers.LMS, "pndm": solvers.PNDM, "ipndm": solvers.IPNDM,
    "deis": solvers.DEIS, "exponential_ab": solvers.ExponentialAB, "dpm_solver": solvers.DPMSolver,
    "dpm_solver_m": solvers.DPMSolverM, "dpmpp_2s": solvers.DPMpp2S, "dpmpp_2s_ancestral": solvers.DPMpp2SAncestral,
    "dpmpp_2m": solvers.DPMpp2M, "dpmpp_3m": solvers.DPMpp3M, "dpmpp_sde": solvers.DPMppSDE,
    "dpmpp_2m_sde": solvers.DPMpp2MSDE, "dpmpp_3m_sde": solvers.DPMpp3MSDE, "unipc": solvers.UniPC,
    "sa_solver": solvers.SASolver, "euler_maruyama": solvers.EulerMaruyama,
    "predictor_corrector": _predictor_corrector,
    "annealed_langevin": solvers.AnnealedLangevin, "gradient_estimation": solvers.GradientEstimation,
    "restart": _restart,
}  # fmt: skip
EMAS = {"constant": ema.constant, "half_life": ema.half_life, "warmup": ema.warmup, "power": ema.power}
GRIDS = {
    "uniform": _uniform, "log_snr": _log_snr, "karras": _karras, "exponential": _exponential,
    "polyexponential": _polyexponential, "beta": _beta, "shifted": _shifted, "sigmas": _sigmas, "discrete": _knots,
}  # fmt: skip
GUIDES = {
    "cfg": guidance.cfg, "apg": guidance.apg, "cfg_pp": guidance.cfg_pp, "tcfg": guidance.tcfg,
    "zero_star": guidance.zero_star, "autoguidance": _autoguidance, "perturbed": _perturbed, "skipped": _skipped,
}  # fmt: skip

# ---------------------------------------------------------------- all tables


REQUIRED = "REQUIRED"  # what stands for the default of an argument that has none


@dataclasses.dataclass(frozen=True)
class Choice:
    """What some fields of a config choose among.

    Args:
        kind: what one of the names names, as "solver".
        table: what each name stands for.
        fields: the dotted names of the fields.
        given: the parameters that the run gives, which are no arguments of a config.
    """

    kind: str
    table: Mapping[str, Any]
    fields: tuple[str, ...]
    given: tuple[str, ...] = ()


CHOICES: dict[str, Choice] = {
    "datasets": Choice("data set", DATASETS, ("data",)),
    "models": Choice("model", MODELS, ("model",)),
    "schedules": Choice("schedule", SCHEDULES, ("schedule",)),
    "betas": Choice("beta table", BETAS, (), ("T",)),
    "targets": Choice("target", TARGETS, ("target",)),
    "conditionings": Choice("conditioning", CONDITIONINGS, ("conditioning",)),
    "levels": Choice("levels", LEVELS, ("levels",)),
    "weights": Choice("weight", WEIGHTS, ("weight",)),
    "losses": Choice("loss", LOSSES, ("loss",)),
    "couplings": Choice("coupling", COUPLINGS, ("coupling",)),
    "optimizers": Choice("optimizer", optim.OPTIMIZERS, ("train.optimizer",), optim.GIVEN),
    "lr_schedules": Choice("learning-rate schedule", optim.LR_SCHEDULES, ("train.lr_schedule",), ("lr", "steps")),
    "averages": Choice("ema", EMAS, ("train.ema",), ("batch",)),
    "solvers": Choice("solver", SOLVERS, ("sample.solver",)),
    "grids": Choice("grid", GRIDS, ("sample.grid",), ("schedule", "n")),
    "guides": Choice("guide", GUIDES, ("sample.guide",), ("conditional", "unconditional", "worse", "w", "target")),
}


def all_arguments(field: str, choice: Named) -> Named:
    """A value of a field with every argument that its name takes, those that it leaves out at their defaults."""
    table = next((table for table in CHOICES.values() if field in table.fields), None)
    if table is None or choice.name not in table.table:
        return choice
    found = {name: written(default) for name, default in arguments(table, choice.name).items()}
    return Named(choice.name, found | choice.args)


def written(default) -> Any:
    """A default as the command line shows it: plain values as they are, functions and dtypes by their names."""
    if default is inspect.Parameter.empty:
        return REQUIRED
    if isinstance(default, (tuple, list)):
        return tuple(map(written, default))
    plain = default is None or isinstance(default, (bool, int, float, str, dict))
    return default if plain else getattr(default, "__name__", str(default))


def arguments(choice: Choice, name: str) -> dict[str, Any]:
    """The arguments of a name in a config, {argument: default}; `inspect.Parameter.empty` where there is no default.

    Raises:
        ValueError: the name is unknown.
    """
    make = names.choose(choice.kind, name, choice.table)
    if choice.kind == "model":
        return model_arguments(name)
    parameters = inspect.signature(make).parameters.values()
    return {p.name: p.default for p in parameters if p.name not in choice.given and p.kind is not p.VAR_KEYWORD}
