"""The next chunk is made ready while the device works on this one."""

import threading
import time

import pytest

from jdiff.data import DataError, prefetch


def test_prefetch_hands_on_everything_in_order():
    with prefetch(iter(range(20)), place=lambda i: i * i, ahead=3) as squares:
        assert list(squares) == [i * i for i in range(20)]
        assert list(squares) == []


def test_prefetch_works_while_its_consumer_does():
    """The next chunk is made during the consumer's work; no more than `ahead` are made before they are wanted."""
    made, event = [], threading.Event()

    def source():
        for i in range(10):
            made.append(i)
            if i == 2:
                event.set()
            yield i

    with prefetch(source(), ahead=2) as chunks:
        assert next(chunks) == 0
        assert event.wait(5)
        time.sleep(0.05)
        assert made == [0, 1, 2] and 0 <= chunks.waited < 5


def test_waiting_is_counted():
    def slow():
        for i in range(3):
            time.sleep(0.05)
            yield i

    with prefetch(slow()) as chunks:
        list(chunks)
        assert chunks.waited > 0.1


@pytest.mark.parametrize("where", ["source", "place"])
def test_errors_reach_the_consumer_in_their_turn(where):
    def source():
        yield 1
        yield 2
        raise DataError("broken")

    def place(i):
        if where == "place" and i == 2:
            raise DataError("broken")
        return i

    with prefetch(source(), place) as chunks:
        good = [next(chunks)] + ([next(chunks)] if where == "source" else [])
        assert good == [1, 2][: len(good)]
        with pytest.raises(DataError, match="broken"):
            next(chunks)
        with pytest.raises(StopIteration):
            next(chunks)


def test_closing_early_closes_the_source_and_ends_the_thread():
    closed, before = [], threading.active_count()

    def source():
        try:
            while True:
                yield 0
        finally:
            closed.append(True)

    for leave in ("close", "forget"):
        chunks = prefetch(source(), ahead=2)
        next(chunks)
        if leave == "close":
            chunks.close()
        del chunks
        for _ in range(100):
            if threading.active_count() == before:
                break
            time.sleep(0.02)
        assert threading.active_count() == before and closed.pop()
    with pytest.raises(ValueError, match="at least 1"):
        prefetch([], ahead=0)
