"""What `sample(..., callback=)` may call on the host."""

import threading
from collections.abc import Callable
from typing import Any

import numpy as np

from jdiff.core.arrays import Array
from jdiff.core.extras import needs


class progress:
    """A tqdm bar as a callback, and on request a live preview: `sample(..., callback=jdiff.progress(len(times) - 1))`.

    The bar stands at the latest step reported, so that calls out of order, or one per device, do no harm. It closes at
    the last step, and the next run's first step opens another. Keep the object: a new one compiles the sampler anew.

    Args:
        total: the number of steps.
        show: a preview, `show(step, x0)`, called on the host with the number of steps done and the estimate of x_0 with
            which the last of them began, a NumPy array (B, ...); None for no preview.
        tqdm_kwargs: other keywords are tqdm's.

    Raises:
        ImportError: without tqdm.
        ValueError: for a negative total.
    """

    def __init__(self, total: int, show: Callable[[int, np.ndarray], object] | None = None, **tqdm_kwargs):
        with needs("jdiff.progress needs"):
            from tqdm.auto import tqdm
        if total < 0:
            raise ValueError(f"progress: total is the number of steps, got {total}")
        self.total, self.show, self.done = total, show, False
        self.bar: Any = None
        self._open = lambda: tqdm(total=total, **tqdm_kwargs)
        self._lock = threading.Lock()

    def __call__(self, i, t: Array, x: Array, x0: Array) -> None:
        """Report that step i is over."""
        step = int(i) + 1
        with self._lock:
            if self.bar is None:
                if self.done and step > 1:  # a straggler of the run that is over
                    return
                self.bar, self.done = self._open(), False
            if step > self.bar.n:
                self.bar.update(step - self.bar.n)
                if self.show is not None:
                    self.show(step, np.asarray(x0))
            if step >= self.total:
                self.bar.close()
                self.bar, self.done = None, True
