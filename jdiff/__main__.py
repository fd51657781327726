"""`python -m jdiff COMMAND ...` is the command `jdiff`."""

from jdiff_command import main

if __name__ == "__main__":
    main()
