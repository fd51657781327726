"""What every floor needs: pytrees of numbers, arrays, keys, names and files."""
