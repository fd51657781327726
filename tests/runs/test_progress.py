"""What is told while a command works: bars on a terminal that has a width, else lines."""

import fcntl
import os
import pty
import struct
import sys
import termios

import pytest

from jdiff.runs import progress


@pytest.fixture
def terminal(monkeypatch):
    """stderr as a terminal: `width(columns)` makes it one of that width, and `read()` gives what was written."""
    master, slave = pty.openpty()
    file = os.fdopen(slave, "w")

    def width(columns):
        monkeypatch.setattr(sys, "stderr", file)
        fcntl.ioctl(master, termios.TIOCSWINSZ, struct.pack("HHHH", 40, columns, 0, 0))

    def read():
        print("END", end="", file=file, flush=True)
        text = b""
        while not text.endswith(b"END"):  # a terminal gives what was written in pieces
            text += os.read(master, 65536)
        return text.decode().removesuffix("END")

    yield width, read
    file.close()
    os.close(master)


def work(monkeypatch, seconds):
    """A stage and a count of two parts, each of which takes so many seconds by the clock."""
    now = [0.0]
    monkeypatch.setattr(progress.time, "perf_counter", lambda: now[0])
    told = progress.Progress()
    with told.stage("compiling"):
        now[0] += seconds
    with told.count("drawing", 10, "sample") as advance:
        for _ in range(2):
            now[0] += seconds
            advance(5)


def test_lines_where_there_is_no_terminal(monkeypatch, capsys):
    work(monkeypatch, 20.0)
    assert capsys.readouterr().err.splitlines() == [
        "compiling ...", "compiling: 20.0 s", "drawing ...", "drawing: 5 of 10 samples, 20 s left", "drawing: 40.0 s",
    ]  # fmt: skip
    work(monkeypatch, 0.1)  # what is quick is told once
    assert capsys.readouterr().err.splitlines() == ["compiling ...", "drawing ..."]


def test_bars_on_a_terminal(monkeypatch, terminal):
    width, read = terminal
    width(100)
    work(monkeypatch, 20.0)
    text = read()
    assert "compiling ... 00:00" in text and "drawing:   0%" in text
    assert "compiling: 20.0 s\r\n" in text and text.endswith("drawing: 40.0 s\r\n")


def test_a_terminal_without_a_width_gets_lines(monkeypatch, terminal):
    width, read = terminal
    width(0)
    work(monkeypatch, 20.0)
    assert read().split("\r\n")[:2] == ["compiling ...", "compiling: 20.0 s"]


def test_nothing_is_told_by_default(capsys):
    with progress.SILENT.stage("a"), progress.SILENT.count("b", 3, "sample") as advance:
        advance(3)
    assert capsys.readouterr() == ("", "")
