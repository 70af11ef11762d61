"""How far a command has come: a bar in a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from types import TracebackType

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskProgressColumn, TextColumn, TimeElapsedColumn, TimeRemainingColumn

_SECONDS_BETWEEN_LINES = 20.0


class WorkProgress:
    """Share of the work done, time passed and time left; a context manager.

    Args:
        label: what is being done.
        total: how much work there is, in any unit.
        console: where to.
    """

    def __init__(self, label: str, total: int, console: Console) -> None:
        self._label = label
        self._total = total
        self._console = console
        self._done = 0
        self._started_at = self._said_at = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]{task.description}"),
            BarColumn(),
            TaskProgressColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            console=console,
        )
        self._task = self._bar.add_task(label, total=total)

    def __enter__(self) -> WorkProgress:
        if self._console.is_terminal:
            self._bar.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        # A bar that was never shown would end with an empty line.
        if self._console.is_terminal:
            self._bar.stop()

    def advance(self, work: int, label: str | None = None) -> None:
        """Count work as done; ``label`` replaces what is said to be done from now on."""
        self._done += work
        self._label = label or self._label
        self._bar.update(self._task, completed=self._done, description=self._label)
        now = time.monotonic()
        if self._console.is_terminal or now - self._said_at < _SECONDS_BETWEEN_LINES or not self._done:
            return
        self._said_at = now
        elapsed = now - self._started_at
        left = elapsed / self._done * max(self._total - self._done, 0)
        share = min(self._done / self._total, 1)
        self._console.print(f"{self._label}: {share:.0%}, {elapsed:.0f} s, {left:.0f} s left", highlight=False)
