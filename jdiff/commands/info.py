"""What the names in a config stand for: `jdiff info`, `jdiff info solvers`, `jdiff info solvers unipc`."""

import ast
import dataclasses
import inspect
import shutil
import textwrap
from collections.abc import Mapping

from jdiff import config as configs
from jdiff.core import names
from jdiff.models import create_model

KINDS: dict[str, configs.Choice | None] = dict(configs.CHOICES, configs=None)


@dataclasses.dataclass(frozen=True)
class Arguments:
    """List the names that configs and command lines know, with their arguments and defaults."""

    words: tuple[str, ...]
    """Nothing lists the kinds of names; KIND, as solvers, lists the names; KIND NAME prints all about one."""


def main(argv: list[str]) -> int:
    """Print what a kind of names stands for; return the exit status."""
    words = configs.parse(Arguments, argv, prog="jdiff info").words
    if len(words) > 2:
        raise configs.ConfigError(f"expected KIND and NAME at most: jdiff info solvers unipc; got {' '.join(words)}")
    if not words:
        show_kinds()
        return 0
    try:
        kind = names.choose("kind", words[0], KINDS)
        known: tuple[str, Mapping] = ("config", configs.config_files()) if kind is None else (kind.kind, kind.table)
        for name in words[1:]:
            names.choose(known[0], name, known[1])
    except ValueError as error:
        raise configs.ConfigError(str(error)) from error
    if kind is None:
        show_configs(*words[1:])
    elif len(words) == 1:
        show_names(kind)
    else:
        show_name(kind, words[1])
    return 0


def show_kinds() -> None:
    """Print the kinds of names, how many of each there are, and the options that choose one."""
    print("jdiff info KIND lists the names of a kind, and jdiff info KIND NAME prints all about one. The kinds:")
    for kind, choice in configs.CHOICES.items():
        option = " ".join(f"--{field}.name".replace("_", "-") for field in choice.fields) or "--schedule.args.table"
        print(f"  {kind:<15}{len(choice.table):>3}  {option}")
    print(f"  {'configs':<15}{len(configs.config_files()):>3}  jdiff train NAME")


def show_configs(name: str | None = None) -> None:
    """Print the first lines of all configs that come with jdiff, or the whole text of one."""
    texts = {known: ast.get_docstring(ast.parse(path.read_text())) for known, path in configs.config_files().items()}
    if name is not None:
        print(texts[name])
        return
    for known, text in texts.items():
        show(known, summary(text))


def show_names(choice: configs.Choice) -> None:
    """Print all names of a kind: their arguments, and a line about each."""
    for name, thing in choice.table.items():
        show(call(choice, name, changed_only=choice.kind == "model"), summary(inspect.getdoc(thing)))


def show_name(choice: configs.Choice, name: str) -> None:
    """Print all about one name."""
    show(call(choice, name), "")
    print(inspect.getdoc(choice.table[name]) or "Nothing is written about it.")
    if choice.kind == "model":
        print(f"\n{inspect.getdoc(type(create_model(name)))}")


def call(choice: configs.Choice, name: str, changed_only: bool = False) -> str:
    """A name with its arguments and defaults, as `unipc(order=2, variant='bh2')`.

    With `changed_only` those of a network are left out whose defaults are the ones of its class.
    """
    words = []
    usual = {f.name: f.default for f in dataclasses.fields(create_model(name))} if changed_only else {}
    for argument, default in configs.arguments(choice, name).items():
        if argument in usual and usual[argument] == default:
            continue
        missing = default is inspect.Parameter.empty
        words.append(argument if missing else f"{argument}={configs.written(default)!r}")
    return f"{name}({', '.join(words)})"


def summary(text: str | None) -> str:
    """The first paragraph of a text, in one line."""
    return " ".join((text or "").partition("\n\n")[0].split())


def show(head: str, text: str) -> None:
    """Print a call, and a text about it, wrapped to the width of the terminal."""
    width = max(40, shutil.get_terminal_size().columns)
    print(textwrap.fill(head, width, subsequent_indent="      "))
    print(textwrap.fill(text, width, initial_indent="    ", subsequent_indent="    ") if text else "")


if __name__ == "__main__":
    configs.run_script(main)
