"""What a run leaves in its directory (DESIGN §6)."""

from __future__ import annotations

import json
import math
import os
import platform
import resource
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import TensorBoardLogger
from safetensors.torch import save_file
from torch.utils.tensorboard import SummaryWriter

from ntk_ensembles.ensemble import MemberStatus, TrainedCohort
from ntk_ensembles.tasks import Task
from ntk_ensembles.theory import DECODERS, Decoder, ExactMatchBand
from ntk_ensembles.training.convergence import ConvergenceRow, convergence
from ntk_ensembles.training.figures import convergence_figure
from ntk_ensembles.training.metrics import ExactMatch
from ntk_ensembles.training.module import EnsembleModule


class RunRecorder(Callback):
    """Saves each cohort when it is done, and at the end the results, figures and charts.

    Args:
        directory: the run's, which exists.
        task: for the results.
        description: what else the results say of the run: seeds, width, init, loss, precision.

    Attributes:
        results: the content of ``results.json``; None until training has ended.
        statuses: of all members so far, by index.
    """

    def __init__(self, directory: Path, task: Task[Any, Any], description: dict[str, Any]) -> None:
        self._directory = directory
        self._task = task
        self._description = description
        self._seconds = {"init": 0.0, "train": 0.0, "evaluate": 0.0}
        self._started_at = time.perf_counter()
        self._sum: torch.Tensor | None = None
        self.statuses: dict[int, MemberStatus] = {}
        self.results: dict[str, Any] | None = None

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Save a cohort and chart the ensemble so far."""
        assert isinstance(pl_module, EnsembleModule)
        cohort = pl_module.cohort
        assert cohort is not None
        self.statuses.update(zip(cohort.indices, cohort.statuses, strict=True))
        for phase, seconds in cohort.seconds.items():
            self._seconds[phase] += seconds
        self._save(cohort, pl_module.cohort_deviations)
        self._chart_so_far(pl_module, cohort)

    def _save(self, cohort: TrainedCohort, deviations: torch.Tensor) -> None:
        folder = self._directory / "checkpoints"
        folder.mkdir(exist_ok=True)
        tensors = {
            "indices": torch.tensor(cohort.indices),
            "converged": torch.tensor([status.converged for status in cohort.statuses]),
            "steps": torch.tensor([status.steps for status in cohort.statuses]),
            "relative_loss": torch.tensor([status.relative_loss for status in cohort.statuses], dtype=torch.float64),
            "deviations": deviations,
        }
        name = f"members-{cohort.indices[0]:06d}-{cohort.indices[-1]:06d}.safetensors"
        write_atomically(folder / name, lambda path: save_file(tensors, path))

    def _chart_so_far(self, module: EnsembleModule, cohort: TrainedCohort) -> None:
        if not isinstance(module.logger, TensorBoardLogger) or not cohort.converged:
            return
        added = module.cohort_deviations[cohort.converged].sum(0, dtype=torch.float64)
        self._sum = added if self._sum is None else self._sum + added
        count = sum(status.converged for status in self.statuses.values())
        writer = module.logger.experiment
        for decoder in DECODERS:
            exact = ExactMatch()
            exact.update(module.theory.decode(self._sum / count, decoder), module.theory.evaluation.successors)
            writer.add_scalar(f"so_far/exact_match_{decoder}", float(exact.compute()), len(self.statuses))
        worst = max(status.relative_loss for status in cohort.statuses)
        writer.add_scalar("so_far/relative_loss_of_cohort", worst, len(self.statuses))

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Compute every statistic and write it down."""
        assert isinstance(pl_module, EnsembleModule)
        rows: list[ConvergenceRow] = []
        if pl_module.deviations.indices:
            _, deviations = pl_module.deviations.compute()
            rows = convergence(pl_module.theory, deviations)
            bands: dict[Decoder, ExactMatchBand] = {
                decoder: pl_module.theory.band([row.members for row in rows], decoder) for decoder in DECODERS
            }
            self._draw(rows, bands, pl_module.logger)
        if isinstance(pl_module.logger, TensorBoardLogger):
            self._chart(rows, pl_module.logger)
        self.results = self._summary(pl_module, rows)
        text = json.dumps(self.results, indent=2, allow_nan=False)
        write_atomically(self._directory / "results.json", lambda path: path.write_text(text + "\n", encoding="utf-8"))

    def _draw(self, rows: list[ConvergenceRow], bands: dict[Decoder, ExactMatchBand], logger: Any) -> None:
        description = self._description
        title = f"{self._task!r}: {len(self._task.templates)} templates, width {description['width']}, "
        title += f"{description['init']}, {rows[-1].members} members"
        figure = convergence_figure(rows, bands, title)
        (self._directory / "figures").mkdir(exist_ok=True)
        path = self._directory / "figures" / "convergence.png"
        write_atomically(path, lambda part: figure.savefig(part, dpi=150, format="png"))
        if isinstance(logger, TensorBoardLogger):
            logger.experiment.add_figure("convergence", figure)

    def _chart(self, rows: list[ConvergenceRow], logger: TensorBoardLogger) -> None:
        """Measured and predicted values under one tag, from one writer each, so that they share a chart."""
        for decoder in DECODERS:
            series = {
                "measured": [(row.exact_match, row.bit_accuracy, row.rms_deviation) for row in rows],
                "predicted": [
                    (row.predicted_exact_match, row.predicted_bit_accuracy, row.predicted_rms_deviation) for row in rows
                ],
            }
            for kind, values in series.items():
                writer: Any = SummaryWriter(str(Path(logger.log_dir) / f"{kind} ({decoder})"))
                for row, (exact, bits, deviation) in zip(rows, values, strict=True):
                    writer.add_scalar("members/exact_match", exact[decoder], row.members)
                    writer.add_scalar("members/bit_accuracy", bits[decoder], row.members)
                    # Of the outputs, before any decoder: one pair of lines is all of it.
                    if decoder == DECODERS[0]:
                        writer.add_scalar("members/rms_deviation", deviation, row.members)
                writer.close()
        for step, losses in enumerate(_losses_by_step(list(self.statuses.values()))):
            logger.experiment.add_scalar("training/relative_loss_mean", sum(losses) / len(losses), step)
            logger.experiment.add_scalar("training/relative_loss_max", max(losses), step)

    def _summary(self, module: EnsembleModule, rows: list[ConvergenceRow]) -> dict[str, Any]:
        statuses = self.statuses.values()
        losses = [status.relative_loss for status in statuses]
        finite = all(math.isfinite(loss) for loss in losses)
        return {
            "task": {"name": self._task.name, **self._task.options},
            **self._description,
            "templates": len(self._task.templates),
            "state_bits": self._task.layout.bits,
            "evaluation_states": len(module.theory.evaluation),
            "executions": len(module.theory.evaluation.executions),
            "convergence": [asdict(row) for row in rows],
            "training": {
                "steps_max": max(status.steps for status in statuses),
                "relative_loss_max": max(losses) if finite else None,
                "not_converged": sorted(i for i, status in self.statuses.items() if not status.converged),
                "seconds": {**self._seconds, "total": time.perf_counter() - self._started_at},
                "peak_memory_bytes": peak_memory(module.device),
            },
            "environment": environment(module.device, str(module.recipe.dtype)),
        }


