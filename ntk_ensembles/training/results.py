"""From the records of members to ``results.json``, the figure and the charts (DESIGN §6).

The same for a run that ends, was interrupted, goes on, or is merged from others: everything follows from the
records and the run's configuration.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from torch.utils.tensorboard import SummaryWriter

from ntk_ensembles.files import write_atomically
from ntk_ensembles.tasks import Task
from ntk_ensembles.theory import DECODERS, Decoder, ExactMatchBand, LimitPrediction
from ntk_ensembles.training.convergence import ConvergenceRow, convergence
from ntk_ensembles.training.environment import environment, peak_memory
from ntk_ensembles.training.figures import convergence_figure
from ntk_ensembles.training.records import PHASES, Records
from ntk_ensembles.training.store import RunStore

TENSORBOARD = "tensorboard"
"""The folder of a run's events."""


def leave_results(
    store: RunStore,
    task: Task[Any, Any],
    theory: LimitPrediction,
    records: Records,
    *,
    members_planned: int,
    dtype: torch.dtype,
    device: torch.device,
    seconds_total: float,
) -> dict[str, Any]:
    """Write everything that follows from the members so far.

    Args:
        store: of the run.
        task: what was learned.
        theory: the evaluation states and what infinite width says of them.
        records: all members so far, at least one.
        members_planned: how many there will be.
        dtype: of the weights.
        device: where members were trained.
        seconds_total: wall time of this session.

    Returns:
        The content of ``results.json``.
    """
    manifest = store.manifest
    kept = records.deviations if bool(records.converged.all()) else records.deviations[records.converged]
    rows = convergence(theory, kept)
    losses = records.relative_loss
    seconds = dict(zip(PHASES, records.seconds.sum(0).tolist(), strict=True))
    results = {
        "task": {"name": task.name, **task.options},
        "seed": manifest["seed"],
        "evaluation_seed": manifest["evaluation_seed"],
        "width": manifest["width"],
        "members": len(records),
        "members_planned": members_planned,
        "init": manifest["init"],
        "loss": manifest["loss"],
        "precision": manifest["precision"],
        "tolerance": manifest["tolerance"],
        "templates": len(task.templates),
        "state_bits": task.layout.bits,
        "evaluation_states": len(theory.evaluation),
        "executions": len(theory.evaluation.trajectories),
        "convergence": [asdict(row) for row in rows],
        "training": {
            "steps_max": int(records.steps.max()),
            "relative_loss_max": float(losses.max()) if bool(losses.isfinite().all()) else None,
            "not_converged": records.indices[~records.converged].tolist(),
            "seconds": {**seconds, "total": seconds_total},
            "peak_memory_bytes": peak_memory(device),
        },
        "environment": environment(device, str(dtype)),
    }
    if rows:
        bands: dict[Decoder, ExactMatchBand] = {
            decoder: theory.band([row.members for row in rows], decoder) for decoder in DECODERS
        }
        _draw(store, task, rows, bands, manifest)
    _chart(store.directory / TENSORBOARD, rows, records)
    store.write_text("results.json", json.dumps(results, indent=2, allow_nan=False) + "\n")
    return results


def _draw(
    store: RunStore,
    task: Task[Any, Any],
    rows: list[ConvergenceRow],
    bands: dict[Decoder, ExactMatchBand],
    manifest: dict[str, Any],
) -> None:
    title = f"{task!r}: {len(task.templates)} templates, width {manifest['width']}, "
    title += f"{manifest['init']}, {rows[-1].members} members"
    figure = convergence_figure(rows, bands, title)
    path = store.directory / "figures" / "convergence.png"
    write_atomically(path, lambda part: figure.savefig(part, dpi=150, format="png"))
    writer: Any = SummaryWriter(str(_emptied(store.directory / TENSORBOARD / "figures")))
    writer.add_figure("convergence", figure)
    writer.close()


def _chart(folder: Path, rows: list[ConvergenceRow], records: Records) -> None:
    """Measured and predicted values under one tag, from one writer each, so that they share a chart."""
    for decoder in DECODERS:
        series = {
            "measured": [(row.exact_match, row.bit_accuracy, row.rms_deviation) for row in rows],
            "predicted": [
                (row.predicted_exact_match, row.predicted_bit_accuracy, row.predicted_rms_deviation) for row in rows
            ],
        }
        for kind, values in series.items():
            writer: Any = SummaryWriter(str(_emptied(folder / f"{kind} ({decoder})")))
            for row, (exact, bits, deviation) in zip(rows, values, strict=True):
                writer.add_scalar("members/exact_match", exact[decoder], row.members)
                writer.add_scalar("members/bit_accuracy", bits[decoder], row.members)
                # Of the outputs, before any decoder: one pair of lines is all of it.
                if decoder == DECODERS[0]:
                    writer.add_scalar("members/rms_deviation", deviation, row.members)
            writer.close()
    writer = SummaryWriter(str(_emptied(folder / "training")))
    for step, losses in enumerate(_losses_by_step(records)):
        writer.add_scalar("training/relative_loss_mean", sum(losses) / len(losses), step)
        writer.add_scalar("training/relative_loss_max", max(losses), step)
    writer.close()


def _emptied(folder: Path) -> Path:
    """A folder of events without those of an earlier session, which the new ones replace."""
    shutil.rmtree(folder, ignore_errors=True)
    return folder


def _losses_by_step(records: Records) -> list[list[float]]:
    """For every step the relative losses of the members that got so far and are finite."""
    table: list[list[float]] = [[] for _ in range(int(records.loss_counts.max()))]
    for losses in torch.split(records.losses, records.loss_counts.tolist()):
        values = losses.tolist()
        for step, loss in enumerate(values):
            if math.isfinite(loss) and values[0]:
                table[step].append(loss / values[0])
    return [losses for losses in table if losses]
