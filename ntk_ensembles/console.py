"""Consoles that commands print to, texts and tables for them and for pages, and the one progress display."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from types import TracebackType
from typing import Literal, TypeAlias

from rich import progress
from rich.console import Console
from rich.table import Table
from rich.text import Text

SECONDS_BETWEEN_LINES = 20.0
"""Seconds from one line of progress to the next where there is no terminal."""

_WIDTH_OF_A_PIPE = 120


def console(*, stderr: bool = False) -> Console:
    """Return a console on standard output.

    Args:
        stderr: Whether to print to standard error instead, as messages do beside output that programs read.
    """
    stream = sys.stderr if stderr else sys.stdout
    # A pipe has no width; rich would assume 80 columns and break the cells of tables.
    return Console(stderr=stderr) if stream.isatty() else Console(stderr=stderr, width=_WIDTH_OF_A_PIPE)


@dataclass(frozen=True)
class Paragraph:
    """Sentences of an output.

    Attributes:
        text: The sentences, in plain text.
        kind: ``warning`` where something is wrong, ``note`` for what need not be read.
    """

    text: str
    kind: Literal["text", "warning", "note"] = "text"


@dataclass(frozen=True)
class TextTable:
    """Table of an output, in plain text.

    Attributes:
        title: Words above it.
        headings: Heading of each column.
        rows: Cells of each row.
        words: Columns of words, which stand at the left; the others are of numbers.
    """

    title: str
    headings: Sequence[str]
    rows: Sequence[Sequence[str]]
    words: Sequence[int] = (0,)


Part: TypeAlias = Paragraph | TextTable
"""What an output consists of."""


def print_parts(parts: Iterable[Part], console: Console) -> None:
    """Print paragraphs and tables.

    Args:
        parts: What to print.
        console: Console to print on.
    """
    styles = {"text": None, "warning": "bold red", "note": "dim"}
    for part in parts:
        if isinstance(part, Paragraph):
            console.print(part.text, style=styles[part.kind], highlight=False, markup=False)
            continue
        table = Table(title=part.title, title_justify="left")
        for place, heading in enumerate(part.headings):
            table.add_column(heading, justify="left" if place in part.words else "right")
        for row in part.rows:
            table.add_row(*row)
        console.print(table)


class Progress:
    """Display of how much of some work is done: a bar in a terminal, a line now and then in a pipe.

    A context manager; the display begins when it is entered and ends when it is left, whatever the reason.

    Args:
        label: Name of the work, in a word or two.
        total: Amount of work in any unit, or None where it is not known.
        console: Console to show the progress on.
        describe: Function from the amount that is done to a text such as ``12/64``. By default a percentage.
        completed: Amount that is done before the display begins, as in a run that is resumed.
        last_line: Whether a pipe gets a line at the end even if the work took less than 20 seconds.

    Attributes:
        completed: Amount that is done.
    """

    def __init__(
        self,
        label: str,
        total: int | float | None,
        console: Console,
        *,
        describe: Callable[[int | float], str] | None = None,
        completed: int | float = 0,
        last_line: bool = False,
    ) -> None:
        self.completed = completed
        self._label = label
        self._total = total
        self._note = ""
        self._console = console
        self._describe = self._percentage if describe is None else describe
        self._completed_before = self._completed_in_line = completed
        self._line_is_due_at_the_end = last_line
        self._started_at = self._last_line_at = time.monotonic()
        self._bar = progress.Progress(
            progress.TextColumn("[bold]{task.description}"),
            progress.BarColumn(),
            progress.TextColumn("{task.fields[done]}", markup=False),
            progress.TimeElapsedColumn(),
            progress.TextColumn("left"),
            progress.TimeRemainingColumn(),
            progress.TextColumn("{task.fields[note]}", markup=False),
            console=console,
        )
        self._task = self._bar.add_task(label, total=total, done="", note="")
        self._bar.update(self._task, completed=completed, done=self._describe(completed))

    def __enter__(self) -> Progress:
        self._started_at = self._last_line_at = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A bar that was never shown would end with an empty line.
        if self._console.is_terminal:
            self._bar.stop()
        elif self._line_is_due_at_the_end and self.completed > self._completed_in_line:
            self._print_line()

    def update(self, completed: int | float, note: str = "") -> None:
        """Show that an amount of the work is done.

        Args:
            completed: Amount that is done by now, from the beginning, in the unit of ``total``.
            note: Remark to show at the end of the line.
        """
        self.completed = completed
        self._note = note
        if self._console.is_terminal:
            self._bar.update(self._task, completed=completed, done=self._describe(completed), note=note)
        elif time.monotonic() - self._last_line_at >= SECONDS_BETWEEN_LINES:
            self._print_line()
            # Whoever has read that the work goes on will want to read that it has ended.
            self._line_is_due_at_the_end = True

    def advance(self, amount: int | float = 1, note: str | None = None) -> None:
        """Show that more of the work is done.

        Args:
            amount: Amount that has been done since the last call, in the unit of ``total``.
            note: Remark to show from now on. By default the last one stays.
        """
        self.update(self.completed + amount, self._note if note is None else note)

    def _print_line(self) -> None:
        self._last_line_at, self._completed_in_line = time.monotonic(), self.completed
        elapsed = self._last_line_at - self._started_at
        parts = [f"{self._label} {self._describe(self.completed)}", f"{elapsed:.0f} s"]
        done = self.completed - self._completed_before
        if self._total is not None and done > 0:
            parts.append(f"{elapsed / done * max(self._total - self.completed, 0):.0f} s left")
        if self._note:
            parts.append(self._note)
        self._console.print(Text(", ".join(parts)), soft_wrap=True)

    def _percentage(self, completed: int | float) -> str:
        return f"{min(completed / self._total, 1):.0%}" if self._total else ""
