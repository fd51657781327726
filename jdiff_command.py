"""The command `jdiff`, of which each file in scripts/ is one verb.

It lies outside the package because importing that takes seconds, in which Ctrl-C must end the command with one line.
"""

import os
import signal
import sys

COMMANDS = {
    "train": "train a model: jdiff train digits, or a config file of your own",
    "inspect": "look at data before training: jdiff inspect digits, or a folder of images",
    "sample": "draw samples of a trained run",
    "evaluate": "measure a trained run",
    "sweep": "search hyper-parameters by training many runs",
    "average": "reconstruct an average of the parameters after training",
    "info": "list solvers, grids, models, data sets and all other names, with their arguments",
}
USAGE = "jdiff COMMAND ..., where COMMAND is one of"


def main() -> None:
    """Run the command that the first word of the command line names."""
    words = sys.argv[1:]
    if not words or words[0] in ("-h", "--help"):
        lines = [f"  {name:<10}{about}" for name, about in COMMANDS.items()]
        print("\n".join([f"usage: {USAGE}", *lines, "jdiff COMMAND --help lists the options of one."]))
        sys.exit(0 if words else 2)
    if words[0] == "--version":
        from importlib.metadata import version

        print(f"jdiff {version('jdiff')}")
        sys.exit(0)
    run(words[0], words[1:])


def run(name: str, words: list[str] | None = None) -> None:
    """Run one command, and leave with its status.

    Args:
        name: the command.
        words: its command line; None for the words after the name of the script.
    """
    words = sys.argv[1:] if words is None else words
    numbers = [signal.SIGINT, signal.SIGTERM, signal.SIGHUP]
    if any(word.replace("_", "-").startswith("--requeue-on") for word in words):
        numbers += [signal.SIGUSR1, signal.SIGUSR2]
    for number in numbers:
        if number != signal.SIGHUP or signal.getsignal(number) is not signal.SIG_IGN:  # which nohup ignores
            signal.signal(number, leave_at_once)
    from jdiff import commands

    commands.run(name, words)


def leave_at_once(number: int, frame) -> None:
    """Leave with one line: threads of XLA may still compute, and the interpreter's own end would abort."""
    os.write(2, f"stopped by {signal.Signals(number).name}\n".encode())
    os._exit(128 + number)


if __name__ == "__main__":
    main()
