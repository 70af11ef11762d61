"""The console script `ntk-ensembles`: one subcommand for each file of this folder that has a `*_command`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

COMMANDS: dict[str, str] = {
    "train": "train an ensemble, as train.py does",
    "evaluate": "judge a run again: other states, decoder or numbers of members",
    "merge": "one run from several that trained different members",
    "certify": "what is exact, and with how many members, before any training",
    "validate": "every input of a task by the NTK mean, compared with arithmetic",
    "run": "programs of the one-instruction computer, on the NTK limit or on trained networks",
}
"""Subcommands by name; ``NAME_command`` in the module of that name, imported only when it is used."""


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script; exit status of the subcommand, 2 for an unknown one."""
    arguments = sys.argv[1:] if arguments is None else arguments
    if arguments and arguments[0] in COMMANDS:
        name = arguments[0]
        command = getattr(importlib.import_module(f"ntk_ensembles.cli.{name}"), f"{name}_command")
        status: int = command(arguments[1:], f"ntk-ensembles {name}")
        return status
    lines = ["usage: ntk-ensembles COMMAND …", "", *(f"  {name:<10}{text}" for name, text in COMMANDS.items())]
    lines += ["", "ntk-ensembles COMMAND --help explains each."]
    asked = bool(arguments) and arguments[0] in ("-h", "--help")
    print("\n".join(lines), file=sys.stdout if asked else sys.stderr)
    return 0 if asked else 2
