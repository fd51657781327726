"""Average parameters after training: `python scripts/posthoc_ema.py RUN_DIR --sigma-rel 0.075`, as `jdiff average`.

The code is in jdiff/commands/average.py. To change it, copy that file and run the copy.
"""

from jdiff_command import run

if __name__ == "__main__":
    run("average")
