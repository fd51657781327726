"""The command line: dataclasses of options, settings of a config, and what is wrong as one line."""

import contextlib
import dataclasses
import errno
import io
import itertools
import json
import os
import re
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Annotated, Any, TypeVar

import jax

from jdiff.config.files import flat, load_config
from jdiff.config.schema import Config, ConfigError, Named, as_tuples
from jdiff.config.tables import REQUIRED, all_arguments
from jdiff.core.extras import MissingExtra, needs
from jdiff.core.names import did_you_mean
from jdiff.data import DataError, DataWarning
from jdiff.train.checkpoint import CheckpointError, CheckpointWarning

A = TypeVar("A")
S = TypeVar("S")
WORDS = {"None": None, "True": True, "False": False}


def run_script(main: Callable[[list[str]], int], *errors: type[Exception], words: list[str] | None = None) -> None:
    """Call the `main` of a script or a command, and leave with the status that it returns.

    What is wrong with the command line, a file or the data is one line on stderr, with status 2. Ctrl-C is one line
    too, with status 130. Warnings are lines as well, and those of what libraries will drop one day are not shown.

    Args:
        main: the function, of the words of a command line.
        errors: further kinds of errors whose text is a line for its user.
        words: the command line; None for the words after the name of the script.
    """
    usual = (ConfigError, CheckpointError, DataError, MissingExtra, OSError, MemoryError)
    caught: tuple[type[Exception], ...] = (*usual, *errors)
    try:
        with warnings_as_lines():
            status = main(sys.argv[1:] if words is None else words)
    except KeyboardInterrupt:
        print("stopped by SIGINT", file=sys.stderr)
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(130)  # threads of XLA may still compute: the interpreter's own end would abort
    except caught as error:
        fail(error)
    sys.exit(status)


def fail(message) -> None:
    """Print a message or an error as one line on stderr, and leave with status 2."""
    short = "not enough memory: " if isinstance(message, MemoryError) else ""
    print(f"error: {short}{' '.join(str(message).split()) or type(message).__name__}", file=sys.stderr)
    raise SystemExit(2)


@contextlib.contextmanager
def warnings_as_lines() -> Iterator[None]:
    """Print each warning of a block as one line on stderr.

    Of several processes, only the first one prints those about checkpoints and data, which all of them find.
    """

    def show(message, category, filename, lineno, file=None, line=None):
        if not (issubclass(category, (CheckpointWarning, DataWarning)) and jax.process_index()):
            print(f"warning: {' '.join(str(message).split())}", file=file or sys.stderr)

    with warnings.catch_warnings():
        for shown in (CheckpointWarning, DataWarning):
            warnings.simplefilter("always", shown)
        for hidden in (DeprecationWarning, PendingDeprecationWarning):
            warnings.simplefilter("ignore", hidden)
        warnings.showwarning = show
        yield


def check_writable(path) -> None:
    """Find out, before the work that fills it, whether a file can be written.

    Args:
        path: of the file; missing folders are made.

    Raises:
        ConfigError: it cannot be written.
    """
    path = Path(path)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent):
            pass
        if path.is_dir():
            raise IsADirectoryError(errno.EISDIR, "is a directory")
    except OSError as error:
        raise ConfigError(f"cannot write {path}: {error.strerror or error}") from error


# ---------------------------------------------------------------- options and settings


def parse(cls: type[A], argv: list[str], default: A | None = None, **about) -> A:
    """Read an instance of a dataclass from a command line, by tyro.

    A field without a default is a positional word. Every other one is an option, `--NAME` with - or _, whose help is
    the field's docstring. The arguments of a `Named` field are options too, whether or not the default has them:
    `--FIELD.args.NAME VALUE`.

    Args:
        cls: the dataclass.
        argv: the words of the command line.
        default: an instance whose values are the defaults; None for those of the class.
        about: what else tyro is told: `prog`, the name of the script, and `description`, the first lines of its help.
            With `repeated=True` an option that takes several values is given again for each one.

    Returns:
        An instance of `cls`.

    Raises:
        ConfigError: a word is wrong; the message is one line.
        MissingExtra: tyro is not installed.
        SystemExit: the help was asked for, and is printed.
    """
    typed: dict[str, dict[str, Any]] = {}
    if default is not None:
        argv, typed, default = _typed_arguments(list(argv), default)
    return _with_arguments(_by_tyro(cls, list(argv), default, about), typed)


def parse_with_config(cls: type[A], argv: list[str], **about) -> tuple[A, Config]:
    """Read a command line whose first word is a config: each setting of the config is an option too.

    Args:
        cls: the dataclass of the command's own options; its first field, without a default, is the config.
        argv: the words of the command line.
        about: as in `parse`.

    Returns:
        (an instance of `cls`, the config with the settings of the command line).

    Raises:
        ConfigError: the first word is no config, or a word is wrong; the message is one line.
        MissingExtra: tyro is not installed.
        SystemExit: the help was asked for, and is printed.
    """
    first = "a config file, or the name of a config of jdiff"
    return parse_with_settings(cls, argv, load_config, first=first, **about)


