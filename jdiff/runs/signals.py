"""Signals that stop a run: at once while there is nothing to save, and at the next visit while there is."""

import collections
import contextlib
import os
import signal
import socket
import threading
from collections.abc import Callable, Iterable

STOPPING = ("SIGINT", "SIGTERM", "SIGHUP")
HANDLED = 0x80  # set in the byte by which the handler tells of a signal; their numbers are below 65


def end(line: str, status: int) -> None:
    """End the process at once, from any thread: the main one may be held up.

    Args:
        line: is written to stderr before, unless it is empty.
        status: the exit status.
    """
    with contextlib.suppress(OSError):  # a terminal that was closed
        after = "\n" if os.isatty(2) else ""  # a bar of progress
        os.write(2, f"{after}{line}\n".encode() if line else b"")
    os._exit(status)


class Signals:
    """Catch the signals that stop a run: `with Signals() as stop:`. In the block they raise nothing.

    While `stop.patient` is false, a signal ends the process with a line and status 128 + its number. While it is true,
    the first signal is left in `stop.number`, so that the caller can save and leave; a second one ends the process.

    A thread does this, so that neither a long compilation nor a wait for other processes delays it. The signals are
    SIGINT, SIGTERM, SIGHUP and those in `more`. Where SIGHUP was ignored, it stays ignored, as nohup wants it.

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
        self.before_end: list[Callable[[int], object]] = []  # to be called before the process is ended

    def __enter__(self) -> "Signals":
        self._ours, theirs = socket.socketpair()
        theirs.setblocking(False)
        self._theirs, self._fd = theirs, signal.set_wakeup_fd(theirs.fileno(), warn_on_full_buffer=False)
        # Python writes the number of a signal to the socket where it arrives, also while the main thread is in C++
        self._before = {number: signal.signal(number, self._handle) for number in self._numbers}
        threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, *error) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        signal.set_wakeup_fd(self._fd)
        self._theirs.close()  # which ends the thread

    def _handle(self, number: int, frame) -> None:
        with contextlib.suppress(OSError):
            self._theirs.send(bytes([HANDLED | number]))

    def _watch(self) -> None:
        # An event loop in the main thread, as uvloop's under Orbax, has its own socket in place of ours while it runs.
        # The handler tells of every signal again, later: one of which only it tells has arrived then.
        arrived: collections.Counter[int] = collections.Counter()
        handled: collections.Counter[int] = collections.Counter()
        with self._ours:
            while byte := self._ours.recv(1):
                number = byte[0] & ~HANDLED
                if byte[0] & HANDLED:
                    handled[number] += 1
                    if handled[number] <= arrived[number]:
                        continue
                if number in self._numbers:
                    arrived[number] += 1
                    self._arrived(signal.Signals(number))

    def _arrived(self, number: signal.Signals) -> None:
        if self.patient and not self.number:
            self.number = number
            return
        again = f"{signal.Signals(self.number).name}, then by " if self.number else ""
        for call in self.before_end:
            with contextlib.suppress(Exception):  # whatever it is, the process ends
                call(128 + number)
        end(f"stopped by {again}{number.name} {self.when}" if self.speaks else "", 128 + number)
