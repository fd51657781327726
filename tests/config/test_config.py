"""Configs: reloadable, checked, overridable."""

import dataclasses
import inspect
import os

import pytest

from jdiff import config as configs
from jdiff.config import Config, ConfigError, Named, Train


def make(**changes):
    return Config(**dict(name="a", data=Named("digits"), model=Named("unet_digits"), schedule=Named("vp")) | changes)


def test_json_round_trip():
    config = make(model=Named("unet", {"multipliers": (1, 2), "channels": 8}), train=Train(clip=None, steps=7))
    assert configs.from_json(configs.to_json(config)) == config
    for text in ("{", "[]", '{"name": "a"}', configs.to_json(config).replace('"steps": 7', '"steps": "seven"')):
        with pytest.raises(ConfigError, match="not a config of this version"):
            configs.from_json(text)


def test_parse_and_differences():
    old = make(schedule=Named("discrete", {"T": 10}))
    new = configs.parse(Config, ["--train.steps", "5", "--schedule.args.T", "20", "--train.clip", "None"], old)
    assert configs.differences(old, new) == ["schedule.args.T", "train.steps", "train.clip"]
    assert configs.differences(old, new, ignore=("train", "schedule.args.T")) == []
    switched = configs.parse(Config, ["--schedule.name", "vp"], old)
    assert switched.schedule == Named("vp")  # the table's length is no argument of vp


# each field with what a config may have there, and what else may be typed: other names, the same name, no name
TYPED = {
    "data": (Named("digits", {"held_out": 0.2}), Named("scurve", {"n": 500, "noise": 0.1})),
    "model": (Named("unet", {"multipliers": (1, 2), "channels": 8, "project": True}), Named("mlp", {"features": 16})),
    "schedule": (Named("discrete", {"T": 1000, "table": "cosine"}), Named("vp", {"beta_min": 0.1})),
    "target": (Named("eps"), Named("edm", {"sigma_data": 0.5})),
    "conditioning": (Named("index", {"T": 1000}), Named("continuous", {"scale": 999.0})),
    "levels": (Named("knots", {"T": 1000}), Named("antithetic", {"T": 1000})),
    "weight": (Named("min_snr", {"gamma": 5.0}), Named("p2", {"gamma": 5.0, "k": 1.0})),
    "loss": (Named("denoising"), Named("hybrid", {"vlb": 0.001, "bins": 256})),
    "coupling": (Named("independent"), Named("nearest", {"candidates": 4})),
    "train.optimizer": (Named("adam", {"b1": 0.9, "nesterov": True}), Named("adamw", {"b1": 0.9, "weight_decay": 0.1})),
    "train.lr_schedule": (Named("cosine", {"end": 0.1}), Named("inverse_sqrt", {"reference": 100})),
    "train.ema": (Named("half_life", {"images": 500.0}), Named("half_life", {"images": 500.0, "ramp": None})),
    "sample.solver": (Named("unipc", {"order": 3, "variant": "bh1"}), Named("lms", {"order": 3})),
    "sample.grid": (Named("karras", {"rho": 7.0}), Named("sigmas", {"sigmas": (3.0, 1.0)})),
    "sample.guide": (Named("apg", {"momentum": -0.5}), Named("perturbed", {"at": (1, 2)})),
}


def replaced(config, field, value):
    """The config with the field of that dotted name replaced."""
    first, _, rest = field.partition(".")
    part = dataclasses.replace(getattr(config, first), **{rest: value}) if rest else value
    return dataclasses.replace(config, **{first: part})


def words_of(value) -> list[str]:
    """A value as it is typed."""
    return [str(v) for v in value] if isinstance(value, tuple) else [str(value)]


def typed(field, named, style) -> list[str]:
    """The words for a name and its arguments: in which order, joined by = or not, with - or _."""
    option = f"--{field}" if "_" in style else f"--{field}".replace("_", "-")
    name = [f"{option}.name={named.name}"] if "=" in style else [f"{option}.name", named.name]
    args = []
    for key, value in named.args.items():
        words = words_of(value)
        joined = "=" in style and len(words) == 1
        args += [f"{option}.args.{key}={words[0]}"] if joined else [f"{option}.args.{key}", *words]
    return {"name first": name + args, "args first": args + name, "args alone": args}[style.strip("=_")]


