"""Compiled programs are kept between commands, so that the second one starts at once."""

import hashlib
import os
import platform
from pathlib import Path

import jax

LIMIT = 4e9  # bytes


def use_compile_cache() -> None:
    """Let JAX keep compiled programs in the user's cache directory, at most 4 GB of them.

    Where the environment names a directory (JAX_COMPILATION_CACHE_DIR), or switches the cache off, it is left so. Each
    kind of CPU has its own directory: a home directory may be shared by machines that do not run each other's programs.
    """
    if "JAX_COMPILATION_CACHE_DIR" in os.environ:
        return
    home = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    directory = home / "jdiff" / f"jax-{_cpu()}"
    jax.config.update("jax_compilation_cache_dir", str(directory))
    if "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS" not in os.environ:
        jax.config.update("jax_persistent_cache_min_compile_time_secs", 0.1)
    forget(directory, LIMIT)


def forget(directory: Path, limit: float) -> None:
    """Remove the files of a directory that were used longest ago, until the others take at most `limit` bytes."""
    try:
        found = [(entry.stat(), entry.path) for entry in os.scandir(directory)]
    except OSError:
        return  # there is none yet, or another command removes files too
    total = 0
    for status, path in sorted(found, key=lambda pair: -max(pair[0].st_atime, pair[0].st_mtime)):
        total += status.st_size
        if total > limit:
            Path(path).unlink(missing_ok=True)


def _cpu() -> str:
    """A short name of the kind of CPU: of its architecture and of the instructions that it has."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        lines = []
    flags = next((line for line in lines if line.startswith(("flags", "Features"))), platform.processor())
    return hashlib.sha256(f"{platform.machine()} {flags}".encode()).hexdigest()[:8]
