"""Where commands print."""

from __future__ import annotations

import sys

from rich.console import Console


def console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error for progress beside output that is read by programs."""
    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width; rich would take 80 columns and break the table's cells.
    return Console(stderr=stderr) if stream.isatty() else Console(stderr=stderr, width=120)
