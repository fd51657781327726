"""CPUs kept awake: by processes that give way to all others and do not outlive the program."""

import os
import signal
import subprocess
import sys
import time

import pytest

from jdiff import awake

pytestmark = pytest.mark.skipif(not hasattr(os, "SCHED_IDLE"), reason="needs Linux's SCHED_IDLE")


def wait_until(condition):
    end = time.monotonic() + 20
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)


def runs(pid: int) -> bool:
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"  # dead, and nobody asked
    except FileNotFoundError:
        return False


def test_one_process_a_cpu_of_the_idle_class_while_the_context_lasts():
    with pytest.raises(KeyError), awake.keep() as pids:
        wait_until(lambda: all(os.sched_getscheduler(pid) == os.SCHED_IDLE for pid in pids))
        assert sorted(cpu for pid in pids for cpu in os.sched_getaffinity(pid)) == sorted(os.sched_getaffinity(0))
        raise KeyError  # however it ends
    assert not any(runs(pid) for pid in pids)


def test_they_end_with_the_program_that_was_killed():
    program = "import time; from jdiff import awake\nwith awake.keep() as p: print(*p, flush=True); time.sleep(60)"
    process = subprocess.Popen([sys.executable, "-c", program], stdout=subprocess.PIPE, text=True)
    pids = [int(word) for word in process.stdout.readline().split()]
    assert pids and all(runs(pid) for pid in pids)
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    wait_until(lambda: not any(runs(pid) for pid in pids))


def test_elsewhere_nothing_is_done(monkeypatch):
    monkeypatch.delattr(os, "SCHED_IDLE")
    with awake.keep() as pids:
        assert pids == ()
