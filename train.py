"""Train an ensemble on a task: ``python train.py --task addition``; ``--help`` explains the options."""

import sys

from ntk_ensembles.cli.main import load_command

# Processes of --devices import this file too, and need no command.
if __name__ == "__main__":
    sys.exit(load_command("train")())
