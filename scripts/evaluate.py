"""Measure a trained run: `python scripts/evaluate.py RUN_DIR [--num 500 ...]`, as `jdiff evaluate`.

The code is in jdiff/commands/evaluate.py. To change it, copy that file and run the copy.
"""

from jdiff_command import run

if __name__ == "__main__":
    run("evaluate")
