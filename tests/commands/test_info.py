"""jdiff info: what it lists is what there is. The compile cache: where it lies, and what it forgets."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from jdiff import config as configs
from jdiff.commands import info
from jdiff.commands.cache import forget
from jdiff.config import ConfigError

ROOT = Path(__file__).parents[2]


def test_lists(capsys):
    info.main([])
    kinds = capsys.readouterr().out
    for kind, choice in configs.CHOICES.items():
        assert f"  {kind} " in kinds and f" {len(choice.table)}  --" in kinds
        info.main([kind])
        listed = capsys.readouterr().out.splitlines()
        heads = [line.partition("(")[0] for line in listed if line and not line.startswith(" ")]
        assert heads == list(choice.table)
        texts = [line for line in listed if line.startswith("    ") and not line.startswith("      ")]
        assert len(texts) >= len(heads)  # a line about each
    info.main(["configs"])
    assert [w for w in capsys.readouterr().out.splitlines() if not w.startswith(" ")] == list(configs.config_files())


def test_one_name(capsys):
    info.main(["solvers", "unipc"])
    out = capsys.readouterr().out
    assert out.startswith("unipc(order=2, variant='bh2', prediction='x0', start='low_order')\n") and "Args:" in out
    info.main(["models", "unet_digits"])
    out = capsys.readouterr().out
    assert "num_classes=10" in out and "dtype=None" in out and "dtype: of convolutions" in out
    info.main(["configs", "digits"])
    assert "scripts/train.py configs/digits.py" in capsys.readouterr().out


@pytest.mark.parametrize(
    "words,text",
    [
        (["solver"], r"unknown kind 'solver' \(did you mean 'solvers'\?\); one of datasets, "),
        (["solvers", "hune"], r"unknown solver 'hune' \(did you mean 'heun'\?\)"),
        (["configs", "digts"], r"unknown config 'digts' \(did you mean 'digits'\?\)"),
        (["solvers", "heun", "ddim"], "expected KIND and NAME at most"),
        (["--kind", "solvers"], "unknown setting --kind"),
    ],
)
def test_bad_words(words, text):
    with pytest.raises(ConfigError, match=text):
        info.main(words)


def test_the_cache_forgets_what_was_used_longest_ago(tmp_path):
    for age, name in enumerate("abcd"):
        path = tmp_path / name
        path.write_bytes(bytes(100))
        os.utime(path, (1e9 - age, 1e9 - age))
    forget(tmp_path, 250)
    assert sorted(os.listdir(tmp_path)) == ["a", "b"]
    forget(tmp_path / "none", 250)
    forget(tmp_path, 0)
    assert not os.listdir(tmp_path)


@pytest.mark.slow
def test_where_the_cache_lies(tmp_path):
    """In the user's cache directory; elsewhere, or not at all, where the environment says so."""
    code = "from jdiff.commands.cache import use_compile_cache as use; use(); import jax, jax.numpy as jnp;"
    code += (
        "jax.config.update('jax_persistent_cache_min_compile_time_secs', 0); print(jax.jit(jnp.cumsum)(jnp.ones(9)))"
    )
    plain = {name: value for name, value in os.environ.items() if not name.startswith("JAX_")}
    plain |= dict(XDG_CACHE_HOME=str(tmp_path / "home"), JAX_PLATFORMS="cpu")
    for more, where in (
        ({}, tmp_path / "home" / "jdiff"),
        (dict(JAX_COMPILATION_CACHE_DIR=str(tmp_path / "named")), tmp_path / "named"),
    ):
        subprocess.run([sys.executable, "-c", code], env=plain | more, cwd=ROOT, check=True, capture_output=True)
        assert [path for path in where.rglob("*") if path.is_file()]
    assert len(list((tmp_path / "home" / "jdiff").iterdir())) == 1
