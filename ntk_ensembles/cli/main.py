"""The console script ``ntk-ensembles`` with its subcommands, and how every command begins and ends.

Exit status of all commands:

====  =====================================================================================================
0     Done.
1     Done, with a negative result (not every member converged, not exact, a wrong bit), or given up because
      the machine failed (disk, memory, the reader of the output).
2     Bad input: arguments, files or directories that cannot be used.
130   Interrupted by Ctrl-C.
143   Ended by SIGTERM.
====  =====================================================================================================
"""

from __future__ import annotations

import argparse
import difflib
import errno
import functools
import importlib
import io
import os
import re
import signal
import sys
import threading
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from types import FrameType
from typing import NoReturn, Protocol, runtime_checkable

import ntk_ensembles
from ntk_ensembles.errors import OptionError
from ntk_ensembles.files import SaveError

COMMANDS: dict[str, str] = {
    "train": "train an ensemble, as train.py does",
    "evaluate": "evaluate a run again: other states, another decoder, other numbers of members",
    "report": "draw and tabulate one run, or several side by side, on one HTML page",
    "merge": "put runs that trained different members into one",
    "certify": "compute what is exact, and with how many members, before any training",
    "plan": "find the width, the members and the labels that reach a target, and their cost on this machine",
    "validate": "execute every input of a task by the NTK mean and compare it with arithmetic",
    "reproduce": "train the paper's ensembles that permute bits, and compare the members needed with the published",
    "run": "execute programs of the one-instruction computer on the NTK limit or on trained networks",
}
"""Subcommands by name; ``NAME_command`` in the module of that name is imported when it is used."""

_EPILOG = (
    "ntk-ensembles COMMAND --help explains each. Exit status: 0 done; 1 a negative result, or the machine failed; 2 "
    "bad input; 130 interrupted by Ctrl-C; 143 ended by SIGTERM."
)
_ECHO_MAX, _LINE_MAX = 200, 2000
"""Characters of one word of the user's in a message, and of a message."""
_FAILURES_OF_THE_MACHINE = (errno.ENOSPC, errno.EDQUOT, errno.EIO, errno.EMFILE, errno.ENFILE, errno.ENOMEM)


@runtime_checkable
class Command(Protocol):
    """Function from the arguments of a command line to an exit status."""

    def __call__(self, arguments: Sequence[str] | None = None, prog: str = ...) -> int:
        """Run the command.

        Args:
            arguments: Arguments after the command's name. By default those of this process.
            prog: Name of the command for usage and messages.
        """


def command(prog: str) -> Callable[[Callable[[list[str], str], int]], Command]:
    """Wrap ``body(arguments, prog)`` as a console command that reports errors in one line.

    This is where errors are put into the words of the command line. The exit status for each is in the table at the
    top of this module.

    Args:
        prog: Name of the command if it is called by no other.
    """

    def decorate(body: Callable[[list[str], str], int]) -> Command:
        @functools.wraps(body)
        def run(arguments: Sequence[str] | None = None, prog: str = prog) -> int:
            for stream in (sys.stdout, sys.stderr):
                # In an ASCII environment a "≤" must not end a run that has taken hours. There, Python may have chosen
                # "surrogateescape", which is for the bytes of names of files alone.
                if isinstance(stream, io.TextIOWrapper) and stream.errors in ("strict", "surrogateescape"):
                    stream.reconfigure(errors="replace")
            with _sigterm_as_interrupt() as terminated:
                try:
                    status = body(list(sys.argv[1:] if arguments is None else arguments), prog)
                    sys.stdout.flush()
                except BrokenPipeError:
                    # Whoever read the output has seen enough (`… | head`); nothing can be written, at exit either.
                    os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
                    return 1
                except argparse.ArgumentError as error:
                    _print_error(prog, f"{error} (see {prog} --help)")
                    return 2
                except (MemoryError, SaveError) as error:
                    _print_error(prog, str(error) or "out of memory")
                    return 1
                except (OSError, ValueError) as error:
                    _print_error(prog, error_text(error))
                    return 1 if isinstance(error, OSError) and error.errno in _FAILURES_OF_THE_MACHINE else 2
                except KeyboardInterrupt as interrupt:
                    reason, status = ("terminated", 143) if terminated else ("interrupted", 130)
                    print(f"{prog}: {str(interrupt) or reason}", file=sys.stderr)
                    # A run that was interrupted knows by what.
                    return int(getattr(interrupt, "exit_status", status))
                return status

        return run

    return decorate


