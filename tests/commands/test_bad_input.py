"""What users type wrong, in configs and on command lines: one line, status 2, and nothing written."""

import dataclasses
import importlib
import inspect
import json
import math
from pathlib import Path

import chex
import jax
import jax.numpy as jnp
import numpy as np
import pytest

import jdiff
from jdiff import config as configs
from jdiff import data, optim, runs
from jdiff.config import Config, ConfigError, Named, Sample, Train, build
from jdiff.runs import plot
from jdiff.runs.draw import check_samples
from jdiff.runs.pictures import Painter
from jdiff.runs.search import parse_space
from jdiff.train import checkpoint

ROOT = Path(__file__).parents[2]
BAD = (math.nan, math.inf, -1, -1.5, 0, "x", None, (), {}, 1e30, True)
TABLE = jdiff.discrete(jdiff.betas.linear(100))
# table, what is given before the arguments, arguments that a name needs
TABLES = {
    "schedule": (configs.SCHEDULES, (), {}),
    "target": (configs.TARGETS, (), {}),
    "conditioning": (configs.CONDITIONINGS, (), {"index": {"T": 10}}),
    "levels": (configs.LEVELS, (), {"knots": {"T": 10}, "antithetic": {"T": 10}}),
    "weight": (configs.WEIGHTS, (), {}),
    "coupling": (configs.COUPLINGS, (), {}),
    "loss": (configs.LOSSES, (), {}),
    "solver": (configs.SOLVERS, (), {}),
    "grid": (configs.GRIDS, (TABLE, 5), {"sigmas": {"sigmas": (3.0, 1.0)}}),
    "ema": (
        configs.EMAS, (), {"constant": {"decay": 0.9}, "half_life": {"images": 5.0}, "power": {"sigma_rel": 0.1}},
    ),
}  # fmt: skip
NUMBERS = (-1, -1.5, 0)  # where any finite number will do
# of BAD, what an argument may be
GOOD = {
    ("index", "fractional"): (*NUMBERS, True, 1e30),
    ("uniform", "t_min"): (0, None), ("uniform", "t_max"): (None,),
    ("independent", "t_min"): (0, None), ("independent", "t_max"): (None,),
    ("log_normal", "mean"): NUMBERS, ("log_normal", "std"): (0,),
    ("logit_normal", "mean"): NUMBERS, ("logit_normal", "std"): (0,),
    ("loss_aware", "T"): (None,), ("loss_aware", "uniform"): (0,),
    ("p2", "gamma"): (0,), ("sigmoid", "bias"): NUMBERS,
    ("hybrid", "vlb"): (0,), ("hybrid", "bins"): (None,),
    ("edm_stochastic", "churn"): (0,), ("edm_stochastic", "s_min"): (0,),
    ("edm_stochastic", "s_max"): (0, math.inf, 1e30), ("edm_stochastic", "s_noise"): (0,),
    ("sa_solver", "corrector"): (0,), ("sa_solver", "tau"): NUMBERS,
    ("predictor_corrector", "snr"): (0,), ("annealed_langevin", "step_size"): (0,),
    ("gradient_estimation", "gamma"): NUMBERS,
    ("beta", "alpha"): (1e30,), ("beta", "beta"): (1e30,), ("shifted", "shift"): (1e30,),
    ("constant", "decay"): (0,), ("half_life", "images"): (1e30,), ("half_life", "ramp"): (None, 1e30),
    ("warmup", "max_decay"): (0,), ("warmup", "inv_gamma"): (1e30,), ("warmup", "power"): (1e30,),
}  # fmt: skip
GOOD |= {(name, "eta"): (0,) for name in configs.SOLVERS}
GOOD |= {(name, "lowest"): (-1, -1.5, 0) for name in ("log_snr", "exponential")}