@pytest.mark.parametrize("style", ["name first", "args first", "name first=", "args first=_", "args alone"])
def test_what_is_typed_arrives_and_what_is_not_typed_goes_with_its_name(style):
    """The name and all arguments typed, however they are, whether or not the config had them; and only they."""
    olds, news = ({field: pair[i] for field, pair in TYPED.items()} for i in (0, 1))
    names_alone = {field: Named(new.name) for field, new in news.items()}
    assert {name.removesuffix(".name") for name in configs.flat(make()) if name.endswith(".name")} == set(TYPED)
    for befores, choices in ((olds, news), (olds, names_alone), (news, olds), (olds, olds), (names_alone, news)):
        base, expected, argv = make(), make(), []
        for field, old in befores.items():
            choice = Named(old.name, choices[field].args) if style == "args alone" else choices[field]
            merged = old.args | choice.args if choice.name == old.name else choice.args
            base = replaced(base, field, old)
            expected = replaced(expected, field, Named(choice.name, merged))
            argv += typed(field, choice, style)
        assert configs.parse(Config, argv, base) == expected


@pytest.mark.parametrize(
    "words,change",
    [
        (["--model.args.multipliers", "4"], {"multipliers": (4,)}),
        (["--model.args.multipliers", "[1,2,4]"], {"multipliers": (1, 2, 4)}),
        (["--model.args.no-project"], {"project": False}),
        (["--model.args.project"], {}),
        (["--model.args.project", "False"], {"project": False}),
        (["--model.args.norm", "12"], {"norm": "12"}),
        (["--model.args.new", "-1.5"], {"new": -1.5}),
        (["--model.args.new", ".5"], {"new": 0.5}),
        (["--model.args.new", "None"], {"new": None}),
        (["--model.args.new", "a", "b"], {"new": ("a", "b")}),
        (["--model.args.channels", "4", "--model.args.channels=16"], {"channels": 16}),
        (["--model.name", "mlp", "--model.name", "unet"], {}),
    ],
)
def test_how_arguments_are_read(words, change):
    args = {"multipliers": (1, 2), "channels": 8, "project": True, "norm": "rms"}
    assert configs.parse(Config, words, make(model=Named("unet", args))).model == Named("unet", args | change)


def test_every_name_builds():
    for table, build in (
        ("target", "TARGETS"), ("conditioning", "CONDITIONINGS"), ("levels", "LEVELS"), ("weight", "WEIGHTS"),
        ("schedule", "SCHEDULES"),
    ):  # fmt: skip
        for name in getattr(configs, build):
            args = {"T": 10} if name in ("index", "knots", "antithetic") else {}
            configs.check(make(**{table: Named(name, args)}))
    for name in configs.SOLVERS:
        configs.check(make(sample=configs.Sample(solver=Named(name))))


@dataclasses.dataclass(frozen=True)
class Sampler:
    """Options of a command whose settings are those of sampling."""

    run_dir: str
    """A run."""


def sampling(*words):
    """How the command line `RUN *words` samples, where the run has a solver and a grid with arguments."""
    old = configs.Sample(solver=Named("ddim", {"eta": 0.5}), grid=Named("karras", {"rho": 5.0}), steps=9)
    short = {"solver": "solver.name", "eta": "solver.args.eta", "solver_args": "solver.args", "steps": "steps"}
    _, sample = configs.parse_with_settings(Sampler, ["run", *words], lambda path: old, first="a run", short=short)
    return sample


@pytest.mark.parametrize(
    "short,long",
    [
        ((), ()),
        (("--steps", "3", "--eta=0"), ("--steps=3", "--solver.args.eta", "0")),
        (("--solver", "heun"), ("--solver.name", "heun")),
        (
            ("--solver-args", "order=3", "start=single_step", "--solver", "unipc", "--steps=4"),
            ("--solver.name=unipc", "--solver.args.order", "3", "--solver.args.start", "single_step", "--steps", "4"),
        ),
        (("--solver_args=order=2", "--solver=unipc"), ("--solver.name", "unipc", "--solver.args.order=2")),
    ],
)
def test_short_options_are_those_that_they_stand_for(short, long):
    assert sampling(*short) == sampling(*long)
    assert (sampling(*short).grid, bool(short)) == (Named("karras", {"rho": 5.0}), sampling(*short) != sampling())


