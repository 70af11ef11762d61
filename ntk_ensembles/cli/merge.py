"""`ntk-ensembles merge`: one run from several."""

from __future__ import annotations

import time
from pathlib import Path

from ntk_ensembles.cli.main import command
from ntk_ensembles.cli.parsing import Parser
from ntk_ensembles.console import console
from ntk_ensembles.runs import Dashboard, merge_runs

_DESCRIPTION = (
    "Put runs that trained different members of one ensemble (--first-member; several machines, a job array) into a "
    "new run, as if one run had trained them all. They must have the same configuration and no member in common."
)


@command("ntk-ensembles merge")
def merge_command(arguments: list[str], prog: str) -> int:
    """Merge runs into a new one."""
    started_at = time.time()
    parser = Parser(prog, _DESCRIPTION)
    parser.add_argument("runs", nargs="+", type=str, metavar="RUN_DIR", help="Two or more run directories.")
    parser.add_argument("--out", type=str, help="Directory of the merged run. By default a fresh one under runs/.")
    options = parser.parse(arguments)
    run, results = merge_runs([Path(name) for name in options["runs"]], options["out"])
    Dashboard(run).conclude(run.member_results(), results, console(), started_at)
    return 0
