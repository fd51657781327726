"""Look at data before training: `python scripts/inspect_data.py CONFIG [--data.args.path DIR ...]`, as `jdiff inspect`.

The code is in jdiff/commands/inspect_data.py. To change it, copy that file and run the copy.
"""

from jdiff_command import run

if __name__ == "__main__":
    run("inspect")
