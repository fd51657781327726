"""The commands of the tool `jdiff`, one a file: each has a function `main(words) -> status`.

A file is linear and short, made to be read. To change how one works, copy the file and run the copy.
"""

import importlib

from jdiff.commands.cache import use_compile_cache
from jdiff.config import ConfigError, run_script
from jdiff.core.names import choose
from jdiff_command import COMMANDS

# a file inspect.py would stand in the place of Python's own where a command is run as a file
FILES = {"inspect": "inspect_data"}


def run(name: str, words: list[str]) -> None:
    """Run a command, and leave with its status; what is wrong is one line, with status 2.

    Args:
        name: of the command.
        words: its command line.
    """

    def main(words):
        try:
            choose("command", name, COMMANDS)
        except ValueError as error:
            raise ConfigError(str(error)) from error
        use_compile_cache()
        return importlib.import_module(f"jdiff.commands.{FILES.get(name, name)}").main(words)

    run_script(main, words=words)
