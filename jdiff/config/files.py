"""Configs as files: the Python file that a person writes, the JSON of a run directory, and what differs between two."""

import dataclasses
import importlib.util
import json
from pathlib import Path
from typing import Any

from jdiff.config.schema import Config, ConfigError, as_tuples, first_line
from jdiff.core import foreign
from jdiff.core.extras import needs
from jdiff.core.names import did_you_mean


def config_files() -> dict[str, Path]:
    """{name: file} of the configs that come with this package."""
    here = Path(__file__).parents[1]
    folder = here / "configs" if (here / "configs").is_dir() else here.parent / "configs"  # a wheel, or a clone
    return {path.stem: path for path in sorted(folder.glob("*.py"))}


def load_config(path) -> Config:
    """Execute a Python file and return the `config` that it exports.

    Args:
        path: the file, or the name of a config that comes with this package, as "digits".

    Raises:
        ConfigError: there is no such file, it fails, or it exports no config.
    """
    is_name, known = "/" not in str(path) and not str(path).endswith(".py"), config_files()
    path = Path(path)
    if is_name and path.name in known:
        path = known[path.name]
    if is_name and not path.exists():
        hint = did_you_mean(path.name, known)
        raise ConfigError(f"no config {path.name!r}{hint}; one of {', '.join(known)}, or the path of a Python file")
    if path.is_dir():
        raise ConfigError(
            f"{path} is a directory; expected a config. The images in a folder are read by the config folder: "
            f"jdiff train folder --data.args.path {path}"
        )
    if not path.is_file():
        nearby = sorted(p.stem for p in path.parent.glob("*.py")) if path.parent.is_dir() else []
        hint = did_you_mean(path.stem, nearby)
        raise ConfigError(f"no config file {path}{hint}; expected a Python file that exports `config = Config(...)`")
    spec = importlib.util.spec_from_file_location(f"config_{path.stem}", path)
    if spec is None or spec.loader is None:
        raise ConfigError(f"{path} is not a Python file; expected one that exports `config = Config(...)`")
    module = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(module)
    except ConfigError as error:
        raise ConfigError(f"{path}: {error}") from error
    except SystemExit as stop:
        raise ConfigError(f"{path} called sys.exit({stop.code!r}); expected it to export a config and go on") from stop
    except Exception as error:
        kind, text = type(error).__name__, first_line(error)
        raise ConfigError(f"{path} failed: {kind}" + (f": {text}" if text != kind else "")) from error
    config = getattr(module, "config", None)
    if not isinstance(config, Config):
        found = "" if config is None else f", but {config!r:.60}"
        raise ConfigError(f"{path} exports no config{found}; expected `config = Config(...)` from jdiff.config")
    return config


def to_dict(config: Config) -> dict:
    """The config as a dict that JSON can hold."""
    return dataclasses.asdict(config)


def to_json(config: Config) -> str:
    """The config as JSON, of which `from_json` makes an equal config."""
    return json.dumps(to_dict(config), indent=2) + "\n"


def from_json(source: str | Path) -> Config:
    """Read the config that `to_json` wrote.

    Args:
        source: the text, or the path of a file that holds it.

    Raises:
        ConfigError: the JSON is broken or says a name twice, or settings are unknown, missing or mistyped; the message
            names the file.
    """
    with needs("config.json is read with"):
        import dacite

    def integer(digits):
        if len(digits) > 20 or abs(int(digits)) >= 2**63:
            raise ValueError(f"the whole number {digits[:20]}... has {len(digits):,} digits")
        return int(digits)

    where = f"{source} is" if isinstance(source, Path) else "this is"
    try:
        read = foreign.read_json(source, integer) if isinstance(source, Path) else foreign.parse_json(source, integer)
        return dacite.from_dict(Config, as_tuples(read), dacite.Config(strict=True))
    except OSError as error:
        raise ConfigError(f"cannot read {source}: {error.strerror or error}") from error
    except (ValueError, TypeError, AttributeError, OverflowError, RecursionError, dacite.DaciteError) as error:
        raise ConfigError(f"{where} not a config of this version: {foreign.one_line(error)}") from error


def flat(config) -> dict[str, Any]:
    """Every setting of a config under its dotted name.

    Returns:
        {name: value}, as {"train.steps": 1000, "schedule.args.T": 100, ...}.
    """
    out = {}

    def walk(prefix, value):
        if dataclasses.is_dataclass(value):
            value = {f.name: getattr(value, f.name) for f in dataclasses.fields(value)}
        if isinstance(value, dict):
            for k, v in value.items():
                walk(f"{prefix}.{k}" if prefix else k, v)
        else:
            out[prefix] = value

    walk("", config)
    return out


def differences(a: Config, b: Config, ignore=()) -> list[str]:
    """The settings in which two configs differ.

    Args:
        a: one config.
        b: the other one.
        ignore: dotted names that do not count; each covers everything below it.

    Returns:
        Dotted names. A setting that only one of them has is among them.
    """
    x, y = flat(a), flat(b)
    names = [k for k in {**x, **y} if x.get(k) != y.get(k)]
    return [k for k in names if not any(k == i or k.startswith(i + ".") for i in ignore)]


def change(a: Config, b: Config, ignore=()) -> str | None:
    """Say what has changed from one config to another.

    Args:
        a: the earlier config.
        b: the later config.
        ignore: dotted names that do not count; each covers everything below it.

    Returns:
        A few words, as "train.lr was 0.001 and is now 0.5 (and 2 more)"; None if nothing has changed.
    """
    names = differences(a, b, ignore)
    if not names:
        return None
    more = f" (and {len(names) - 1} more)" if len(names) > 1 else ""
    return f"{names[0]} was {flat(a).get(names[0])!r} and is now {flat(b).get(names[0])!r}{more}"
