"""The Python examples of the README and of docs/ run as they are printed, and their command lines parse."""

import importlib
import json
import re
import runpy
import shlex
import subprocess
from pathlib import Path

import pytest

from jdiff import config as configs
from jdiff.commands import options
from jdiff.models import registry
from jdiff.runs import search

ROOT = Path(__file__).parent.parent
RUN = ["README.md", "docs/guidance.md", "docs/networks.md", "docs/own.md", "docs/posterior.md"]


def examples(path: str) -> list[str]:
    return re.findall(r"^```python\n(.*?)^```$", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)


@pytest.mark.slow
@pytest.mark.parametrize(
    "path",
    [
        "README.md",
        *(
            f"docs/{page}.md"
            for page in ("export", "guidance", "likelihood", "metrics", "networks", "own", "posterior")
        ),
    ],
)
def test_examples_run(path, monkeypatch, tmp_path):
    """One after the other, as a reader would; those of published files, which are not here, are left out."""
    monkeypatch.setattr(registry, "MODELS", dict(registry.MODELS))
    found = [code for code in examples(path) if "jdiff.convert." not in code]
    assert found
    script = tmp_path / "examples.py"
    script.write_text("\n".join(found))
    monkeypatch.chdir(tmp_path)  # some examples write files
    runpy.run_path(str(script))


# ---------------------------------------------------------------- commands

PAGES = ["README.md", "CONTRIBUTING.md", *(f"docs/{path.name}" for path in sorted((ROOT / "docs").glob("*.md")))]
VERB = re.compile(r"(?:\bjdiff|python scripts/)(?: (?=\w+ )| (?=\w+$)|(?=\w+\.py))(\w+)(?:\.py)?")
ENDS = {";", "&&", "||", "|", ">", "&"}
MEANT = {"$run": "mnist"}  # what variables of the pages stand for; any other is a number


def blocks(path: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```$", (ROOT / path).read_text(), re.DOTALL | re.MULTILINE)


def commands(path: str) -> list[tuple[str, list[str]]]:
    """(verb, words) of each command of the tool in the shell and YAML blocks of a page."""
    found = []
    for line in "\n".join(blocks(path, "sh")).replace("\\\n", " ").splitlines():
        line = re.sub(r"\$\(([^()]|\([^()]*\))*\)|\$\w+", lambda match: MEANT.get(match[0], "1"), line)
        for match in VERB.finditer(line.partition(" #")[0]):
            words = shlex.split(line.partition(" #")[0][match.end() :])
            end = next((i for i, word in enumerate(words) if word in ENDS), len(words))
            found.append((match[1], words[:end]))
    for text in re.findall(r'\["jdiff".*?\]', "\n".join(blocks(path, "yaml")), re.DOTALL):
        _, verb, *words = json.loads(text)
        found.append((verb, words))
    modules = {"posthoc_ema": "average", "inspect": "inspect_data"}
    return [(modules.get(verb, verb), words) for verb, words in found]


def parse(verb: str, words: list[str], run_dir: str) -> None:
    """Read a command line as the command does, and check the config that it makes. Nothing is run."""
    command = importlib.import_module(f"jdiff.commands.{verb}")
    if verb in ("train", "inspect_data"):
        _, config = configs.parse_with_config(command.Arguments, words)
        configs.check(config)
    elif verb in ("sample", "evaluate"):
        options.parse(command.Arguments, [run_dir, *words[1:]], prog=verb, description="")
    elif verb == "sweep":
        words, rest = configs.split_at_dashes(words)
        arguments = configs.parse(command.Arguments, words, repeated=True)
        config = configs.load_config(arguments.config)
        search.parse_space(arguments.param, config)
        configs.parse(configs.Config, rest, config)
    else:
        configs.parse(command.Arguments, words)


@pytest.fixture(scope="module")
def run_dir(tmp_path_factory):
    """A run directory of which nothing but its config is there."""
    directory = tmp_path_factory.mktemp("run")
    (directory / "config.json").write_text(configs.to_json(configs.load_config("digits")))
    return str(directory)


@pytest.mark.parametrize("path", [path for path in PAGES if commands(path)])
def test_commands_parse(path, run_dir, monkeypatch):
    """Every command line of a page, by the parser of its command."""
    monkeypatch.chdir(ROOT)
    for verb, words in commands(path):
        parse(verb, words, run_dir)


def test_a_wrong_command_would_be_found(run_dir):
    for verb, words in (
        ("train", ["digits", "--train.stepz", "3"]),
        ("train", ["digits", "--model.name", "unett"]),
        ("sample", ["runs/x", "--nun", "3"]),
        ("sweep", ["digits", "--param", "train.lrr=1:2"]),
        ("average", ["runs/x", "--sigma", "3"]),
    ):
        with pytest.raises(configs.ConfigError):
            parse(verb, words, run_dir)


def test_commands_are_found():
    """Those of a page with every form: after `srun` and `exec`, over several lines, in YAML."""
    found = commands("docs/launch.md")
    assert [verb for verb, _ in found] == ["train"] * 5
    assert all("--model.args.dtype" in words and words[words.index("--model.args.dtype") + 1] == "bfloat16"
               for _, words in found)  # fmt: skip
    assert ("average", ["runs/NAME", "--sigma-rel", "0.075"]) in commands("docs/training.md")


@pytest.mark.parametrize("path", [path for path in PAGES if blocks(path, "sh")])
def test_shell_blocks_are_shell(path):
    for block in blocks(path, "sh"):
        result = subprocess.run(["bash", "-n"], input=block, text=True, capture_output=True)
        assert result.returncode == 0, (block, result.stderr)
