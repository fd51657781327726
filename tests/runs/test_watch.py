"""What a run notes of itself, read back also where it is damaged."""

import json
import os
import pty
import warnings

import pytest

from jdiff.runs import watch

ENTRIES = [dict(step=step, loss=1 / step) for step in (10, 20, 30)]
TEXT = "".join(json.dumps(entry) + "\n" for entry in ENTRIES).encode()


def read(path, *warned):
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        entries = watch.read_metrics(path)
    assert [str(w.message) for w in caught] == [f"{path}: {text}" for text in warned]
    return entries


@pytest.mark.parametrize(
    "line", [b'{"step":"a"}', b'{"step":null}', b'{"step":true}', b'{"step":1.5}', b'{"step":NaN}', b"[1]", b"7", b"",
             b'{"loss":1}', b"\xff\xfe{", b"[" * 5000]
)  # fmt: skip
def test_a_line_that_is_no_entry_is_left_out(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(line + b"\n" + TEXT)
    assert read(path, "1 of 4 lines are damaged and left out") == ENTRIES
    path.write_bytes(TEXT + line)  # cut short by a kill, which is nothing to speak of
    assert read(path) == ENTRIES


def test_any_bit_may_be_flipped(tmp_path):
    """What is read is the entries of the other lines, in their order; a resumed log goes on, and is whole again."""
    path = tmp_path / "metrics.jsonl"
    for place in range(TEXT.index(b"\n") + 1):
        for bit in (0x80, 0x01):
            raw = bytearray(TEXT)
            raw[place] ^= bit
            path.write_bytes(raw)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                entries = watch.read_metrics(path)
            assert len([entry for entry in entries if entry in ENTRIES]) >= 1 and len(entries) <= 3
    raw = bytearray(TEXT)
    raw[5] ^= 0x80
    path.write_bytes(raw)
    assert read(path, "1 of 3 lines are damaged and left out") == ENTRIES[1:]


def test_a_log_goes_on_after_a_damaged_line(tmp_path, capsys):
    path = tmp_path / "metrics.jsonl"
    path.write_bytes(b"\xff\n" + TEXT)
    log = watch.Log(tmp_path, 20, 100, 0)
    log.visit(25, dict(loss=1.0))
    log.close()
    assert [entry["step"] for entry in read(path)] == [10, 20, 25]
    assert capsys.readouterr().err == f"warning: {path}: 1 of 4 lines are damaged and left out\n"


def test_a_terminal_that_was_closed_does_not_matter(tmp_path):
    master, slave = pty.openpty()
    with os.fdopen(slave, "w") as terminal:
        watch.say("one", file=terminal)
        os.close(master)
        for _ in range(2):
            watch.say("two", file=terminal)
