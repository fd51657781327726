"""The tests run on 8 virtual CPU devices, and no array may change rank by broadcasting."""

import gc
import os
from pathlib import Path

os.environ["JAX_PLATFORMS"] = "cpu"

# each flag once, also where a worker of pytest-xdist inherits it: the key of a compiled program holds them all
os.environ["XLA_FLAGS"] = os.environ.get("XLA_FLAGS", "").replace(" --xla_force_host_platform_device_count=8", "")
os.environ["XLA_FLAGS"] += " --xla_force_host_platform_device_count=8"
# most of the time goes into compiling: what one process has compiled, another and the next run read, from any clone
os.environ.setdefault(
    "JAX_COMPILATION_CACHE_DIR",
    str(Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "jdiff" / "jax"),
)
os.environ["JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS"] = "0"
os.environ["JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES"] = "-1"
os.environ["JAX_TRACEBACK_IN_LOCATIONS_LIMIT"] = "0"  # finding the line of each operation takes time

import chex
import jax
import pytest

jax.config.update("jax_numpy_rank_promotion", "raise")

# XLA:CPU's older emitters write the code of fusions in half the time of the newer ones; one LLVM module is enough
QUICK = " --xla_cpu_use_fusion_emitters=false --xla_cpu_parallel_codegen_split_count=1"


def pytest_configure(config):
    """Run the quick tests without most of XLA's optimisations, and the slow tests with all of them."""
    if config.option.markexpr == "not slow":
        jax.config.update("jax_disable_most_optimizations", True)
        # the processes that tests start compile likewise; this one reads its flags at the first use of a device
        os.environ["JAX_DISABLE_MOST_OPTIMIZATIONS"] = "1"
        os.environ["XLA_FLAGS"] = os.environ["XLA_FLAGS"].replace(QUICK, "") + QUICK
    # Garbage collection takes time. What has been imported is never garbage, so the collector leaves it out; what
    # tracing makes is collected less often.
    gc.freeze()
    gc.set_threshold(100_000, 20, 20)


@pytest.fixture(autouse=True)
def traces():
    """Let `chex.assert_max_traces` count each test's traces alone."""
    chex.clear_trace_counter()


def pytest_runtest_teardown(item):
    """Drop compiled programs before the process runs out of memory maps: each takes several, Linux allows 65,530."""
    item.session.tests_run = getattr(item.session, "tests_run", 0) + 1
    maps = Path("/proc/self/maps")
    if item.session.tests_run % 25 == 0 and maps.exists():
        with maps.open("rb") as file:
            if sum(1 for _ in file) > 30_000:
                jax.clear_caches()
