"""The next chunk of data made ready by a background thread while the device works on this one."""

import queue
import threading
import time
from collections.abc import Callable, Iterable


class Prefetch:
    """An iterator over chunks that another thread has made ready; `waited` is the seconds its consumer waited.

    Also a context manager: leaving it, or `close()`, stops the thread and closes the source.
    """

    def __init__(self, chunks: Iterable, place: Callable | None = None, ahead: int = 1):
        if ahead < 1:
            raise ValueError(f"prefetch keeps at least 1 chunk ready; got ahead={ahead}")
        self.waited = 0.0
        self._ready, self._slots, self._stop = queue.SimpleQueue(), threading.Semaphore(ahead), threading.Event()
        # the thread knows nothing of self, so that a forgotten iterator is collected, and stops it
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
        """Stop reading; returns when the thread has finished the chunk it is at and closed the source."""
        self._halt()
        self._thread.join()

    def _halt(self) -> None:
        self._stop.set()
        self._slots.release()


def prefetch(chunks: Iterable, place: Callable | None = None, ahead: int = 1) -> Prefetch:
    """Run `chunks` in a background thread, `place` (such as `jax.device_put`) applied there, `ahead` of them ready.

    Errors of the source are raised in the consumer, in their turn. Raises ValueError unless ahead >= 1.
    """
    return Prefetch(chunks, place, ahead)


def _work(chunks, place, ready, slots, stop) -> None:
    """Fill `ready` with (chunk, None), and at the end one (None, error)."""
    error = StopIteration()
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
