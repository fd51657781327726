"""The settings of a run that sampling reads, as options: `--sample.solver.name unipc`, in short `--solver unipc`."""

import dataclasses
from typing import TypeVar

from jdiff import config as configs
from jdiff import runs
from jdiff.config import Sample

A = TypeVar("A")
SHORT = {
    "solver": "sample.solver.name", "solver_args": "sample.solver.args", "eta": "sample.solver.args.eta",
    "grid": "sample.grid.name", "grid_args": "sample.grid.args", "steps": "sample.steps",
    "guidance": "sample.guidance", "guide": "sample.guide.name", "guide_args": "sample.guide.args",
    "rescale": "sample.rescale", "interval": "sample.interval", "cache": "sample.cache", "clip": "sample.clip",
    "num": "sample.num",
}  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Sampling:
    """What the command line may change of a run."""

    sample: Sample
    """How to sample."""


def parse(cls: type[A], argv: list[str], prog: str, description: str) -> tuple[A, Sample]:
    """Read the command line of a command whose first word is a run directory.

    Args:
        cls: the dataclass of the command's own options; its first field is the run directory. A field with the name of
            a short option takes its place.
        argv: the words of the command line.
        prog: the name of the command.
        description: the first lines of its help.

    Returns:
        (an instance of `cls`, how to sample: the settings of the run with those of the command line in their place).

    Raises:
        ConfigError: there is no such run, or a word is wrong.
    """
    own = {field.name for field in dataclasses.fields(cls)}  # type: ignore[arg-type]
    short = {name: setting for name, setting in SHORT.items() if name not in own}
    forms = ", ".join(f"--{name.replace('_', '-')} for --{setting}" for name, setting in short.items())
    text = f"{description} Settings left out are those of the run: --help after RUN_DIR lists them. In short: {forms}."

    def load(directory: str) -> Sampling:
        return Sampling(runs.read_config(directory).sample)

    options, settings = configs.parse_with_settings(
        cls, argv, load, first="a run directory", short=short, prog=prog, description=text
    )
    return options, settings.sample