def _losses_by_step(statuses: list[MemberStatus]) -> list[list[float]]:
    """For every step the relative losses of the members that got so far and are finite."""
    steps = max(len(status.losses) for status in statuses)
    table: list[list[float]] = [[] for _ in range(steps)]
    for status in statuses:
        for step, loss in enumerate(status.losses):
            if math.isfinite(loss) and status.losses[0]:
                table[step].append(loss / status.losses[0])
    return [losses for losses in table if losses]


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Write a file beside its place and move it there, so that a reader sees all of it or nothing."""
    handle, name = tempfile.mkstemp(dir=path.parent, prefix=f".{path.name}.")
    os.close(handle)
    part = Path(name)
    try:
        write(part)
        part.chmod(0o644)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def peak_memory(device: torch.device) -> int:
    """The most memory taken so far: on the GPU by tensors, otherwise by this process."""
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024


def environment(device: torch.device, dtype: str) -> dict[str, Any]:
    """What a number may depend on beside the configuration."""
    packages = ("torch", "lightning", "torchmetrics", "ntk-ensembles")
    return {
        "device": torch.cuda.get_device_name(device) if device.type == "cuda" else _cpu_name(),
        "device_type": device.type,
        "cpu_threads": torch.get_num_threads(),
        "dtypes": {"weights": dtype.removeprefix("torch."), "stored_deviations": "float16"},
        "python": platform.python_version(),
        "versions": {name: version(name) for name in packages},
    }


def _cpu_name() -> str:
    """The processor's model where the system tells it, otherwise its architecture."""
    try:
        lines = Path("/proc/cpuinfo").read_text(encoding="utf-8").splitlines()
    except OSError:
        lines = []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
