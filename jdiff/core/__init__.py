"""What every floor needs: pytrees of numbers, arrays, keys, names and files."""

__all__: list[str] = []  # `jdiff` hands on what users name
