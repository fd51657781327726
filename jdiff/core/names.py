"""What to say of a name that is not known."""

import difflib
from collections.abc import Iterable


def did_you_mean(name: str, names: Iterable[str]) -> str:
    """' (did you mean ...?)' for a near miss, else ''.

    >>> did_you_mean("hune", ["heun", "ddim"])
    " (did you mean 'heun'?)"
    """
    close = difflib.get_close_matches(name, list(names), 1)
    return f" (did you mean {close[0]!r}?)" if close else ""