def test_short_options_that_say_nothing():
    for words, text in (
        (["--solver-args", "order"], "--solver-args: 'order' is no setting; expected name=value, as order=3"),
        (["--solver-args", "=3"], "'=3' is no setting"),
        (["--stpes", "3"], r"unknown setting --stpes \(did you mean '--steps'\?\)"),
        (["--sovler", "heun"], r"unknown setting --sovler \(did you mean '--solver'\?\)"),
        (["--eta"], "--solver.args.eta needs a value"),
        (["--solver-args", "--steps", "3"], "--solver-args needs settings, name=value"),
    ):
        with pytest.raises(ConfigError, match=text):
            sampling(*words)


def test_help_lists_every_argument_that_a_name_takes(tmp_path, capsys):
    """Whether or not the config mentions it; and what is listed can be set."""
    for words, listed in (
        ([], ["--model.args.dtype", "--model.args.multipliers", "--sample.grid.args.lowest", "--data.args.seed"]),
        (["--sample.solver.name", "unipc"], ["--sample.solver.args.order", "--sample.solver.args.variant"]),
        (["--train.optimizer.name", "lion"], ["--train.optimizer.args.b2", "--train.ema.args.ramp"]),
    ):
        with pytest.raises(SystemExit):
            configs.parse_with_config(Options, ["digits", *words, "--help"])
        shown = capsys.readouterr().out
        assert all(option in shown for option in listed), shown
    words = ["--model.args.dtype", "bfloat16", "--sample.grid.args.lowest", "-8", "--data.args.seed", "3"]
    _, config = configs.parse_with_config(Options, ["digits", *words])
    assert configs.build_model(config, 10).dtype == "bfloat16"
    words = ["--model.name", "unet", "--model.args.attention", "1", "--schedule.args.T", "50"]
    _, other = configs.parse_with_config(Options, ["digits", *words])  # a list is one with a single word too
    assert (other.model, other.schedule.args["T"]) == (Named("unet", {"attention": (1,)}), 50)
    assert (config.sample.grid, config.data.args["seed"]) == (Named("log_snr", {"lowest": -8}), 3)


def test_every_name_lists_its_arguments():
    """What `jdiff info` and --help show for a name is what the name takes, and a default that it shows can be given."""
    for choice in configs.CHOICES.values():
        for name in choice.table:
            found = configs.arguments(choice, name)
            assert not set(found) & set(choice.given)
            if choice.kind not in ("model", "data set", "optimizer"):
                given = {argument: 3 for argument, default in found.items() if default is inspect.Parameter.empty}
                assert not given.keys() - {"T", "decay", "images", "sigma_rel", "reference", "sigmas", "run", "at"}
    assert configs.arguments(configs.CHOICES["solvers"], "ddim") == {"eta": 0.0}
    assert configs.arguments(configs.CHOICES["grids"], "karras") == {"rho": 7.0}
    assert configs.arguments(configs.CHOICES["models"], "unet_digits")["num_classes"] == 10


@pytest.mark.parametrize(
    "change,text",
    [
        (dict(schedule=Named("vpp")), r"unknown schedule 'vpp' \(did you mean 'vp'\?\); one of vp, subvp"),
        (dict(schedule=Named("vp", {"beta_mim": 1.0})), r"'vp' has no argument 'beta_mim' \(did you mean 'beta_min'"),
        (dict(schedule=Named("vp", {"beta_min": 30.0})), "beta_min must be below beta_max"),
        (dict(schedule=Named("discrete", {"table": "quadratic"})), "unknown beta table"),
        (dict(model=Named("unett")), "unknown model"),
        (dict(data=Named("digit")), "unknown data set"),
        (dict(train=Train(optimizer=Named("adma"))), "unknown optimizer"),
        (dict(train=Train(ema=Named("constant", {"decay": 2.0}))), "decay must be in"),
        (dict(sample=configs.Sample(grid=Named("discrete"))), "needs schedule 'discrete'"),
        (dict(sample=configs.Sample(solver=Named("ddim", {"churn": 40}))), "solver 'ddim' has no argument 'churn'"),
        (dict(sample=configs.Sample(solver=Named("lms", {"order": 0}))), "solver 'lms': LMS: order must be a whole"),
        (dict(sample=configs.Sample(solver=Named("unipc", {"variant": "bh3"}))), "one of bh1, bh2"),
    ],
)
def test_wrong_names_and_numbers(change, text):
    with pytest.raises(ConfigError, match=text) as caught:
        configs.check(make(**change))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("field", ["steps", "batch", "visit", "save_every", "keep", "lr", "threads"])
