"""`train.py` and the console script `ntk-ensembles`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence

from rich.console import Console

from ntk_ensembles.cli.parsing import parse_run
from ntk_ensembles.training.run import train


def train_command(arguments: Sequence[str] | None = None, prog: str = "train.py") -> int:
    """Train an ensemble; exit status 0, 1 if no member converged, 2 for bad input, 130 if interrupted."""
    task, options, config = parse_run(sys.argv[1:] if arguments is None else arguments, prog)
    try:
        results = train(task, options, config, _console())
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"{prog}: interrupted; finished cohorts are in the run's checkpoints", file=sys.stderr)
        return 130
    return 0 if results["convergence"] else 1


def _console() -> Console:
    # A pipe has no width; rich would take 80 columns and break the table's cells.
    return Console() if sys.stdout.isatty() else Console(width=120)


COMMANDS: dict[str, Callable[[Sequence[str], str], int]] = {"train": train_command}
"""Subcommands of ``ntk-ensembles``."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script ``ntk-ensembles``."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        return COMMANDS[arguments[0]](arguments[1:], f"ntk-ensembles {arguments[0]}")
    text = f"usage: ntk-ensembles {{{','.join(COMMANDS)}}} …; ntk-ensembles COMMAND --help explains each"
    asked = arguments and arguments[0] in ("-h", "--help")
    print(text, file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