def parse_with_settings(
    cls: type[A],
    argv: list[str],
    load: Callable[[str], S],
    *,
    first: str,
    short: dict[str, str] | None = None,
    **about,
) -> tuple[A, S]:
    """Read a command line whose first word says which settings there are: each of them is an option too.

    Args:
        cls: the dataclass of the command's own options; its first field, without a default, is the first word.
        argv: the words of the command line.
        load: from the first word to the settings, a dataclass.
        first: what the first word is, for the message, as "a run directory".
        short: {short option: dotted name of the setting that it stands for}. A short option whose setting ends in
            `.args` takes words name=value.
        about: as in `parse`.

    Returns:
        (an instance of `cls`, the settings with those of the command line in their place).

    Raises:
        ConfigError: a word is wrong; the message is one line.
        MissingExtra: tyro is not installed.
        SystemExit: the help was asked for, and is printed.
    """
    if argv and argv[0] in ("-h", "--help"):
        parse(cls, ["--help"], **about)
    if not argv or argv[0].startswith("-"):
        usage = f"{about.get('prog', 'SCRIPT')} {dataclasses.fields(cls)[0].name.upper()} [--SETTING VALUE ...]"  # type: ignore[arg-type]
        raise ConfigError(f"the first word must be {first}: {usage}; --help after it lists every setting")
    with needs("the command line is read with"):
        import tyro
    short = short or {}
    settings: Any = load(argv[0])
    argv, typed, settings = _typed_arguments(_in_long(list(argv), short), settings)
    if {"-h", "--help"} & set(argv):
        for field, choice in _named_fields(settings).items():
            settings = _replaced(settings, field, all_arguments(field, choice))
    flattened = tyro.conf.arg(name="")  # --run-dir and --train.steps, not --own.run-dir and --config.train.steps
    both = dataclasses.make_dataclass(
        "Both", [("own", Annotated[cls, flattened]), ("settings", Annotated[type(settings), flattened], settings)]
    )
    parsed: Any = _by_tyro(both, argv, None, about, list(short))
    return parsed.own, _with_arguments(parsed.settings, typed)


def split_at_dashes(argv: list[str]) -> tuple[list[str], list[str]]:
    """(the words before a word `--`, the words after it) of a command line; without one, (all of them, [])."""
    cut = argv.index("--") if "--" in argv else len(argv)
    return argv[:cut], argv[cut + 1 :]


def _in_long(argv: list[str], short: dict[str, str]) -> list[str]:
    """The words of a command line, with the settings that short options stand for in their place."""
    long, i = [], 0
    while i < len(argv):
        option, equals, value = argv[i].partition("=")
        i += 1
        setting = short.get(_underscored(option))
        if setting is None or not setting.endswith(".args"):
            long.append(argv[i - 1] if setting is None else f"--{setting}{equals}{value}")
            continue
        words = [value] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("-"):
            words.append(argv[i])
            i += 1
        if not words:
            raise ConfigError(f"{option} needs settings, name=value, as order=3")
        for word in words:
            name, equals_too, value = word.partition("=")
            if not equals_too or not name.isidentifier():
                raise ConfigError(f"{option}: {word!r} is no setting; expected name=value, as order=3")
            long.append(f"--{setting}.{name}={value}")
    return long


def _by_tyro(cls: type[A], argv: list[str], default: A | None, about: dict, more: list[str] | None = None) -> A:
    with needs("the command line is read with"):
        import tyro
    markers = (tyro.conf.PositionalRequiredArgs, *([tyro.conf.UseAppendAction] if about.get("repeated") else []))
    options = {name: about[name] for name in ("prog", "description") if name in about}
    options |= dict(default=default) if default is not None else {}
    captured = io.StringIO()
    try:
        with contextlib.redirect_stderr(captured):
            return tyro.cli(_with_metavars(cls) if default is None else cls, args=argv, config=markers, **options)
    except SystemExit as stop:
        if not stop.code:
            raise
        known = (_options_of(cls) if default is None else list(flat(default))) + (more or [])
        raise ConfigError(_one_line(captured.getvalue(), argv, known)) from None


def _with_metavars(cls: type[A]) -> Callable[..., A]:
    """A dataclass to tyro, whose help calls the positional words by the names of their fields: RUN_DIR, not STR."""
    import tyro

    words = [f for f in dataclasses.fields(cls) if f.type is str and f.default is dataclasses.MISSING]  # type: ignore[arg-type]
    named = [(f.name, Annotated[str, tyro.conf.arg(metavar=f.name.upper())]) for f in words]
    return dataclasses.make_dataclass(cls.__name__, named, bases=(cls,), frozen=True) if named else cls


def _options_of(cls: type) -> list[str]:
    """The dotted names of the settings of a dataclass; those of a field with a default as the default has them."""
    names = []
    for field in dataclasses.fields(cls):
        inner: Any = getattr(field.type, "__origin__", field.type)
        if not (isinstance(inner, type) and dataclasses.is_dataclass(inner)):
            names.append(field.name)
        elif isinstance(field.default, inner):
            names += flat(field.default)
        else:
            names += _options_of(inner)
    return names


