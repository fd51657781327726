"""What `sample(..., callback=)` may call on the host."""

import threading

from jdiff.core.arrays import Array


class progress:
    """A tqdm bar as a callback: `sample(..., callback=jdiff.progress(len(times) - 1))`.

    `total`: the number of steps; other keywords are tqdm's. The bar stands at the latest step reported, so that calls
    out of order, or one per device, do no harm; it closes at the last, and the next run's first step opens another.
    Keep the object: a new one compiles the sampler anew. Raises ImportError without tqdm.
    """

    def __init__(self, total: int, **tqdm_kwargs):
        try:
            from tqdm.auto import tqdm
        except ImportError as error:
            raise ImportError("jdiff.progress needs tqdm: pip install tqdm") from error
        if total < 0:
            raise ValueError(f"progress: total is the number of steps, got {total}")
        self.total, self.bar, self.done = total, None, False
        self._open = lambda: tqdm(total=total, **tqdm_kwargs)
        self._lock = threading.Lock()

    def __call__(self, i, t: Array, x: Array) -> None:
        """Report that step i is over."""
        step = int(i) + 1
        with self._lock:
            if self.bar is None:
                if self.done and step > 1:  # a straggler of the run that is over
                    return
                self.bar, self.done = self._open(), False
            if step > self.bar.n:
                self.bar.update(step - self.bar.n)
            if step >= self.total:
                self.bar.close()
                self.bar, self.done = None, True