def main(arguments: Sequence[str] | None = None) -> int:
    """Run a subcommand of ``ntk-ensembles`` and return its exit status.

    Args:
        arguments: Name of the subcommand and its arguments. By default those of this process.
    """
    name, *rest = (sys.argv[1:] if arguments is None else list(arguments)) or [""]
    if name not in COMMANDS:
        return _overview([name, *rest])
    return load_command(name)(rest, f"ntk-ensembles {name}")


def load_command(name: str) -> Command:
    """Import a command, with a notice in a terminal meanwhile: PyTorch alone takes a second.

    Args:
        name: Key of `COMMANDS`.
    """
    notice = "starting …"
    # Plain text: rich, which draws the other displays, takes time to import too.
    shown = sys.stderr.isatty()
    if shown:
        print(notice, end="\r", file=sys.stderr, flush=True)
    try:
        loaded: Command = getattr(importlib.import_module(f"ntk_ensembles.cli.{name}"), f"{name}_command")
    finally:
        if shown:
            print(" " * len(notice), end="\r", file=sys.stderr, flush=True)
    return loaded


@command("ntk-ensembles")
def _overview(arguments: list[str], prog: str) -> int:
    """Answer a command line that begins with no subcommand."""
    usage = "%(prog)s [-h] [--version] COMMAND ..."
    parser = argparse.ArgumentParser(prog=prog, usage=usage, epilog=_EPILOG)
    parser.add_argument("--version", action="version", version=f"%(prog)s {ntk_ensembles.__version__}")
    commands = parser.add_argument_group("commands")
    for name, text in COMMANDS.items():
        # For the help alone. Subparsers are printed further in, with the longest name on a line of its own.
        commands.add_argument(name, help=text)
    word = arguments[0]
    if word in ("-h", "--help", "--version"):
        parser.parse_args([word])
    if word:
        hint = suggestion(word, [*COMMANDS, "--help", "--version"])
        raise ValueError(f"{word}: expected one of {', '.join(COMMANDS)}{hint}")
    parser.print_help(sys.stderr)
    return 2


def suggestion(word: str, known: Iterable[str]) -> str:
    """Return the end of an error message that names the known word nearest to what the user wrote.

    Args:
        word: Word that is not known.
        known: Words that are.

    Returns:
        ``; did you mean X?``, or nothing where no known word is similar.
    """
    # The search takes time that grows with the square of the length.
    nearest = difflib.get_close_matches(word[:_ECHO_MAX], list(known), n=1)
    return f"; did you mean {nearest[0]}?" if nearest else ""


def error_text(error: Exception) -> str:
    """Return the message of an error in the words of the command line, where an argument is a flag."""
    if isinstance(error, OSError) and error.filename is not None and error.strerror:
        return f"{error.filename}: {error.strerror.lower()}"
    if not isinstance(error, OptionError):
        return str(error)
    value = ("none" if error.value is None else str(error.value)) or "''"
    echo = value if len(value) <= _ECHO_MAX else f"{value[:_ECHO_MAX]}…"
    return f"--{error.argument.replace('_', '-')} {echo}: expected {error.expected}"


def _print_error(prog: str, message: str) -> None:
    """Print an error on one line, which no length and no control characters in the user's input can spoil."""
    printable = "".join(character if character.isprintable() else " " for character in message)
    line = re.sub(rf"(\S{{{_ECHO_MAX}}})\S+", r"\1…", " ".join(printable.split()))
    print(f"{prog}: error: {line if len(line) <= _LINE_MAX else line[:_LINE_MAX] + '…'}", file=sys.stderr)


@contextmanager
def _sigterm_as_interrupt() -> Iterator[list[int]]:
    """Let SIGTERM end a command as Ctrl-C does; the list that is yielded holds the signal once it has come."""
    received: list[int] = []

    def interrupt(number: int, frame: FrameType | None) -> NoReturn:
        # Whoever sends it again must not interrupt what saves the work.
        signal.signal(signal.SIGTERM, signal.SIG_IGN)
        received.append(number)
        raise KeyboardInterrupt

    # Only the main thread may set handlers; one that somebody else has set stays.
    mine = threading.current_thread() is threading.main_thread() and signal.getsignal(signal.SIGTERM) is signal.SIG_DFL
    if mine:
        signal.signal(signal.SIGTERM, interrupt)
    try:
        yield received
    finally:
        if mine:
            signal.signal(signal.SIGTERM, signal.SIG_DFL)
