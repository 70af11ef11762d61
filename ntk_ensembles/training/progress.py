"""Progress over members: a bar in a terminal, a line now and then in a pipe."""

from __future__ import annotations

import time
from typing import Any

from lightning import Callback, LightningModule, Trainer
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from ntk_ensembles.training.module import EnsembleModule

_SECONDS_BETWEEN_LINES = 20.0


class MemberProgress(Callback):
    """Shows members done, time left and how training goes.

    Args:
        members: how many this process will train.
        console: where to.
    """

    def __init__(self, members: int, console: Console) -> None:
        self._members = members
        self._console = console
        self._done = 0
        self._failed = 0
        self._worst = 0.0
        self._started_at = self._said_at = time.monotonic()
        self._bar = Progress(
            TextColumn("[bold]members"),
            BarColumn(),
            TextColumn("{task.completed}/{task.total}"),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
            console=console,
        )
        self._task = self._bar.add_task("members", total=members, note="")

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Begin to show it."""
        self._started_at = self._said_at = time.monotonic()
        if self._console.is_terminal:
            self._bar.start()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Count a cohort."""
        assert isinstance(pl_module, EnsembleModule)
        if pl_module.cohort is None:
            return
        statuses = pl_module.cohort.statuses
        self._done += len(statuses)
        self._failed += sum(not status.converged for status in statuses)
        self._worst = max([self._worst, *(status.relative_loss for status in statuses)])
        note = f"relative loss ≤ {self._worst:.1e} in {max(status.steps for status in statuses)} steps"
        if self._failed:
            note = f"{self._failed} did not converge; {note}"
        self._bar.update(self._task, completed=self._done, note=note)
        now = time.monotonic()
        elapsed = now - self._started_at
        due = now - self._said_at >= _SECONDS_BETWEEN_LINES or self._done == self._members
        if due and not self._console.is_terminal:
            self._said_at = now
            left = elapsed / self._done * (self._members - self._done)
            self._console.print(
                f"members {self._done}/{self._members}, {elapsed:.0f} s, {left:.0f} s left, {note}", highlight=False
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Leave the bar as it is."""
        self._bar.stop()

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Give the terminal back."""
        self._bar.stop()