def cases(kind):
    """(name, argument, value) of every argument in a table with every value of BAD, and the rest of its arguments."""
    table, given, needed = TABLES[kind]
    for name, make in table.items():
        parameters = list(inspect.signature(make).parameters.values())[len(given) :]
        words = [p.name for p in parameters if p.kind is not p.VAR_KEYWORD and p.name != "batch"]
        for word in words + (["start", "end"] if name == "discrete" and kind == "schedule" else []):
            for value in BAD:
                yield name, word, value, needed.get(name, {}) | {word: value}


def make(kind, name, args):
    table, given, _ = TABLES[kind]
    return build.make(kind, table, Named(name, args), *given, **({"batch": 4} if name == "half_life" else {}))


def one_line(error, *texts):
    text = str(error.value if hasattr(error, "value") else error)
    assert text and "\n" not in text and "Traceback" not in text and "<lambda>" not in text, text
    for part in texts:
        assert part in text, text


def is_good(name, word, value):
    return any(type(value) is type(good) and value == good for good in GOOD.get((name, word), ()))


@pytest.mark.parametrize("kind", TABLES)
def test_every_argument_of_every_name_is_checked(kind):
    for name, word, value, args in cases(kind):
        if is_good(name, word, value):
            continue
        with pytest.raises(ConfigError) as caught:
            pytest.fail(f"{kind} {name} took {word} = {value!r}: {make(kind, name, args)}")
        one_line(caught)
        assert name in str(caught.value) or word in str(caught.value), caught.value
    for name in TABLES[kind][0]:
        with pytest.raises(ConfigError) as caught:
            make(kind, name, {"no_such": 1})
        one_line(caught, "no_such")


@pytest.mark.parametrize(
    "kind,name,word",
    [
        ("conditioning", "index", "T"),
        ("levels", "knots", "T"),
        ("levels", "antithetic", "T"),
        ("grid", "sigmas", "sigmas"),
        ("ema", "half_life", "images"),
        ("ema", "constant", "decay"),
        ("ema", "power", "sigma_rel"),
    ],
)
def test_what_is_missing_is_named(kind, name, word):
    with pytest.raises(ConfigError) as caught:
        make(kind, name, {})
    one_line(caught, f"needs the argument {word!r}")


PROBES = {
    "conditioning": lambda o: o(jdiff.VP(), jnp.ones((9, 2)), jnp.linspace(1e-3, 1, 9)),
    "levels": lambda o: (o.at(o.init()) if name_of(o) == "LossAware" else o)(jax.random.key(0), 8, jdiff.VP()),
    "weight": lambda o: o(jdiff.VP(), jdiff.targets.Eps(), jnp.linspace(1e-3, 1, 9)),
    "solver": lambda o: o.plan(jdiff.VP(), jdiff.grid.log_snr(jdiff.VP(), 5), 5),
    "grid": lambda o: o,
    "ema": lambda o: [o(jnp.asarray(k)) for k in (0, 1, 1000)],
}


def name_of(o):
    return type(o).__name__


@pytest.mark.slow
@pytest.mark.parametrize("kind", PROBES)
def test_what_is_taken_gives_finite_numbers(kind):
    for name, word, value, args in cases(kind):
        if is_good(name, word, value):
            chex.assert_tree_all_finite(PROBES[kind](make(kind, name, args)))


@pytest.mark.parametrize("value", [math.nan, math.inf, -1.0, 1e30])
@pytest.mark.parametrize(
    "make",
    [lambda v: jdiff.solvers.DDIM(v), lambda v: jdiff.solvers.EulerMaruyama(v), lambda v: jdiff.solvers.DPMppSDE(v),
     lambda v: jdiff.solvers.EDMStochastic(v), lambda v: jdiff.solvers.Langevin(v), lambda v: jdiff.VP(v, 2e30),
     lambda v: jdiff.targets.EDM(v), lambda v: jdiff.weights.MinSNR(v), lambda v: jdiff.conditioning.LogSNR(v),
     lambda v: jdiff.levels.Knots(v), lambda v: jdiff.levels.LogNormal(0.0, v)],
)  # fmt: skip
def test_nouns_refuse_numbers_out_of_range(make, value):
    with pytest.raises(ValueError, match="must be"):
        make(value)


