"""`ntk-ensembles merge`: one run from several."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from ntk_ensembles.cli.parsing import OneLineParser
from ntk_ensembles.cli.terminal import console
from ntk_ensembles.training.merge import merge
from ntk_ensembles.training.store import SaveError

_DESCRIPTION = (
    "Put runs that trained different members of one ensemble (--first-member; several machines, a job array) into a "
    "new run, as if one run had trained them all. They must have the same configuration and no member in common."
)


def merge_command(arguments: Sequence[str] | None = None, prog: str = "ntk-ensembles merge") -> int:
    """Merge runs; exit status 0, 1 if the disk gave out, 2 for runs that cannot be merged."""
    parser = OneLineParser(prog=prog, description=_DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN_DIR", help="Two or more run directories.")
    parser.add_argument("--out", type=str, help="Directory of the merged run. By default a fresh one under runs/.")
    parser.finish()
    options = parser.parse_args(sys.argv[1:] if arguments is None else list(arguments))
    try:
        merge([Path(name) for name in options.runs], options.out, console())
    except ValueError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 2
    except SaveError as error:
        print(f"{prog}: error: {error}", file=sys.stderr)
        return 1
    return 0
