"""Train an ensemble on a task: ``python train.py --task addition``; ``--help`` explains the options."""

import sys

from ntk_ensembles.cli.train import train_command

if __name__ == "__main__":
    sys.exit(train_command())