# ---------------------------------------------------------------- configs


def config(**changes):
    return Config(**dict(name="a", data=Named("digits"), model=Named("unet_digits"), schedule=Named("vp")) | changes)


def fields(cls, prefix):
    return [(cls, prefix, field) for field in dataclasses.fields(cls) if not dataclasses.is_dataclass(field.type)]


@pytest.mark.parametrize(
    "cls,prefix,field", [*fields(Config, ""), *fields(Train, "train."), *fields(Sample, "sample.")],
    ids=lambda v: getattr(v, "name", None),
)  # fmt: skip
def test_every_field_of_a_config_is_checked(cls, prefix, field):
    """No field takes a value of another kind than it states, nor a number that is not finite."""
    kinds = str(field.type)
    wrong = [math.nan, math.inf, -math.inf, 1e39, 10**20, {}]
    wrong += [] if "str" in kinds else ["x"]
    wrong += [] if "bool" in kinds else [True]
    wrong += [] if "None" in kinds else [None]
    wrong += [] if "tuple" in kinds else [(), [1]]
    wrong += [0.5] if "float" not in kinds else []
    for value in wrong:
        with pytest.raises(ConfigError) as caught:
            change = {field.name: value}
            made = config(**change) if cls is Config else config(**{prefix[:-1]: cls(**change)})
            pytest.fail(f"took {prefix}{field.name} = {value!r}: {made}")
        one_line(caught, prefix + field.name)


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(sample=Sample(guidance=1e30)), "sample.guidance must be within +-10,000"),
        (dict(sample=Sample(steps=10**8)), "sample.steps must be at most 1,000,000"),
        (dict(seed=10**20), "seed must be a whole number of 64 bits"),
        (dict(train=3), "train must be a Train(...), got 3"),
        (dict(schedule="vp"), "schedule must be a Named(...), got 'vp'"),
    ],
)
def test_ranges_of_a_config(change, text):
    with pytest.raises(ConfigError) as caught:
        config(**change)
    one_line(caught, text)


@pytest.mark.parametrize("name,args", [(3, {}), ("vp", None), ("vp", {1: 2}), ("vp", [])])
def test_named_takes_a_name_and_a_dict(name, args):
    with pytest.raises(ConfigError, match="Named takes a name and a dict"):
        Named(name, args)


def test_lists_are_tuples_as_they_come_back_from_json():
    made = config(model=Named("unet", {"multipliers": [1, 2]}))
    assert configs.from_json(configs.to_json(made)) == made


@pytest.mark.parametrize(
    "args,text",
    [
        ({"features": "128"}, "features must be a whole number, got '128'"),
        ({"features": 10**9}, "features must be from 0 to 1,000,000"),
        ({"features": 10**6}, "is too large: its parameters would take"),
        ({"features": -1}, "features must be from 0"),
        ({"features": 8.0}, "features must be a whole number"),
        ({"layers": True}, "layers must be a whole number"),
        ({"dropout": 2}, "dropout is a share, in [0, 1)"),
        ({"dropout": math.nan}, "dropout must be a finite number"),
        ({"label_scale": None}, "label_scale must be a number"),
    ],
)
def test_wrong_fields_of_a_network(args, text):
    points = data.Dataset("points", np.zeros((4, 2), np.float32), None, np.zeros((4, 2), np.float32), None)
    with pytest.raises(ConfigError) as caught:
        made = config(model=Named("mlp", args))
        facts, model = data.facts_of(points), configs.build_model(made, 0)
        runs.param_shapes(runs.Run(Path("no"), made, facts, model, {}, None, lambda: points))
    one_line(caught, text)


