"""The model card: the README.md of an export."""

import math
from collections.abc import Iterable
from typing import Any


def text(name: str, record: dict[str, Any], about: str) -> str:
    """The model card in Markdown: what it is, how it is loaded, and what is in the files.

    Args:
        name: of the folder.
        record: the content of export.json.
        about: what its author says: data, metrics, licence.

    Returns:
        The text.
    """
    count = sum(math.prod(number["shape"]) for number in record["numbers"].values())
    files = [*record["programs"], record["params"]]
    platforms = [platform for program in record["programs"] for platform in program["platforms"]]
    return "\n".join([
        f"# {name}",
        "",
        f"An exported {record['kind']} of jdiff: {count:,} numbers, for {', '.join(platforms)}.",
        *(["", about.strip()] if about.strip() else []),
        "",
        "## Load it",
        "",
        "```sh",
        "pip install -e '.[export]'  # in a clone of jdiff",
        "```",
        "",
        "```python",
        "import jax, jdiff",
        "",
        *(_denoiser(name, record) if record["kind"] == "denoiser" else _sampler(name, record)),
        "```",
        "",
        "The code of the network is not needed. The program runs as it is: load folders of people whom you trust.",
        "",
        "## What is in it",
        "",
        *_table(("argument", "shape", "dtype"), [(n, _shape(a), a["dtype"]) for n, a in record["rows"].items()]),
        "",
        *(_settings(record) if record.get("settings") else []),
        *_table(("file", "bytes"), [(file["file"], f"{file['bytes']:,}") for file in files]),
        "",
        f"Gradient: {'yes' if record['vjp_order'] else 'no'}. Made by "
        + ", ".join(f"{library} {version}" for library, version in record["versions"].items())
        + f"; calling convention {record['programs'][0]['calling_convention']}.",
        "",
    ])  # fmt: skip


def _denoiser(name: str, record: dict[str, Any]) -> list[str]:
    size = record["rows"]["x"]["shape"][1:]
    given = [row for row in record["rows"] if row not in ("x", "t")]
    return [
        f"denoise = jdiff.export.load({name!r})",
        *(["denoise = denoise.given({" + ", ".join(f"{row!r}: ..." for row in given) + "})"] if given else []),
        "times = jdiff.grid.log_snr(denoise.schedule, 20)",
        f"x = jdiff.prior(denoise.schedule, jax.random.key(0), (16, {', '.join(map(str, size))}), times[0])",
        "samples = jdiff.sample(jdiff.solvers.Heun(), denoise, denoise.schedule, x, times)",
    ]


def _sampler(name: str, record: dict[str, Any]) -> list[str]:
    has_cond = any(row.partition("/")[0] == "cond" for row in record["rows"])
    settings = "".join(f"{setting!r}: {noted['value']}, " for setting, noted in record["settings"].items())
    call = ["start", *(["cond"] if has_cond else []), *(["settings={" + settings[:-2] + "}"] if settings else [])]
    return [f"draw = jdiff.export.load({name!r})", f"samples = draw({', '.join(call)})"]


def _settings(record: dict[str, Any]) -> list[str]:
    rows = [(n, str(a["value"]), a["dtype"]) for n, a in record["settings"].items()]
    return [*_table(("setting", "default", "dtype"), rows), ""]


def _shape(array: dict[str, Any]) -> str:
    return f"({', '.join(map(str, array['shape']))})"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> list[str]:
    return [_line(head), _line(("---",) * len(head)), *map(_line, rows)]


def _line(cells: tuple[str, ...]) -> str:
    return f"| {' | '.join(cells)} |"
