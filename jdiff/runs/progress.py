"""What a command says on stderr while it works: what it does, how far it is, and the seconds that it took."""

import contextlib
import os
import sys
import threading
import time
from collections.abc import Callable, Iterator

from jdiff.core.extras import needs

EVERY = 10.0  # seconds between two lines, where there is no terminal


def on_terminal(file) -> bool:
    """Whether a bar can be drawn in a file: it is a terminal, and one that has a width."""
    try:
        return file.isatty() and os.get_terminal_size(file.fileno()).columns > 0
    except (OSError, ValueError):
        return False


class Progress:
    """Tells on stderr what is done: by a bar on a terminal, elsewhere by lines.

    Args:
        speaks: whether anything is told at all.
    """

    def __init__(self, speaks: bool = True):
        self.speaks = speaks

    def line(self, text: str) -> None:
        """Write a line, above the bars that there are."""
        if not self.speaks:
            return
        if on_terminal(sys.stderr):
            _tqdm().write(text, file=sys.stderr)
        else:
            with contextlib.suppress(OSError):  # a terminal that was closed does not matter
                print(text, file=sys.stderr, flush=True)

    @contextlib.contextmanager
    def stage(self, what: str) -> Iterator[None]:
        """Tell that the block does `what`, and afterwards how many seconds it took."""
        start = time.perf_counter()
        bar = None
        if self.speaks and on_terminal(sys.stderr):
            bar = _tqdm()(desc=what, bar_format="{desc} ... {elapsed}", leave=False, file=sys.stderr)
        else:
            self.line(f"{what} ...")
        with _ticking(bar):
            yield
        self._took(what, start)

    @contextlib.contextmanager
    def count(self, what: str, total: int, unit: str) -> Iterator[Callable[[int], None]]:
        """Tell how much of `total` is done in the block, which is given `advance(number)` to say so."""
        if not self.speaks:
            yield lambda number: None
            return
        start = spoke = time.perf_counter()
        done, bar = 0, None
        if on_terminal(sys.stderr):
            bar = _tqdm()(desc=what, total=total, unit=unit, leave=False, file=sys.stderr, dynamic_ncols=True)
        else:
            self.line(f"{what} ...")

        def advance(number: int) -> None:
            nonlocal done, spoke
            done, now = done + number, time.perf_counter()
            if bar is not None:
                bar.update(number)
            elif now - spoke > EVERY and done < total:
                left = (now - start) * (total - done) / done
                self.line(f"{what}: {done:,} of {total:,} {unit}s, {left:,.0f} s left")
                spoke = now

        with _ticking(bar):
            yield advance
        self._took(what, start)

    def _took(self, what: str, start: float) -> None:
        if (seconds := time.perf_counter() - start) > 0.5:  # a short one is no news
            self.line(f"{what}: {seconds:.1f} s")


SILENT = Progress(speaks=False)


@contextlib.contextmanager
def _ticking(bar) -> Iterator[None]:
    """Draw a bar again each second, so that its seconds are seen to run, and remove it at the end."""
    if bar is None:
        yield
        return
    over = threading.Event()

    def tick():
        while not over.wait(1.0):
            bar.refresh()

    thread = threading.Thread(target=tick, daemon=True)
    thread.start()
    try:
        yield
    finally:
        over.set()
        thread.join()
        bar.close()


def _tqdm():
    with needs("progress is shown by"):
        from tqdm import tqdm
    return tqdm
