"""Signals that stop a run: at once while there is nothing to save, and at the next visit while there is."""

import contextlib
import os
import signal
import socket
import threading
from collections.abc import Iterable

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")


def end(line: str, status: int) -> None:
    """Write a line, if there is one, to stderr and end the process at once: the main thread may be held up."""
    with contextlib.suppress(OSError):  # a terminal that was closed
        after = "\n" if os.isatty(2) else ""  # a bar of progress
        os.write(2, f"{after}{line}\n".encode() if line else b"")
    os._exit(status)


class Signals:
    """`with Signals() as stop:` SIGINT, SIGTERM, SIGHUP and those in `more` raise nothing in the block.

    While `stop.patient` is false, one ends the process with a line and status 128 + its number. While it is true, the
    first one is left in `stop.number`, for the caller to save and leave, and a second one ends the process.

    A thread does this, so that neither a long compilation nor a wait for other processes delays it. SIGHUP stays
    ignored where it was, as nohup wants it.

    Args:
        more: names of further signals, as "SIGUSR1".
    """

    def __init__(self, more: Iterable[str] = ()):
        numbers = [signal.Signals[name] for name in (*STOPPING, *more) if name in signal.Signals.__members__]
        ignored = [n for n in numbers if n.name == "SIGHUP" and signal.getsignal(n) is signal.SIG_IGN]
        self._numbers = [n for n in numbers if n not in ignored]
        self.number = 0  # of the first signal; 0 for none
        self.patient = False
        self.when = "before the first step"  # for the line
        self.speaks = True  # of several processes one is enough
        self.before_end = []  # to be called before the process is ended

    def __enter__(self) -> "Signals":
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs, self._fd = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # Python writes the number of a signal to the socket where it arrives, also while the main thread is in C++
        self._before = {number: signal.signal(number, lambda number, frame: None) for number in self._numbers}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd)
        self._theirs.close()  # which ends the thread

    def _watch(self) -> None:
        with self._ours:
            while byte := self._ours.recv(1):
                if byte[0] in self._numbers:
                    self._arrived(signal.Signals(byte[0]))

    def _arrived(self, number: signal.Signals) -> None:
        if self.patient and not self.number:
            self.number = number
            return
        again = f"{signal.Signals(self.number).name}, then by " if self.number else ""
        for call in self.before_end:
            with contextlib.suppress(Exception):  # whatever it is, the process ends
                call(128 + number)
        end(f"stopped by {again}{number.name} {self.when}" if self.speaks else "", 128 + number)
