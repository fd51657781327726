"""The processes of one run watch each other: where one dies or never comes, the others end with a line, in time."""

import contextlib
import hmac
import json
import math
import secrets
import select
import socket
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import jax

from jdiff.core import files
from jdiff.runs.signals import end
from jdiff.train import parallel

LOST = 75  # exit status where the same command, started again, goes on: EX_TEMPFAIL
PATIENCE = 10.0  # seconds before those that wait to come together say so
TICK = 1.0  # seconds between two words to the others
ADMISSION = 30.0  # seconds for all of them to connect
SILENCE = 5.0  # seconds in which one who connects must show the token
MOST_GUESTS = 256  # who have not shown it yet; the oldest of more is sent away


@contextlib.contextmanager
def awaited(
    directory, place: tuple[int, int] | None, address: str, timeout: float, say: Callable[[str], object]
) -> Iterator[None]:
    """Say which processes are awaited while the block, in which they come together, takes long.

    Each process leaves a mark in DIR/processes, which it renews every second, and by which the others know it.

    Args:
        directory: of the run; all processes see it.
        place: (number of this process, how many there are); None where that is not known.
        address: of process 0, for the line.
        timeout: seconds after which the process ends with status `LOST`.
        say: receives the line after `PATIENCE` seconds, and again every minute.
    """
    done, marks = threading.Event(), Path(directory) / "processes"
    thread = threading.Thread(target=_await, args=(marks, place, address, timeout, say, done), daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
        _unmark(marks, place)


def _unmark(marks: Path, place) -> None:
    with contextlib.suppress(OSError):
        if place:
            (marks / str(place[0])).unlink(missing_ok=True)
        marks.rmdir()  # by the last one


def _await(marks: Path, place, address: str, timeout: float, say, done: threading.Event) -> None:
    rank, count = place or (None, 0)
    begun, speak = time.monotonic(), PATIENCE
    seen: dict[int, bytes] = {}  # the last mark of each process
    moved: dict[int, float] = {}  # when it was last renewed
    while not done.wait(TICK):
        now = time.monotonic()
        with contextlib.suppress(OSError):  # where it cannot be written, the lock will say so
            if place:
                files.write(marks / str(rank), lambda file: file.write(secrets.token_bytes(8)))
        for other in range(count):  # one that was killed has left a mark too, but does not renew it
            mark = _bytes(marks / str(other))
            if mark and mark != seen.setdefault(other, mark):
                moved[other] = now
            seen[other] = mark
        if now - begun < min(speak, timeout):
            continue
        late = [other for other in range(count) if other != rank and now - moved.get(other, -math.inf) > 5]
        who = f"process {' and '.join(map(str, late))} of {count}" if late else f"an answer from {address}"
        if now - begun >= timeout:
            _unmark(marks, place)
            end(f"error: {who} did not come within {timeout:.0f} s; start all of them again", LOST)
        say(f"waiting for {who}, for {timeout - (now - begun):.0f} s more")
        speak += 60


def _bytes(path: Path) -> bytes:
    try:
        with path.open("rb") as file:
            return file.read(64)
    except OSError:
        return b""


class Watch:
    """Watch the other processes of a run: `with Watch(timeout, last) as watch:`; all of them enter the block together.

    Once another process is lost, this one ends with a line and status `LOST`. Every process holds a connection to
    process 0, and says a word each second. A process is lost when its connection breaks, which happens at once where a
    process dies, or when nothing was heard of it for `timeout` seconds. Process 0 then tells the others. A thread does
    this, because the main one may wait for the lost process for ever.

    A process that leaves the block says so. So does one that is stopped by a signal, and the others end with its
    status. A single process has nothing to watch.

    Args:
        timeout: seconds.
        last: returns the last checkpoint, in words, for the line.
        host: of process 0, where all processes know it.
    """

    def __init__(self, timeout: float, last: Callable[[], str], host: str | None = None):
        self._timeout, self._last, self._host = timeout, last, host
        self._rank, self._count = jax.process_index(), jax.process_count()
        self._peers: dict[int, socket.socket] = {}
        self._left: dict[int, int] = {}  # the status with which each one has left
        self._done = threading.Event()

    def __enter__(self) -> "Watch":
        if self._count > 1:
            self._connect()
            if not self._peers:
                warnings.warn(f"process {self._rank} cannot reach the others: it waits if one dies", stacklevel=2)
            threading.Thread(target=self._watch, daemon=True).start()
        return self

    def __exit__(self, kind, error, trace) -> None:
        if self._count > 1 and error is not None:
            time.sleep(3.0)  # a broken collective shows in the main thread too: then the thread has the line
        self.leave(0 if error is None else 2)

    def leave(self, status: int) -> None:
        """Tell the others that this process ends, with this status, so that they do not take it for lost."""
        self._tell(f"left {status}")
        self._done.set()

    def _connect(self) -> None:
        server, offer = None, ""
        if self._rank == 0:
            server = socket.create_server(("", 0), backlog=self._count)
            hosts = [*([self._host] if self._host else []), _address(), socket.gethostname()]
            offer = json.dumps(dict(hosts=hosts, port=server.getsockname()[1], token=secrets.token_hex(16)))
        offer = json.loads(parallel.from_first(offer))
        if server is None:
            self._peers = _reach(offer, self._rank)
        else:
            self._peers = _admit(server, offer["token"], self._count)
        for peer in self._peers.values():
            peer.settimeout(0.0)

    def _tell(self, words: str) -> None:
        for peer in list(self._peers.values()):
            with contextlib.suppress(OSError):  # it is not the one that reports a lost one
                peer.send(f"{words}\n".encode())

    def _watch(self) -> None:
        heard, text = dict.fromkeys(self._peers, time.monotonic()), dict.fromkeys(self._peers, b"")
        while not self._done.is_set():
            ready, _, _ = select.select(list(self._peers.values()), [], [], TICK)
            for other in [i for i, peer in self._peers.items() if peer in ready]:
                data = _received(self._peers[other])
                if data is None:
                    del self._peers[other]
                    if other not in self._left:
                        self._lost(other, "its connection is closed")
                    continue
                heard[other] = time.monotonic()
                *lines, text[other] = (text[other] + data).split(b"\n")
                for words in map(bytes.split, lines):
                    self._told(other, words)
            self._tell("here")
            for other, since in heard.items():
                silent = time.monotonic() - since
                if silent > self._timeout and other in self._left and self._left[other]:
                    self._end(f"process {other} has ended with status {self._left[other]}", self._left[other])
                if silent > self._timeout and other not in self._left:
                    self._lost(other, f"nothing was heard of it for {silent:.0f} s")

    def _told(self, other: int, words: list[bytes]) -> None:
        if len(words) == 2 and words[0] == b"left":
            self._left[other] = int(words[1])
            if self._left[other] > 128:  # by a signal: what fails by itself fails here too, and has its own line
                self._end(f"process {other} was stopped by signal {self._left[other] - 128}", self._left[other])
        if len(words) == 2 and words[0] == b"end":  # process 0 has said why
            end("", int(words[1]))

    def _lost(self, other: int, why: str) -> None:
        self._end(f"process {other} of {self._count} is lost: {why}", LOST)

    def _end(self, what: str, status: int) -> None:
        self._tell(f"end {status}" if self._rank == 0 else f"left {status}")
        end(f"error: {what}; {self._last()}; start all of them again to go on", status)


def _received(peer: socket.socket) -> bytes | None:
    """What has come; None where the connection is closed or broken."""
    try:
        return peer.recv(4096) or None
    except BlockingIOError:
        return b""
    except OSError:
        return None


def _admit(server: socket.socket, token: str, count: int) -> dict[int, socket.socket]:
    """The connections of processes 1 to count - 1, which show the token; who does not come in time is not watched.

    All who connect are listened to at once, each for a few seconds: strangers who say nothing hold nobody up.
    """
    peers: dict[int, socket.socket] = {}
    guests: dict[socket.socket, tuple[float, bytes]] = {}  # since when, and what each has said
    until = time.monotonic() + ADMISSION
    with server:
        server.settimeout(0.0)
        while len(peers) < count - 1 and time.monotonic() < until:
            ready, _, _ = select.select([server, *guests], [], [], 0.1)
            if server in ready:
                with contextlib.suppress(OSError):
                    guest, _ = server.accept()
                    guest.settimeout(0.0)
                    guests[guest] = time.monotonic(), b""
            for guest in [guest for guest in guests if guest in ready]:
                since, said = guests[guest]
                heard = _received(guest)
                said += b"\n" if heard is None else heard  # a line, if only a part of one, where it is closed
                guests[guest] = since, said
                if b"\n" in said or len(said) > 128:
                    del guests[guest]
                    rank = _rank(said, token, count)
                    with contextlib.suppress(OSError):
                        guest.send(b"here\n" if rank else b"")
                    if rank:
                        peers[rank] = guest
                    else:
                        guest.close()
            silent = [guest for guest, (since, _) in guests.items() if time.monotonic() - since > SILENCE]
            for guest in [*silent, *list(guests)[: max(0, len(guests) - MOST_GUESTS)]]:
                if guests.pop(guest, None):
                    guest.close()
    for guest in guests:
        guest.close()
    return peers


def _rank(said: bytes, token: str, count: int) -> int | None:
    """The rank in a line "TOKEN RANK"; None where the token is another one, or the rank is none."""
    words = said.split()
    if len(words) != 2 or not hmac.compare_digest(words[0], token.encode()) or not words[1].isdigit():
        return None
    rank = int(words[1])
    return rank if 0 < rank < count else None


def _reach(offer: dict, rank: int) -> dict[int, socket.socket]:
    """{0: the connection to process 0}, under the first of its addresses that answers; {} if none does."""
    for host in offer["hosts"]:
        with contextlib.suppress(OSError):
            peer = socket.create_connection((host, offer["port"]), timeout=10.0)
            peer.sendall(f"{offer['token']} {rank}\n".encode())
            if peer.recv(16).startswith(b"here"):
                return {0: peer}
    return {}


def _address() -> str:
    """The address of this host on the interface that leads outwards; nothing is sent."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("192.0.2.1", 9))  # an address of no host, RFC 5737
            return probe.getsockname()[0]
        except OSError:
            return "127.0.0.1"