@pytest.mark.parametrize(
    "name,args,text",
    [
        ("sgd", {"momentum": ()}, "optimizer 'sgd'"),
        ("muon", {"ns_steps": 1.5}, "muon"),
        ("muon", {"preconditioning": "x"}, "preconditioning"),
        ("muon", {"adam_eps_root": -1}, "adam_eps_root must be"),
        ("muon", {"consistent_rms": -1}, "consistent_rms must be"),
        ("adam", {"b1": math.nan}, "b1 must be"),
        ("adam", {"b1": "x"}, "b1 must be"),
        ("adam", {"eps": math.inf}, "eps must be"),
        ("adamw", {"weight_decay": None}, "weight_decay"),
        ("adam", {"nesterov": 3}, "nesterov must be True or False"),
    ],
)
def test_wrong_arguments_of_an_optimizer(name, args, text):
    with pytest.raises(ConfigError) as caught:
        configs.check(config(train=Train(optimizer=Named(name, args))))
    one_line(caught, text)


def test_every_argument_of_the_learning_rate_is_checked():
    for name in optim.LR_SCHEDULES:
        for word in list(inspect.signature(optim.LR_SCHEDULES[name]).parameters)[2:]:
            for value in (math.nan, math.inf, -1, "x", None, ()):
                with pytest.raises(ConfigError) as caught:
                    configs.build_optimizer(config(train=Train(lr_schedule=Named(name, {word: value}))))
                one_line(caught, word)


@pytest.mark.parametrize("name", ["digits", "scurve", "moons", "circles", "swiss_roll", "arrays", "folder", "mnist"])
def test_every_argument_of_a_data_set_is_checked(name):
    needed = {"arrays": {"path": "/no.npy"}, "folder": {"path": "/no", "size": 4}}.get(name, {})
    for word in inspect.signature(data.DATASETS[name]).parameters:
        for value in (math.nan, math.inf, -1.5, {}, 1e39):
            with pytest.raises(ConfigError) as caught:
                configs.build_data(config(data=Named(name, needed | {word: value})))
            one_line(caught)


@pytest.mark.parametrize(
    "text,words",
    [
        (b"import sys; sys.exit(3)", ["called sys.exit(3)"]),
        (b"raise ValueError", ["failed: ValueError"]),
        (b"raise ValueError()", ["failed: ValueError"]),
        (b"raise RuntimeError('\\n\\n the first \\n the second')", ["failed: RuntimeError: the first"]),
        (b"config = (", ["failed: SyntaxError", "never closed"]),
        (b"config = '\xff\xfe'", ["failed: SyntaxError", "utf-8"]),
        (b"\x00\x01", ["failed: SyntaxError"]),
        (b"x = 1", ["exports no config; expected"]),
        (b"config = 3", ["exports no config, but 3; expected"]),
        (b"from jdiff.config import *; Train(lr=float('nan')); config = Named(3)", ["c.py: Named takes"]),
    ],
)
def test_config_files(tmp_path, text, words):
    path = tmp_path / "c.py"
    path.write_bytes(text)
    with pytest.raises(ConfigError) as caught:
        configs.load_config(path)
    one_line(caught, str(path), *words)
    assert "[" not in str(caught.value)


def test_a_directory_is_no_config_file(tmp_path):
    with pytest.raises(ConfigError) as caught:
        configs.load_config(tmp_path)
    one_line(caught, "is a directory")


# ---------------------------------------------------------------- the commands


def held(directory, made, change=lambda params: params):
    """A run directory with one checkpoint, without any training."""
    directory.mkdir()
    (directory / "config.json").write_text(configs.to_json(made))
    run = runs.open_run(directory)
    state = runs.new_state(run)
    state = dataclasses.replace(state, ema=jax.tree.map(change, state.ema), step=jnp.asarray(5, state.step.dtype))
    with checkpoint.Writer(run.checkpoints, 1) as writer:
        writer.save(state, dict(config=configs.to_dict(made), data=None))
    return directory


PLANE = config(
    name="plane", data=Named("scurve", {"n": 50}), model=Named("mlp", {"features": 8, "layers": 1}),
    train=Train(steps=5, batch=8), sample=Sample(solver=Named("ddim"), steps=2, num=4),
)  # fmt: skip
IMAGES = dataclasses.replace(
    PLANE, name="images", data=Named("digits"),
    model=Named("vit_small", {"width": 16, "depth": 1, "heads": 2}),
)  # fmt: skip