def test_numbers_must_be_positive(field):
    with pytest.raises(ConfigError, match=f"train.{field} must be positive"):
        make(train=Train(**{field: 0}))


def test_threads_leave_the_environment_alone_unless_asked(monkeypatch):
    monkeypatch.setenv("NPROC", "outer")  # so that it is restored
    monkeypatch.delenv("NPROC")
    configs.limit_threads(make())
    assert "NPROC" not in os.environ
    for threads in (2, 1):  # the first stays
        configs.limit_threads(make(train=Train(threads=threads)))
        assert os.environ["NPROC"] == "2"


def test_configs_by_name(tmp_path, monkeypatch):
    """A name is a config of the package; a path is a file; a file of the name in the way changes nothing."""
    digits = configs.load_config("digits")
    assert digits == configs.load_config(configs.config_files()["digits"]) and digits.name == "digits"
    monkeypatch.chdir(tmp_path)
    (tmp_path / "digits").mkdir()
    assert configs.load_config("digits") == digits
    for name, text in (
        ("digts", r"no config 'digts' \(did you mean 'digits'\?\); one of .*scurve, or the path of a Python file"),
        ("./digits", "is a directory"),
        ("digits.py", "no config file digits.py"),
    ):
        with pytest.raises(ConfigError, match=text):
            configs.load_config(name)


def test_load_config(tmp_path):
    for text, message in (("x = 1", "exports no config"), ("1/0", "ZeroDivisionError"), ("config = 3", "no config")):
        path = tmp_path / "c.py"
        path.write_text(text)
        with pytest.raises(ConfigError, match=message):
            configs.load_config(path)


@dataclasses.dataclass(frozen=True)
class Options:
    """Options of a script beside those of its config."""

    config: str
    """A config file."""
    run_dir: str | None = None
    """Where to."""
    fast: bool = False
    """Whether in haste."""


def test_options_and_settings_on_one_command_line(tmp_path, capsys):
    path = tmp_path / "a.py"
    path.write_text(
        "from jdiff.config import Config, Named\n"
        "config = Config('a', data=Named('mnist'), model=Named('unet', {'channels': 8}), schedule=Named('vp'))"
    )
    words = [str(path), "--data.args.data-dir", "/d", "--run-dir=x", "--train.steps", "7", "--fast", "--seed", "3",
             "--schedule.name", "ve", "--schedule.args.sigma_max", "9"]  # fmt: skip
    options, config = configs.parse_with_config(Options, words)
    assert options == Options(str(path), "x", True)
    assert config == dataclasses.replace(
        configs.load_config(path), data=Named("mnist", {"data_dir": "/d"}), train=Train(steps=7), seed=3,
        schedule=Named("ve", {"sigma_max": 9}),
    )  # fmt: skip
    assert configs.parse_with_config(Options, [str(path)]) == (Options(str(path)), configs.load_config(path))
    for words, said in (
        ([], "the first word must be a config file, or the name of a config of jdiff: SCRIPT CONFIG"),
        (["--seed", "3"], "the first word must be a config file"),
        ([str(path), "--fats"], r"unknown setting --fats \(did you mean '--fast'\?\)"),
        ([str(path), "--train.stpes", "3"], r"unknown setting --train.stpes \(did you mean '--train.steps'\?\)"),
        ([str(path), "--seed", "x"], "--seed: invalid literal"),
        ([str(path), "--train.steps", "0"], "^train.steps must be positive, got 0$"),
        ([str(path), "other.py"], "Unrecognized options: other.py"),
    ):
        with pytest.raises(ConfigError, match=said) as caught:
            configs.parse_with_config(Options, words)
        assert "\n" not in str(caught.value)
    for words in (["--help"], [str(path), "--help"]):
        with pytest.raises(SystemExit) as stop:
            configs.parse_with_config(Options, words)
        assert not stop.value.code
        assert "--run-dir" in capsys.readouterr().out


def test_what_follows_two_dashes():
    assert configs.split_at_dashes(["a", "--b", "--", "c", "--"]) == (["a", "--b"], ["c", "--"])
    assert configs.split_at_dashes(["a", "--b"]) == (["a", "--b"], [])


def test_averages_have_the_names_of_their_laws():
    one, three = make(), make(train=Train(posthoc=(0.05, 0.1)))
    assert configs.average_names(one) is None and callable(configs.build_averages(one))
    assert configs.average_names(three) == list(configs.build_averages(three)) == ["main", "0.05", "0.1"]
