"""Sample from a trained run: `python scripts/sample.py RUN_DIR [--num 500 ...]`, as `jdiff sample`.

The code is in jdiff/commands/sample.py. To change it, copy that file and run the copy.
"""

from jdiff_command import run

if __name__ == "__main__":
    run("sample")
