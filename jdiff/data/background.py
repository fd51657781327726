"""A background thread makes the next chunk of data ready while the device works on this one."""

import queue
import threading
import time
from collections.abc import Callable, Iterable
from typing import Any


class Prefetch:
    """An iterator over chunks that another thread makes ready.

    It is a context manager too: leaving the block, or `close()`, stops the thread and closes the source. `waited` is
    the number of seconds for which its consumer has waited.
    """

    def __init__(self, chunks: Iterable, place: Callable | None = None, ahead: int = 1):
        if ahead < 1:
            raise ValueError(f"prefetch keeps at least 1 chunk ready; got ahead={ahead}")
        self.waited = 0.0
        self._ready: queue.SimpleQueue[tuple[Any, BaseException | None]] = queue.SimpleQueue()
        self._slots, self._stop = threading.Semaphore(ahead), threading.Event()
        # the thread has no reference to self, so a forgotten iterator is collected, and then stops the thread
        work = (chunks, place, self._ready, self._slots, self._stop)
        self._thread = threading.Thread(target=_work, args=work, daemon=True, name="jdiff-prefetch")
        self._thread.start()

    def __iter__(self):
        return self

    def __next__(self):
        if self._stop.is_set():
            raise StopIteration
        start = time.perf_counter()
        chunk, error = self._ready.get()
        self.waited += time.perf_counter() - start
        self._slots.release()
        if error is None:
            return chunk
        self.close()
        raise error

    def __enter__(self):
        return self

    def __exit__(self, *_):
        self.close()

    def __del__(self):
        if hasattr(self, "_stop"):
            self._halt()

    def close(self) -> None:
        """Stop reading; return when the thread has finished its current chunk and closed the source."""
        self._halt()
        self._thread.join()

    def _halt(self) -> None:
        self._stop.set()
        self._slots.release()


def prefetch(chunks: Iterable, place: Callable | None = None, ahead: int = 1) -> Prefetch:
    """Read `chunks` in a background thread; errors of the source are raised in the consumer, in their turn.

    Args:
        chunks: the source.
        place: what the thread does with each chunk, such as `jax.device_put`; None for nothing.
        ahead: how many chunks are kept ready.

    Raises:
        ValueError: ahead is below 1.
    """
    return Prefetch(chunks, place, ahead)


def _work(chunks, place, ready, slots, stop) -> None:
    """Put (chunk, None) into `ready` for each chunk, and (None, error) at the end."""
    error: BaseException = StopIteration()
    try:
        iterator = iter(chunks)
        while True:
            slots.acquire()
            if stop.is_set():
                break
            chunk = next(iterator)
            ready.put((chunk if place is None else place(chunk), None))
    except BaseException as raised:
        error = raised
    finally:
        try:
            if hasattr(chunks, "close"):
                chunks.close()
        except BaseException as raised:
            error = raised if isinstance(error, StopIteration) else error
        ready.put((None, error))
