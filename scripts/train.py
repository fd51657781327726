"""Train a diffusion model: `python scripts/train.py CONFIG [--run-dir DIR] [--train.steps N ...]`, as `jdiff train`.

The code is in jdiff/commands/train.py. To change it, copy that file and run the copy.
"""

from jdiff_command import run

if __name__ == "__main__":
    run("train")
