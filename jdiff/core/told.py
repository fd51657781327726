"""Warnings that a command tells its user, each as one line."""

import contextlib
import sys
import warnings
from collections.abc import Iterator

import jax


@contextlib.contextmanager
def told(kind: type[Warning]) -> Iterator[None]:
    """Print each warning of a kind in a block as one line on stderr; of several processes, only the first prints.

    Other warnings are shown as usual.

    Args:
        kind: the class of the warnings.
    """
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", kind)
        try:
            yield
        finally:
            ours = [w for w in caught if issubclass(w.category, kind)]
            for warning in ours if jax.process_index() == 0 else []:
                print(f"warning: {warning.message}", file=sys.stderr)
    for w in caught:
        if w not in ours:
            warnings.warn_explicit(w.message, w.category, w.filename, w.lineno)
