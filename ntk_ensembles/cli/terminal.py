"""Where commands print, and how they end."""

from __future__ import annotations

import functools
import os
import sys
from collections.abc import Callable, Sequence
from typing import Protocol, runtime_checkable

from rich.console import Console

from ntk_ensembles.files import SaveError


@runtime_checkable
class Command(Protocol):
    """A command: from arguments, by default the program's, to an exit status."""

    def __call__(self, arguments: Sequence[str] | None = None, prog: str = ...) -> int:
        """Do it; ``prog`` is its name in messages."""


def command(prog: str) -> Callable[[Callable[[list[str], str], int]], Command]:
    """A command from what it does with its arguments and its name; what goes wrong is said in one line.

    The exit status is then 2 for bad input (ValueError, OSError), 1 if the disk, the memory or the reader of the
    output gave out, 130 if interrupted.
    """

    def decorate(body: Callable[[list[str], str], int]) -> Command:
        @functools.wraps(body)
        def run(arguments: Sequence[str] | None = None, prog: str = prog) -> int:
            try:
                status = body(list(sys.argv[1:] if arguments is None else arguments), prog)
                sys.stdout.flush()
            except BrokenPipeError:
                # Whoever read the output has seen enough (`… | head`); nothing more can be written, at exit either.
                os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                return 1
            except (MemoryError, SaveError) as error:
                print(f"{prog}: error: {str(error) or 'out of memory'}", file=sys.stderr)
                return 1
            except (OSError, ValueError) as error:
                print(f"{prog}: error: {error}", file=sys.stderr)
                return 2
            except KeyboardInterrupt as interrupt:
                print(f"{prog}: {str(interrupt) or 'interrupted'}", file=sys.stderr)
                return 130
            return status

        return run

    return decorate


def console(*, stderr: bool = False) -> Console:
    """A console on standard output, or on standard error for progress beside output that is read by programs."""
    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width; rich would take 80 columns and break the table's cells.
    return Console(stderr=stderr) if stream.isatty() else Console(stderr=stderr, width=120)