def _value(text: str):
    """The value that a word of the command line stands for."""
    if text in WORDS:
        return WORDS[text]
    for read in (json.loads, float):  # which reads nan and .5
        try:
            return as_tuples(read(text))
        except (ValueError, RecursionError):
            continue
    return text


def _typed_arguments(argv: list[str], default) -> tuple[list[str], dict, Any]:
    """Read what the command line says of the `Named` fields.

    tyro knows only the arguments that the default has, so all arguments are read here. Where the typed name of a field
    is not that of the default, the default's arguments are dropped.

    Returns:
        (the words left for tyro, {field: {argument: value}}, the default with the names that were typed).
    """
    fields = _named_fields(default)
    names: dict[str, str] = {}
    left: list[str] = []
    typed: dict[str, dict[str, Any]] = {}
    for word, following in itertools.zip_longest(argv, argv[1:]):
        option, equals, name = word.partition("=")
        field = _underscored(option).removesuffix(".name")
        if option.endswith(".name") and field in fields and (equals or following is not None):
            names[field] = name if equals else following  # the last one counts, as for tyro
    for field, name in names.items():
        if name != fields[field].name:
            fields[field] = Named(name)
            default = _replaced(default, field, fields[field])
    i = 0
    while i < len(argv):
        option, equals, value = argv[i].partition("=")
        field, dot, name = _underscored(option).partition(".args.")
        i += 1
        if not dot or field not in fields or isinstance(fields[field].args.get(name.split(".")[0]), dict):
            left.append(argv[i - 1])
            continue
        words = [value] if equals else []
        while not equals and i < len(argv) and not argv[i].startswith("--"):
            words.append(argv[i])
            i += 1
        if not name.isidentifier():
            raise ConfigError(f"{option} names no argument; expected --{field}.args.NAME")
        known = {k: v for k, v in all_arguments(field, fields[field]).args.items() if v != REQUIRED}
        name, value = _argument(option, name, words, known)
        typed.setdefault(field, {})[name] = value
    return left, typed, default


def _underscored(option: str) -> str:
    """ "train.lr_schedule" of "--train.lr-schedule", and "" of what is no option."""
    return option[2:].replace("-", "_") if option.startswith("--") else ""


def _argument(option: str, name: str, words: list[str], known: dict) -> tuple[str, Any]:
    """(name, value) of an argument of the command line; it is a text or a list where it was `known` as one."""
    positive = name.removeprefix("no_")
    if not words and isinstance(known.get(positive), bool):
        return positive, name == positive
    if not words:
        raise ConfigError(f"{option} needs a value")
    old = known.get(name)
    values = tuple(word if isinstance(old, str) and word not in WORDS else _value(word) for word in words)
    one = len(values) == 1 and (isinstance(values[0], tuple) or not isinstance(old, tuple))
    return name, values[0] if one else values


def _named_fields(settings, prefix: str = "") -> dict[str, Named]:
    """{dotted name: value} of the fields that are `Named`."""
    out = {}
    for field in dataclasses.fields(settings):
        value = getattr(settings, field.name)
        if isinstance(value, Named):
            out[prefix + field.name] = value
        elif dataclasses.is_dataclass(value):
            out |= _named_fields(value, f"{prefix}{field.name}.")
    return out


def is_argument(config: Config, name: str) -> bool:
    """Whether a dotted name is that of an argument of a `Named` field, one that the config has or lacks."""
    field, dot, argument = name.partition(".args.")
    return bool(dot) and field in _named_fields(config) and argument.isidentifier()


def _replaced(settings, field: str, value):
    """`settings` with the field of that dotted name replaced."""
    first, dot, rest = field.partition(".")
    return dataclasses.replace(settings, **{first: _replaced(getattr(settings, first), rest, value) if dot else value})


def _with_arguments(settings, typed: dict):
    """`settings` with arguments added to its `Named` fields."""
    for field, args in typed.items():
        old = _named_fields(settings)[field]
        settings = _replaced(settings, field, Named(old.name, old.args | args))
    return settings


def _one_line(box: str, argv: list[str], names: list[str]) -> str:
    """tyro's message without its frame; for an unknown option, with the nearest of the names of those there are."""
    known = [f"--{name}".replace("_", "-") for name in names]
    for word in argv:
        option = word.split("=")[0]
        if option.startswith("--") and option.replace("_", "-") not in known and "Unrecognized" in box:
            return f"unknown setting {option}{did_you_mean(option.replace('_', '-'), known)}; --help lists them all"
    lines = [re.sub(r"[│╰╯─]+", " ", line) for line in box.splitlines() if not line.startswith("╭")]  # no title
    text = re.sub(r"\s+", " ", " ".join(lines)).strip()
    for rest in ("For full helptext", "Argument helptext", "Got errors"):
        text = text.partition(f" {rest}")[0]
    return re.sub(r"^Error parsing (\w+: )?", "", text) or "bad command line; see --help"
