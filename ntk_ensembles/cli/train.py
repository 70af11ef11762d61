"""`train.py`, and `ntk-ensembles train`."""

from __future__ import annotations

import sys
from collections.abc import Sequence

import yaml

from ntk_ensembles.cli.parsing import parse_task
from ntk_ensembles.cli.terminal import console
from ntk_ensembles.training.run import RunOptions, train

_DESCRIPTION = (
    "Train an ensemble of wide two-layer networks on a task's templates and measure it against the NTK prediction. "
    "The quickest look: --task addition. Options can stand in YAML files too; flags go over them."
)


def train_command(arguments: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Train an ensemble; exit status 0, 1 if no member converged, 2 for bad input, 130 if interrupted."""
    arguments = sys.argv[1:] if arguments is None else arguments
    task, options, values = parse_task(arguments, prog, _DESCRIPTION, RunOptions)
    config = yaml.safe_dump({key: value for key, value in values.items() if key != "out"}, sort_keys=False)
    try:
        results = train(task, options, config, console())
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; finished cohorts are in the run's checkpoints", file=sys.stderr)
        return 130
    return 0 if results["convergence"] else 1
