"""CPUs kept from sleeping between the small tasks of a program."""

import contextlib
import os
import subprocess
import sys
from collections.abc import Iterator

# one process a CPU, of the class that any other process displaces at once; it ends with the one that started it
SPIN = """
import os, sys
cpu, parent = map(int, sys.argv[1:])
os.sched_setaffinity(0, {cpu})
os.sched_setscheduler(0, os.SCHED_IDLE, os.sched_param(0))
while os.getppid() == parent:
    for _ in range(10_000):
        pass
"""


@contextlib.contextmanager
def keep() -> Iterator[tuple[int, ...]]:
    """Keep the CPUs of this process awake inside the context; gives the process ids of what does, one a CPU.

    XLA:CPU hands each layer from thread to thread, and a thread that waits lets its CPU sleep. On virtual machines
    waking it can take much of the time of a small network (docs/networks.md). The CPUs then never idle, which costs
    power, and credits where a machine counts them; other programs come first. Linux only: elsewhere nothing is done.
    """
    if not hasattr(os, "SCHED_IDLE"):
        yield ()
        return
    quiet = dict.fromkeys(("stdin", "stdout", "stderr"), subprocess.DEVNULL)
    spinning = []
    try:
        for cpu in sorted(os.sched_getaffinity(0)):
            command = [sys.executable, "-I", "-S", "-c", SPIN, str(cpu), str(os.getpid())]
            # a group of its own, for Ctrl-C is for the program; not a session: Linux shares CPUs evenly among sessions
            spinning.append(subprocess.Popen(command, process_group=0, **quiet))
        yield tuple(process.pid for process in spinning)
    finally:
        for process in spinning:
            process.kill()
        for process in spinning:
            process.wait()
