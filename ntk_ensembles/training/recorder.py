"""Saves each cohort when it is done, and charts the ensemble so far."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from torch.utils.tensorboard import SummaryWriter

from ntk_ensembles.ensemble import TrainedCohort
from ntk_ensembles.theory import DECODERS
from ntk_ensembles.training.metrics import ExactMatch
from ntk_ensembles.training.module import EnsembleModule, MembersDataModule
from ntk_ensembles.training.records import Records
from ntk_ensembles.training.results import TENSORBOARD
from ntk_ensembles.training.store import RunStore


class Gather(Callback):
    """Gathers the records of all processes when each has trained its members.

    Attributes:
        records: of all members; None until then.
    """

    def __init__(self) -> None:
        self.records: Records | None = None

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Exchange them; every process takes part."""
        assert isinstance(pl_module, EnsembleModule)
        self.records = pl_module.records.gathered()


class RunRecorder(Callback):
    """Every process saves its own members; the first also charts what it has seen.

    Args:
        earlier: members of earlier sessions, for the charts.
    """

    def __init__(self, earlier: Records | None = None) -> None:
        self._store: RunStore | None = None
        self._writer: Any = None
        self._count = self._converged = 0
        self._sum: torch.Tensor | None = None
        if earlier is not None:
            self._add(len(earlier), earlier.deviations[earlier.converged])

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Open the run that the first process has begun."""
        datamodule = trainer.datamodule  # type: ignore[attr-defined]
        assert isinstance(datamodule, MembersDataModule)
        assert datamodule.plan is not None
        self._store = RunStore.open(Path(datamodule.plan.directory))
        if trainer.is_global_zero:
            self._writer = SummaryWriter(str(self._store.directory / TENSORBOARD))

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a cohort and chart the ensemble so far."""
        assert isinstance(pl_module, EnsembleModule)
        cohort = pl_module.cohort
        if cohort is None:
            return
        assert self._store is not None
        self._store.save(pl_module.cohort_records, cohort.weights)
        if self._writer is not None:
            self._chart(pl_module, cohort)

    def _add(self, members: int, deviations: torch.Tensor) -> None:
        self._count += members
        self._converged += len(deviations)
        added = deviations.sum(0, dtype=torch.float64)
        self._sum = added if self._sum is None else self._sum + added

    def _chart(self, module: EnsembleModule, cohort: TrainedCohort) -> None:
        self._add(len(cohort.indices), module.cohort_records.deviations[cohort.converged])
        if not self._converged or self._sum is None:
            return
        for decoder in DECODERS:
            # Of this process alone: the others are not asked.
            exact = ExactMatch(sync_on_compute=False)
            decoded = module.theory.decode(self._sum / self._converged, decoder)
            exact.update(decoded, module.theory.evaluation.next_states)
            self._writer.add_scalar(f"so_far/exact_match_{decoder}", float(exact.compute()), self._count)
        worst = max(status.relative_loss for status in cohort.statuses)
        self._writer.add_scalar("so_far/relative_loss_of_cohort", worst, self._count)
        self._writer.flush()

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Close the charts."""
        if self._writer is not None:
            self._writer.close()