@pytest.fixture(scope="module")
def place(tmp_path_factory):
    where = tmp_path_factory.mktemp("bad")
    held(where / "plane", PLANE)
    held(where / "images", IMAGES)
    held(where / "huge", PLANE, lambda a: jnp.full_like(a, 1e37))
    return where


def refused(name, capsys, *argv):
    """The one line with which a script ends; its `main` raises what its last lines print with status 2."""
    with pytest.raises((ConfigError, checkpoint.CheckpointError)) as caught:
        importlib.import_module(f"jdiff.commands.{name}").main([str(word) for word in argv])
    assert "Traceback" not in capsys.readouterr().err
    text = str(caught.value)
    assert text and "\n" not in text, text
    return text


SEED = "--seed must be a whole number from 0"


@pytest.mark.parametrize(
    "words,text",
    [
        (["--guidance", "nan"], "sample.guidance must be a finite number"),
        (["--guidance", "inf"], "sample.guidance must be a finite number"),
        (["--guidance", "1e30"], "sample.guidance must be within"),
        (["--eta", "nan"], "eta must be a finite number"),
        (["--eta", "-1"], "eta must be 0 or more"),
        (["--solver", "edm_stochastic", "--eta", "1"], "has no argument 'eta'"),
        (["--clip", "nan"], "sample.clip must be a finite number"),
        (["--steps", "0"], "sample.steps must be positive"),
        (["--steps", str(10**10)], "sample.steps must be at most"),
        (["--num", "0"], "--num must be positive"),
        (["--num", str(10**12)], "--num must be positive, at most"),
        (["--seed", "99999999999999999999"], SEED),
        (["--seed", "-1"], SEED),
        (["--step", "77"], "no checkpoint 77"),
        (["--step", "-1"], "no checkpoint -1"),
        (["--labels", "99999999999999999999"], "is none of the classes 0 to 9"),
        (["--labels", "-1"], "is none of the classes 0 to 9"),
        (["--grid", "sigmas"], "grid 'sigmas' needs the argument 'sigmas'"),
        (["--grid", "sigmas", "--grid-args", "sigmas=3"], "sigmas must be a list, got 3"),
        (["--grid", "sigmas", "--grid-args", 'sigmas=["x"]'], "sigmas must be a list of numbers"),
        (["--grid", "sigmas", "--grid-args", "sigmas=[1,3]"], "must descend"),
        (["--grid", "karras", "--grid-args", "rho=0"], "rho must be from 0.1 to 100"),
        (["--grid-args", "spacing"], "is no setting; expected name=value"),
        (["--solver", "unipc", "--solver-args", "order=NaN"], "order must be a whole number"),
        (["--guide", "agp"], "unknown guide 'agp' (did you mean 'apg'?)"),
        (["--guide-args", "batched=3"], "batched must be True or False"),
        (["--interval", "5", "1"], "sample.interval is two noise levels, 0 <= low < high"),
        (["--interval", "1"], "sample.interval is two noise levels"),
        (["--rescale", "1.5"], "sample.rescale is a share, in [0, 1]"),
        (["--cache", "0"], "sample.cache is a number of steps, 1 or more"),
        (["--out", "/proc/no/x.png"], "cannot write /proc/no/x.png"),
        (["--out", "x.gif"], "expected a name that ends in .png or .npz"),
        (["--out", "y" * 300 + ".png"], "cannot write"),
    ],
)
def test_sampling(place, tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.chdir(tmp_path)
    assert text in refused("sample", capsys, place / "images", *words)
    assert not list(tmp_path.iterdir())


def test_samples_that_are_not_finite_are_not_written(place, tmp_path, capsys):
    for name in ("x.png", "x.npz"):
        line = refused("sample", capsys, place / "huge", "--num", 4, "--out", tmp_path / name)
        assert "4 of 4 samples are not finite: the parameters reach 1e+37; use an earlier checkpoint" in line
    assert not list(tmp_path.iterdir())
    assert "10,000 of 10,000 samples are not finite" in refused("evaluate", capsys, place / "huge")
    run = runs.open_run(place / "huge")
    _, params = runs.restore_ema(run)
    (run.directory / "samples").mkdir()
    with pytest.raises(ConfigError, match="4 of 4 samples are not finite"):
        Painter(run).picture(params, "final")
    assert not list((run.directory / "samples").iterdir())


def test_samples_of_which_some_are_not_finite_or_beyond_use_are_counted():
    good = np.zeros((5, 2), np.float32)
    check_samples(good, {"w": good})
    for value, text in ((np.nan, "1 of 5 samples are not finite"), (1e9, "1 of 5 samples are beyond 1e[+]06")):
        bad = good.copy()
        bad[3, 1] = value
        with pytest.raises(ConfigError, match=f"{text}: try guidance nearer to 1"):
            check_samples(bad, {"w": good})


@pytest.mark.parametrize(
    "words,text",
    [
        (["--num", "0"], "--num must be from 2"),
        (["--num", "1"], "--num must be from 2"),
        (["--num", "-3"], "--num must be from 2"),
        (["--num", "24"], "--num 24 is too few: the covariance of 24 features needs 25 or more"),
        (["--guidance", "1", "nan"], "sample.guidance must be a finite number"),
        (["--seed", "99999999999999999999"], SEED),
        (["--seed", "-1"], SEED),
        (["--judge", "x.txt"], "--judge x.txt: expected the name of a ResNet's file, NAME.npz"),
        (["--judge", "/proc/no/x.npz"], "cannot write /proc/no/x.npz"),
    ],
)
def test_measuring(place, tmp_path, monkeypatch, capsys, words, text):
    monkeypatch.chdir(tmp_path)
    assert text in refused("evaluate", capsys, place / "images", *words)
    assert not list(tmp_path.iterdir())


def test_held_out_images_are_drawn_from_all_classes(place, capsys, monkeypatch):
    """On a set that is sorted by class, the pixels compared are those of all classes, and of no row twice."""
    evaluate, digits = importlib.import_module("jdiff.commands.evaluate"), data.digits()
    order = np.argsort(digits.held_labels, kind="stable")
    held_x, held_labels = digits.held_x[order], digits.held_labels[order]
    ordered = dataclasses.replace(digits, held_x=held_x, held_labels=held_labels)
    monkeypatch.setattr(configs, "build_data", lambda _: ordered)
    compared = []

    def nearest(a, b):
        compared.append(a)
        return np.ones(len(a))

    monkeypatch.setattr(evaluate.metrics, "nearest_distance", nearest)
    monkeypatch.setattr(
        runs, "draw", lambda run, params, key, num, how, progress: (np.zeros((num, 8, 8, 1)), np.zeros(num))
    )
    pixels = evaluate.flat(digits.to_model(held_x))
    for num, seed in ((40, 1), (40, 2), (1000, 1)):
        evaluate.main([str(place / "images"), "--num", str(num), "--guidance", "1", "--seed", str(seed)])
    first, other, whole = compared[::2]
    for rows in (first, other):
        found = {held_labels[np.flatnonzero((pixels == row).all(1))[0]] for row in rows}
        assert len(rows) == 40 and len(found) >= 8
    assert not np.array_equal(first, other)
    np.testing.assert_array_equal(np.sort(whole, 0), np.sort(pixels, 0))


def test_the_figure_of_a_plane_shows_points_of_the_whole_set(tmp_path, monkeypatch):
    from matplotlib.axes import Axes

    shown = []
    monkeypatch.setattr(Axes, "scatter", lambda self, x, y, **how: shown.append(np.stack([x, y], 1)))
    monkeypatch.setattr(plot, "write", lambda path, save: None)
    points = np.sort(np.random.default_rng(0).normal(size=(9000, 2)), 0)
    plot.plane_figure(tmp_path / "x.png", [(0.0, points)], [(0.0, points[:10])])
    assert len(shown[0]) == 3000 and len(np.unique(shown[0][:, 0])) == 3000
    assert abs(shown[0].mean()) < 0.1  # the first 3,000 are all below -0.4
    np.testing.assert_array_equal(np.sort(shown[1], 0), points[:10])


def test_training(tmp_path, capsys):
    train, path = importlib.import_module("jdiff.commands.train"), tmp_path / "c.py"
    assert "jdiff train CONFIG" in refused("train", capsys)
    with pytest.raises(SystemExit) as caught:
        train.main(["--help"])
    assert caught.value.code == 0 and "usage: jdiff train" in capsys.readouterr().out
    path.write_text(
        "from jdiff.config import *\n"
        "config = Config(name='a', data=Named('scurve', {'n': 500}), model=Named('mlp'), schedule=Named('vp'))"
    )
    for words, text in (
        (["--seed", "99999999999999999999"], "seed must be a whole number of 64 bits"),
        (["--train.lr", "nan"], "train.lr must be a finite number"),
        (["--train.lr", "1e39"], "train.lr must be a finite number"),
        (["--sample.guidance", "1e30"], "sample.guidance must be within"),
        (["--model.args.features", '"128"'], "features must be a whole number, got '128'"),
        (["--model.args.features", "1000000000"], "features must be from 0 to 1,000,000"),
        (["--model.args.dropout", "2"], "dropout is a share"),
        (["--sample.solver.args.eta", "nan", "--sample.solver.name", "ddim"], "eta must be a finite number"),
        (["--sample.grid.name", "sigmas"], "needs the argument 'sigmas'"),
        (["--schedule.args.beta_min"], "--schedule.args.beta_min needs a value"),
        (["--schedule.args.beta_mim", "1"], "has no argument 'beta_mim' (did you mean 'beta_min'?)"),
        (["--schedule.args.1", "1"], "names no argument"),
        (["--until", "-1"], "--until must be 0 or more, got -1"),
        (["--rum-dir", "x"], "unknown setting --rum-dir (did you mean '--run-dir'?)"),
    ):
        assert text in refused("train", capsys, path, "--run-dir", tmp_path / "run", *words)
    assert not (tmp_path / "run").exists()


def test_sweeping(tmp_path, monkeypatch, capsys):
    pytest.importorskip("optuna")
    monkeypatch.chdir(tmp_path)
    path = tmp_path / "c.py"
    path.write_text("import sys; sys.exit(3)")
    lr = ["--param", "train.lr=1e-4:1e-2"]
    assert SEED in refused("sweep", capsys, path, *lr, "--seed", "-1")
    assert "called sys.exit(3)" in refused("sweep", capsys, path, *lr)
    path = ROOT / "configs" / "scurve.py"
    assert "cannot write /proc/no" in refused("sweep", capsys, path, *lr, "--out", "/proc/no")
    made = configs.load_config(path)
    assert parse_space(["weight.args.new=1:2"], made)["weight.args.new"].whole  # the config lacks it
    assert "no setting 'levels.argz.T'" in refused("sweep", capsys, path, "--param", "levels.argz.T=1,2")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "sweep.db").write_bytes(b"no database" * 100)
    assert "cannot read out/sweep.db" in refused("sweep", capsys, path, *lr, "--out", "out")


def test_what_a_script_prints(capsys):
    for error, text in (
        (ConfigError("two\nlines"), "error: two lines\n"),
        (MemoryError(), "error: not enough memory: MemoryError\n"),
        (OSError(), "error: OSError\n"),
    ):
        with pytest.raises(SystemExit) as caught:
            configs.fail(error)
        assert caught.value.code == 2 and capsys.readouterr().err == text


def test_a_run_of_an_earlier_version_with_a_negative_seed_opens(tmp_path):
    text = json.loads(configs.to_json(PLANE)) | {"seed": -1}
    assert configs.from_json(json.dumps(text)).seed == -1
