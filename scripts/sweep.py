"""Search hyper-parameters: `python scripts/sweep.py CONFIG --param train.lr=1e-4:1e-2:log`, as `jdiff sweep`.

The code is in jdiff/commands/sweep.py. To change it, copy that file and run the copy.
"""

from jdiff_command import run

if __name__ == "__main__":
    run("sweep")
